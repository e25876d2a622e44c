"""Decodes a task of a row layout without a pipeline: ids in place of words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import RefreshPolicy, Sampler, SamplerConfig, SamplerOutput
from unidiff.families.layout import DecodeRequest, RowLayout, TaskInputs


@dataclass(frozen=True)
class Decoded:
    """Ids of the texts, codes `[B, h, w]` of the pictures, and everything that led there."""

    texts: list[list[int]]
    codes: Tensor
    output: SamplerOutput
    request: DecodeRequest


def request_of(layout: RowLayout, task: str, **inputs: Any) -> DecodeRequest:
    """The rows of a task; their number is that of the inputs."""
    count = inputs.pop("count", None) or max(len(v) for v in inputs.values() if isinstance(v, list | Tensor))
    return layout.request(task, TaskInputs(count, **inputs))


def decode_request(
    model: Any,
    layout: RowLayout,
    request: DecodeRequest,
    seeds: Any = (1, 2),
    policy: RefreshPolicy | None = None,
    config: SamplerConfig | None = None,
    record: bool = False,
) -> Decoded:
    config = request.needs.keep_in(request.config if config is None else config)
    run, seeds = Sampler(model, layout.vocabulary, config, policy), torch.tensor(seeds)
    others = request.unconditional or None
    out = run(request.batch, seeds, request.condition(config.guidance.hide), record=record, unconditional=others)
    ids = out.batch.ids
    codes = request.picture_ids(ids) - layout.vocabulary.image[0]
    return Decoded(request.text_ids(ids, layout.vocabulary, config.ends), codes, out, request)


def decode(model: Any, layout: RowLayout, task: str, seeds: Any = (1, 2), policy: Any = None, **inputs: Any) -> Decoded:
    return decode_request(model, layout, request_of(layout, task, **inputs), seeds, policy)
