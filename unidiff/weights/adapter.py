"""Low-rank adapters as folders of peft: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiff.errors import few, import_extra, plain, read_json
from unidiff.schema import check_value
from unidiff.weights.files import check_dtype, check_finite, open_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS)
_PREFIX = "base_model.model."  # of the names in peft's files: a model inside its `PeftModel`


def peft_for(what: str) -> Any:
    """The module peft. Raises ValueError where it is not installed; `what` needs it."""
    return import_extra("peft", f"{what} but peft is not installed; run pip install 'unidiff[finetune]'")


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a model are wrapped by adapters, merged or not."""
    return any(hasattr(module, "lora_A") for module in model.modules())


@torch.no_grad()
def save_adapter(model: nn.Module, folder: Path, share: float = 1.0) -> None:
    """Write the adapter `default` of a model into an empty folder, which `peft.PeftModel` and our pipelines read.

    Args:
        share: of its effect that is kept, see `unidiff.train.reward.keep_share`; not with DoRA.

    Raises:
        ValueError: weights that are not finite.
    """
    peft = peft_for("adapters are to be saved")
    weights = {name: value.cpu().contiguous() for name, value in peft.get_peft_model_state_dict(model).items()}
    if share != 1:
        weights = {name: value * share if "lora_B" in name else value for name, value in weights.items()}
    check_finite(weights, "the adapter, which is to be saved")
    config: Any = model.peft_config["default"]  # type: ignore[index]
    peft.LoraConfig(**{**config.to_dict(), "inference_mode": True}).save_pretrained(str(folder))
    save_file({f"{_PREFIX}{name}": value for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def read_adapter(
    folder: Path, model: nn.Module, ready: Callable[[Iterable[str]], None] = lambda names: None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of `peft.LoraConfig`, and weights by their names in `model`, of a folder that `save_adapter` or peft wrote.

    Args:
        ready: called with these names before they are looked for in the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no adapter of linear layers, one for another model, or weights that are no finite numbers.
    """
    if absent := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{str(folder)!r} holds no {absent[0]}; name a folder with an adapter that peft wrote")
    config, path = read_json(folder / CONFIG, "the config of an adapter"), folder / WEIGHTS
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{folder / CONFIG} describes a {plain(kind)}; expected a LORA adapter")
    for name, annotation in {"r": int, "lora_alpha": float, "target_modules": str | list[str]}.items():
        check_value(config.get(name), annotation, f"{folder / CONFIG}: {name}")
    known = peft_for("adapters are to be loaded").LoraConfig.__dataclass_fields__
    weights = {name.removeprefix(_PREFIX): value.read() for name, value in open_checkpoint(path).items()}
    for name, value in weights.items():
        check_dtype(f"{name} of {path}", value)
    check_finite(weights, str(path))
    ready(weights)
    if bad := [name for name, value in weights.items() if not _fits(name, value, model)]:
        raise ValueError(f"{path} is for another model: {few(map(plain, bad))} fits no layer of this one")
    return {name: value for name, value in config.items() if name in known}, weights


def _fits(name: str, value: Tensor, model: nn.Module) -> bool:
    """Whether a weight of an adapter belongs to a linear layer of its width."""
    place, found, part = name.partition(".lora_")
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    layer: Any = layers.get(place)
    sides = {"A": getattr(layer, "in_features", None), "B": getattr(layer, "out_features", None)}
    if not found or part[:1] not in sides:
        return part.startswith("magnitude") and sides["B"] == len(value)
    return value.ndim == 2 and value.shape[part[0] == "A"] == sides[part[0]]
