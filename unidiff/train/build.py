"""The model and the device of a run."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from safetensors.torch import load_file

from unidiff.models.transformer import MaskedTransformer
from unidiff.train.config import TrainConfig


def build_model(config: TrainConfig, vocab_size: int) -> MaskedTransformer:
    """The model of `config.model`, drawn from `config.seed`, or warm-started from `checkpoint.init_from`.

    Raises:
        ValueError: an unknown or ill-typed model setting, or weights that do not fit.
        FileNotFoundError: `init_from` holds no safetensors file.
    """
    known = inspect.signature(MaskedTransformer.__init__).parameters
    if unknown := set(config.model) - set(known) | (set(config.model) & {"self", "vocab_size"}):
        raise ValueError(
            f"unknown model settings {sorted(unknown)}; vocab_size comes from the data, others are {sorted(known)}"
        )
    for key, value in config.model.items():
        default = known[key].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (
            not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ValueError(f"model.{key} = {value!r} must be of type {type(default).__name__}")
    torch.manual_seed(config.seed)
    try:
        model = MaskedTransformer(vocab_size=vocab_size, **config.model)
    except TypeError as error:
        raise ValueError(f"model settings {config.model} have a wrong type: {error}") from error
    if config.checkpoint.init_from:
        folder = Path(config.checkpoint.init_from)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"checkpoint.init_from = {str(folder)!r} holds no .safetensors file")
        weights = {name: value for file in files for name, value in load_file(file).items()}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the weights in {str(folder)!r} do not fit the model of this config ({reason})"
            ) from error
    return model.float().train()


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r} but no CUDA device is there; use device=cpu")
    return device
