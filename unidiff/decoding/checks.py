"""What a sampler is made and called with, and what a model answers: checks, and the sentence for logits that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.config import SamplerConfig
from unidiff.models.denoiser import PartialDenoiser, takes_features
from unidiff.schema import short_value
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.tokens.batch import CONTINUOUS

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_KINDS = (torch.int64, torch.int64, torch.bool, torch.bool, torch.int64, torch.int64)  # of a batch's fields
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


def _check_is(name: str, value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {_name(value)}; expected {expected}")


def check_sampler(model: Any, vocabulary: Any, config: Any, policy: Any, rules: Any, graphs: Any) -> None:
    """Raise `ValueError` unless a `Sampler` can be made of these."""
    _check_methods("model", model, ("hidden", "head"), "see `Denoiser`")
    _check_is("vocabulary", vocabulary, Vocabulary, "a Vocabulary")
    _check_is("config", config, SamplerConfig, "a SamplerConfig (SamplerConfig.from_dict reads plain data)")
    if policy is not None:
        _check_methods("policy", policy, ("start", "plan"), "see `RefreshPolicy`; CacheConfig(name).build() makes one")
    _check_is("rules", rules, Mapping | None, "a mapping or nothing (null)")
    for modality, rule in (rules or {}).items():
        if not callable(rule) and not hasattr(rule, "start"):
            raise ValueError(f"rules has {rule!r} as a rule; expected a function, see `CommitRule`")
        if not isinstance(modality, Modality):
            raise ValueError(f"rules has the key {modality!r}; expected Modality.TEXT or Modality.IMAGE")
    if not isinstance(graphs, bool) and not callable(graphs):
        raise ValueError(f"graphs is {_name(graphs)}; expected true or false, or a `Record`")
    if isinstance(model, PartialDenoiser) and model.traits.ids < vocabulary.size:
        raise ValueError(
            f"the model has {model.traits.ids} ids, the vocabulary {vocabulary.size}; give the vocabulary that the "
            "model was made for"
        )
    _check_ids("ends", config.ends, vocabulary)
    (start, stop), masks = vocabulary.text, (vocabulary.mask_id, vocabulary.image_mask)
    if config.fill is not None and (not start <= config.fill < stop or config.fill in masks):
        raise ValueError(f"fill is id {config.fill}; expected a text id from {start} to {stop - 1} that is not [MASK]")


def check_request(
    model: Any,
    vocabulary: Vocabulary,
    config: SamplerConfig,
    batch: Any,
    seeds: Any,
    condition: Any,
    callback: Any,
    record: Any,
    unconditional: Any,
) -> tuple[TokenBatch, tuple[TokenBatch, ...], list[TokenBatch]]:
    """Raise `ValueError` unless a `Sampler` can be called with these; returns the batch on the CPU, the unconditional ones, and
    those on the CPU."""
    host = _check_batch("batch", batch, vocabulary)
    rows, length = batch.shape
    _check_tensor("seeds", seeds, _INTEGERS, (rows,), f"an int64 tensor [{rows}], one per row", plural=True)
    if condition is not None:
        _check_tensor("condition", condition, (torch.bool,), (rows, length), f"a bool tensor {batch.shape}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {_name(callback)}; expected a function of (step, state)")
    _check_is("record", record, bool, "true or false")
    several = isinstance(unconditional, Sequence) and not isinstance(unconditional, str)
    others = tuple(unconditional) if several else () if unconditional is None else (unconditional,)
    on_host = [_check_batch("unconditional", other, vocabulary) for other in others]
    if others and condition is not None:
        raise ValueError("condition and unconditional both say what the unconditional stream sees; give one of them")
    if max(1, len(others)) != 1 + len(config.guidance.further):
        raise ValueError(
            f"guidance has {1 + len(config.guidance.further)} scales for {len(others)} unconditional batches; "
            "`Guidance.further` takes a scale for each after the first"
        )
    for other in on_host:
        if other.shape != batch.shape:
            raise ValueError(f"unconditional has shape {other.shape}; expected {batch.shape}, that of the batch")
        if bool((other.targets & ~host.targets).any()):
            raise ValueError(
                "unconditional has other targets than the batch; align the rows, for instance by left padding"
            )
    if any(rows.features is not None for rows in (host, *on_host)) and not takes_features(model):
        raise ValueError(
            f"the batch has continuous features, but {type(model).__name__} reads ids alone; its hidden needs an argument "
            "`features`, see `Denoiser`"
        )
    return host, others, on_host


def _check_batch(name: str, batch: Any, vocabulary: Vocabulary) -> TokenBatch:
    """The batch on the CPU, brought in one go."""
    if not isinstance(batch, TokenBatch):
        raise ValueError(f"{name} is {_name(batch)}; expected a TokenBatch")
    shape = tuple(getattr(batch.ids, "shape", ())[:2])
    for f, kind in zip(fields(TokenBatch), _KINDS, strict=False):
        value, own = getattr(batch, f.name), (*shape, 3) if f.name == "positions" else shape
        expected = f"{kind} {list(own)}"
        _check_tensor(f"{name} {f.name}", value, (kind,), own, expected, plural=True)
        if value.device != batch.ids.device:
            raise ValueError(f"{name} {f.name} are on {value.device}; expected {batch.ids.device}, that of the ids")
    if len(shape) != 2 or not batch.ids.numel():
        raise ValueError(f"{name} has shape {shape}; expected at least one row of at least one token")
    if (features := batch.features) is not None:
        width = features.shape[-1:] if isinstance(features, Tensor) else ()
        floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        _check_tensor(f"{name} features", features, floats, (*shape, *width), f"floats {[*shape, 'D']}", plural=True)
        if features.device != batch.ids.device:
            raise ValueError(f"{name} features are on {features.device}; expected {batch.ids.device}, that of the ids")
    host = batch.to("cpu")
    known = host.valid & host.given if features is None else host.valid & host.given & (host.ids != CONTINUOUS)
    low, high = map(int, torch.where(known, host.ids, 0).aminmax())
    first, last = map(int, torch.where(host.valid, host.modality, 0).aminmax())
    if not 0 <= low <= high < vocabulary.size:
        raise ValueError(
            f"{name} gives ids from {low} to {high}, but the vocabulary has ids 0 to {vocabulary.size - 1}"
        )
    if not 0 <= first <= last < len(Modality):
        raise ValueError(f"{name} has modalities from {first} to {last}; expected 0 (text) and 1 (image)")
    return host


def _check_tensor(
    name: str, value: Any, kinds: Sequence[torch.dtype], shape: tuple[int, ...], expected: str, plural: bool = False
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} {'are' if plural else 'is'} {_name(value)}; expected {expected}")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        kind = "on the meta device, without values" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor {kind}; expected a plain one (`.to_dense()`, or real values)")
    if value.dtype not in kinds or value.shape != shape:
        found = f"shape {tuple(value.shape)} and dtype {value.dtype}"
        raise ValueError(f"{name} {'have' if plural else 'has'} {found}; expected {expected}")


def check_features(features: Any, ids: Tensor) -> None:
    """Raise `ValueError` unless a model returned features `[B, L, D]` for ids `[B, L]`."""
    good = isinstance(features, Tensor) and features.is_floating_point()
    if not good or features.ndim != 3 or features.shape[:2] != ids.shape:
        raise ValueError(f"the model's hidden returned {_kind(features)}; expected floats {[*ids.shape, 'D']}")


def check_head(logits: Any, features: Tensor, start: int, stop: int) -> None:
    """Raise `ValueError` unless a model's head returned a logit for each of the ids from `start` to before `stop`."""
    shape = [*features.shape[:-1], stop - start]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or list(logits.shape) != shape:
        raise ValueError(
            f"the model's head returned {_kind(logits)} for the ids {start} to {stop - 1}; expected floats {shape}"
        )


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else short_value(value)


def _check_methods(name: str, value: object, methods: Sequence[str], hint: str) -> None:
    if missing := [m for m in methods if not hasattr(value, m)]:
        raise ValueError(f"{name} is {_name(value)} without {' and '.join(missing)}; {hint}")


def _name(value: object) -> str:
    shown = repr(value) if isinstance(value, bool | int | float | str | type(None)) else f"a {type(value).__name__}"
    return shown if len(shown) < 80 else f"{shown[:77]}..."


def banned_offsets(vocabulary: Vocabulary, modality: Modality, forbid: tuple[int, ...], masks: bool = True) -> Tensor:
    """Offsets in the modality's slice that may not be emitted, int64; [MASK] among them where `masks` says so."""
    _check_ids("forbid", forbid, vocabulary)
    start, stop = vocabulary.range_of(modality)
    offsets = {i - start for i in forbid if start <= i < stop}
    offsets |= set(vocabulary.forbidden(modality)) if masks else set()
    if stop > start and len(offsets) == stop - start:
        raise ValueError(f"every {modality.name.lower()} id is forbidden; leave at least one to emit")
    return torch.tensor(sorted(offsets), dtype=torch.long)


def _check_ids(name: str, ids: Sequence[int], vocabulary: Vocabulary) -> None:
    if outside := [i for i in ids if not 0 <= i < vocabulary.size]:
        raise ValueError(f"{name} names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")
