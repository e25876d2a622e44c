"""Low-rank adapters from peft on the linear layers of a transformer's blocks: put in, trained, folded back into the weights.

The adapted model keeps its class: peft replaces the layers in place, so training, averages and checkpoints know nothing of
it. Only `hidden` runs through adapters; fold them in before a partial forward (`merge_adapters`), as exports do.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from unidiff.train.config import LORA_TARGETS, LoraConfig

_PLACES = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
LAYERS = dict(zip(LORA_TARGETS, _PLACES, strict=True))


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters of `config.rank` into every block and freeze all else. In place; rank 0 leaves the model as it is.

    Fresh adapters change no output: one of their two factors is zero. The other is drawn from torch's global generator.

    Raises:
        ValueError: peft is not installed, a target that no block has, or DoRA on weights with a row of zeros.
    """
    if config.rank == 0:
        return
    names = list(config.targets or LAYERS)
    if unknown := [name for name in names if name not in LAYERS]:
        raise ValueError(f"lora.targets has {unknown[0]!r}; expected some of {', '.join(LAYERS)}")
    peft = _peft()
    if config.dora:
        _check_columns(model, names)
    layers = "|".join(re.escape(LAYERS[name]) for name in names)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_dora=config.dora,
        target_modules=rf"blocks\.\d+\.({layers})",
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_adapters(model: nn.Module) -> None:
    """Fold adapters into the weights and remove them. In place; a model without adapters stays as it is."""
    adapted = [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for name, layer in adapted:
        layer.merge()
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, layer.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _check_columns(model: nn.Module, names: list[str]) -> None:
    """DoRA divides by the length of every output's weights."""
    for name, layer in model.named_modules():
        chosen = any(name.endswith("." + LAYERS[n]) for n in names)
        if chosen and not layer.weight.is_meta and bool((layer.weight == 0).all(1).any()):
            raise ValueError(
                f"lora.dora needs trained weights, {name} has outputs that are all zero; set checkpoint.init_from"
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora.rank is set but peft is not installed; run pip install 'unidiff[finetune]'") from error
    return peft
