"""`complaint`: the sentence for logits that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

UNUSABLE = "the model returned NaN or infinite logits; check the weights and the dtype (float16 may overflow)"
_AT_ONCE = 256  # positions whose logits are looked at for a complaint


def complaint(request: Any, streams: Sequence[int]) -> str:
    """The sentence for a pass of a `Request` that met unusable logits: looks at each guidance stream alone, without settings."""
    state, model, sampler = request.state, request.model, request.sampler
    guidance = sampler.config.guidance
    for modality, progress in state.progress.items():
        start, stop = sampler.vocabulary.range_of(modality)
        for stream in streams:
            for features in model.features(stream)[progress.targets].split(_AT_ONCE):  # [n, D]
                logits = model.denoiser.head(features, start, stop)  # [n, V]
                top = logits.amax(-1)
                if bool((top.isnan() | (top == torch.inf)).any()):
                    return UNUSABLE
                banned = request.banned[modality]
                left = (logits if banned is None else logits.index_fill(-1, banned, -torch.inf)).amax(-1)
                if stream == 0 and bool((left == -torch.inf).any()):
                    return (
                        f"the model gives no {modality.name.lower()} id that may be emitted any probability at some position; "
                        "check the weights, and what `forbid` excludes"
                    )
    blamed = []
    if len(streams) > 1:
        scales = {name: getattr(guidance, name) for name in ("scale", "text_scale", "image_scale")}
        blamed = [f"guidance.{name} = {value:g}" for name, value in scales.items() if value is not None]
        blamed += [f"guidance.further = {guidance.further}"] if guidance.further else []
    for modality, progress in state.progress.items():
        if (name := progress.rule.adjusts) is not None:
            blamed.append(f"{modality.name.lower()}.{name} = {getattr(progress.settings, name):g}")
    if not blamed:
        return UNUSABLE
    dtype = str(model.features(0).dtype).removeprefix("torch.")
    return (
        f"the settings take logits beyond what {dtype} holds, although the model's own are finite: "
        f"{', '.join(blamed)}; lower them, or use a wider dtype"
    )
