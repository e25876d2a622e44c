"""Decodes whose numbers do not depend on the model: what their passes would read from a device is known without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from unidiff.decoding.cache.base import foretells


def can_be_foretold(request: Any) -> bool:
    """Whether it is known beforehand how many positions the passes of a `Request` fill and recompute. Not where a text may end,
    or a rule or a policy goes by the model's answers."""
    progress, store = request.state.progress.values(), request.store
    # a stream that skips passes does not see every token that was masked again
    plain = store is None or (not store.layout.border and all(p.settings.remask == "none" for p in progress))
    known = plain and request.end_of_text is None and (request.policy is None or foretells(request.policy))
    return known and all(p.foretold for p in progress)


def foretell(sampler: Any, twin: Any) -> Iterator[tuple[Sequence[int], bool]]:
    """What the passes of a request would read, from its `twin` on the CPU, which writes any token in place of the model's; and
    whether one reads it nevertheless: the first of each block, which looks whether the last one went well."""
    state, vocabulary, block = twin.state, sampler.vocabulary, -1
    while (plan := twin.plan(work := [sampler.begin(twin, p) for p in state.progress.values()])) is not None:
        running = [p.block[p.running] for p in state.progress.values()]
        reached = max(block, int(torch.cat(running).min())) if any(map(len, running)) else block
        yield twin.numbers, block not in (-1, reached)
        block = reached
        for w in work:
            (start, stop), masks = vocabulary.range_of(w.progress.modality), vocabulary.forbidden(w.progress.modality)
            state.fill(w.foretold(w.shown(plan.logits)), next(i for i in range(start, stop) if i - start not in masks))
        for w in work:
            sampler.remask(twin, w)
        twin.end_pass()
