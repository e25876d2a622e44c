"""What a sampler is made and called with, checked before anything is decoded, and what a model returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.config import SamplerConfig
from unidiff.models.denoiser import PartialDenoiser
from unidiff.schema import check_value
from unidiff.tokens import Modality, TokenBatch, Vocabulary

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
UNUSABLE = "the model returned NaN or infinite logits; check the weights and the dtype (float16 may overflow)"
_KINDS = (torch.int64, torch.int64, torch.bool, torch.bool, torch.int64, torch.int64)  # of a batch's fields


def check_sampler(model: Any, vocabulary: Any, config: Any, policy: Any, graphs: Any) -> None:
    """Raise `ValueError` unless a `Sampler` can be made of these."""
    _check_methods("model", model, ("hidden", "head"), "see `Denoiser`")
    check_value(vocabulary, Vocabulary, "vocabulary")
    if not isinstance(config, SamplerConfig):
        raise ValueError(
            f"config is {_name(config)}; expected a SamplerConfig (SamplerConfig.from_dict reads plain data)"
        )
    if policy is not None:
        _check_methods("policy", policy, ("start", "plan"), "see `RefreshPolicy`; CacheConfig(name).build() makes one")
    if not isinstance(graphs, bool) and not callable(graphs):
        raise ValueError(f"graphs is {_name(graphs)}; expected true or false, or a `Record`")
    if isinstance(model, PartialDenoiser) and model.traits.ids < vocabulary.size:
        raise ValueError(
            f"the model has {model.traits.ids} ids, the vocabulary {vocabulary.size}; give the vocabulary that the "
            "model was made for"
        )


def banned_offsets(vocabulary: Vocabulary, modality: Modality, forbid: tuple[int, ...]) -> Tensor:
    """Offsets in the modality's slice that may not be emitted, int64."""
    if outside := [i for i in forbid if not 0 <= i < vocabulary.size]:
        raise ValueError(f"forbid names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")
    start, stop = vocabulary.range_of(modality)
    offsets = {i - start for i in forbid if start <= i < stop} | set(vocabulary.forbidden(modality))
    if stop > start and len(offsets) == stop - start:
        raise ValueError(f"every {modality.name.lower()} id is forbidden; leave at least one to emit")
    return torch.tensor(sorted(offsets), dtype=torch.long)


def check_ends(vocabulary: Vocabulary, config: SamplerConfig) -> None:
    """Raise `ValueError` for ends that no id is, and for a fill that may not be emitted."""
    if outside := [i for i in config.ends if i >= vocabulary.size]:
        raise ValueError(f"ends names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")
    (start, stop), masks = vocabulary.text, (vocabulary.mask_id, vocabulary.image_mask)
    if config.fill is not None and (not start <= config.fill < stop or config.fill in masks):
        raise ValueError(f"fill is id {config.fill}; expected a text id from {start} to {stop - 1} that is not [MASK]")


def check_request(
    vocabulary: Vocabulary,
    config: SamplerConfig,
    batch: Any,
    seeds: Any,
    condition: Any,
    callback: Any,
    record: Any,
    unconditional: Any,
) -> tuple[TokenBatch, ...]:
    """Raise `ValueError` unless a `Sampler` can be called with these; returns the unconditional batches."""
    _check_batch("batch", batch, vocabulary)
    if not isinstance(seeds, Tensor) or seeds.dtype not in _INTEGERS or seeds.shape != batch.ids.shape[:1]:
        raise ValueError(
            f"seeds have shape {tuple(seeds.shape)} and dtype {seeds.dtype}; expected int64 [{len(batch.ids)}], one per row"
            if isinstance(seeds, Tensor)
            else f"seeds are {_name(seeds)}; expected an int64 tensor [{len(batch.ids)}], one per row"
        )
    _check_dense("seeds", seeds)
    if condition is not None:
        if not isinstance(condition, Tensor):
            raise ValueError(f"condition is {_name(condition)}; expected a bool tensor {batch.shape}")
        _check_dense("condition", condition)
        if condition.shape != batch.ids.shape or condition.dtype != torch.bool:
            raise ValueError(
                f"condition has shape {tuple(condition.shape)} and dtype {condition.dtype}; expected bool {batch.shape}"
            )
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {_name(callback)}; expected a function of (step, state)")
    check_value(record, bool, "record")
    several = isinstance(unconditional, Sequence) and not isinstance(unconditional, str)
    others = tuple(unconditional) if several else () if unconditional is None else (unconditional,)
    for rows in others:
        _check_batch("unconditional", rows, vocabulary)
    if others and condition is not None:
        raise ValueError("condition and unconditional both say what the unconditional stream sees; give one of them")
    if max(1, len(others)) != 1 + len(config.guidance.further):
        raise ValueError(
            f"guidance has {1 + len(config.guidance.further)} scales for {len(others)} unconditional batches; "
            "`Guidance.further` takes a scale for each after the first"
        )
    for rows in others:
        if rows.shape != batch.shape:
            raise ValueError(f"unconditional has shape {rows.shape}; expected {batch.shape}, that of the batch")
        if not torch.equal(rows.targets, batch.targets):
            raise ValueError(
                "unconditional has other targets than the batch; align the rows, for instance by left padding"
            )
    return others


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


def _check_batch(name: str, batch: Any, vocabulary: Vocabulary) -> None:
    if not isinstance(batch, TokenBatch):
        raise ValueError(f"{name} is {_name(batch)}; expected a TokenBatch")
    for field, kind in zip(fields(TokenBatch), _KINDS, strict=True):
        value, shape = getattr(batch, field.name), list(getattr(batch.ids, "shape", ())[:2])
        shape += [3] if field.name == "positions" else []
        check_value(value, Tensor, f"{name} {field.name}")
        _check_dense(f"{name} {field.name}", value)
        if value.dtype != kind or list(value.shape) != shape or value.device != batch.ids.device:
            raise ValueError(
                f"{name} {field.name} have shape {tuple(value.shape)} and dtype {value.dtype} on {value.device}; expected "
                f"{kind} {shape} on {batch.ids.device}"
            )
    if batch.ids.ndim != 2 or not batch.ids.numel():
        raise ValueError(f"{name} has shape {tuple(batch.ids.shape)}; expected at least one row of at least one token")
    ends = [
        *torch.where(batch.valid & batch.given, batch.ids, 0).aminmax(),
        *torch.where(batch.valid, batch.modality, 0).aminmax(),
    ]
    low, high, first, last = torch.stack([end.long() for end in ends]).tolist()
    if not 0 <= low <= high < vocabulary.size:
        raise ValueError(
            f"{name} gives ids from {low} to {high}, but the vocabulary has ids 0 to {vocabulary.size - 1}"
        )
    if not 0 <= first <= last < len(Modality):
        raise ValueError(f"{name} has modalities from {first} to {last}; expected 0 (text) and 1 (image)")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "on the meta device, without values" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor {kind}; expected a plain one (`.to_dense()`, or real values)")


def _check_methods(name: str, value: object, methods: Sequence[str], hint: str) -> None:
    if missing := [m for m in methods if not hasattr(value, m)]:
        raise ValueError(f"{name} is {_name(value)} without {' and '.join(missing)}; {hint}")


def _name(value: object) -> str:
    shown = repr(value) if isinstance(value, bool | int | float | str | type(None)) else f"a {type(value).__name__}"
    return shown if len(shown) < 80 else f"{shown[:77]}..."


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else _name(value)
