"""Whose fault logits are that nothing can be drawn from: the model's, or the settings'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.config import SamplerConfig
from unidiff.decoding.forward import Forward
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, Vocabulary

_AT_ONCE = 256  # positions
_MODEL = "the model returned NaN or infinite logits; check the weights and the dtype (float16 may overflow)"


def check_logits(logits: Tensor, alone: Tensor, setting: str) -> None:
    """For loops of their own: raise `ValueError` where nothing can be drawn from `logits` `[..., V]`.

    Args:
        alone: those of the streams before guidance. setting: the guidance and its value, for the message.
    """
    if bool(logits.amax(-1).isfinite().all()):
        return
    if not bool(alone.amax(-1).isfinite().all()):
        raise ValueError(_MODEL)
    dtype = str(logits.dtype).removeprefix("torch.")
    raise ValueError(
        f"{setting} takes logits beyond what {dtype} holds, although the model's own are finite; lower it, or use a wider dtype"
    )


def complaint(
    model: Denoiser,
    vocabulary: Vocabulary,
    config: SamplerConfig,
    banned: dict[Modality, Tensor],
    state: DecodeState,
    forward: Forward,
) -> str:
    """The sentence for a pass that met unusable logits: looks at each guidance stream alone, without settings.

    Args:
        banned: offsets that may not be emitted, by modality.
        state, forward: as the pass left them.
    """
    dtype = forward.features(0).dtype
    for modality, clock in state.clocks.items():
        start, stop = vocabulary.range_of(modality)
        for stream in state.streams:
            for features in forward.features(stream)[clock.wanted].split(_AT_ONCE):  # [n, D]
                logits: Any = model.head(features, start, stop)  # [n, V]
                top = logits.amax(-1)
                if bool((top.isnan() | (top == torch.inf)).any()):
                    return _MODEL
                left = logits.index_fill(-1, banned[modality].to(logits.device), -torch.inf).amax(-1)
                if stream == 0 and bool((left == -torch.inf).any()):
                    return (
                        f"the model gives no {modality.name.lower()} id that may be emitted any probability at some position; "
                        "check the weights, and what `forbid` excludes"
                    )
    g = config.guidance
    blamed = []
    if state.streams != (0,):
        scales = {"scale": g.scale, "text_scale": g.text_scale, "image_scale": g.image_scale}
        named = [f"guidance.{name} = {value:g}" for name, value in scales.items() if value is not None]
        blamed += [*named, f"guidance.further = {g.further}"] if g.further else named
    for modality in state.clocks:
        settings = config.text if modality == Modality.TEXT else config.image
        if settings.rule == "credit":
            blamed.append(f"{modality.name.lower()}.credit_weight = {settings.credit_weight:g}")
    if not blamed:
        return _MODEL
    return (
        f"the settings take logits beyond what {str(dtype).removeprefix('torch.')} holds, although the model's own are finite: "
        f"{', '.join(blamed)}; lower them, or use a wider dtype"
    )
