"""LLaDA-V's decoding written anew, for one row, with its quirks: the order of commits, stop sequences, forbidden ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""int64 `[n]`, ids of the generated part, to float `[n, V]`, its logits with guidance."""


@dataclass
class Trace:
    """Every pass, over the generated part."""

    passes: dict[str, list[Tensor]] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.passes.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack(self.passes[name])


def generate(
    forward: Forward,
    case: dict,
    mask_id: int,
    forbidden: Sequence[int],
    suffix: Tensor | None = None,
    uniforms: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Trace:
    """What the stored traces hold.

    Args:
        case: gen_length, block_length, steps, temperature, stop_ids.
        uniforms: float64 `[passes, n, V]`, of the token draw. ranks: `[passes, n]`, random confidences.
    """
    length, block = case["gen_length"], case["block_length"]
    blocks, stops = length // block, [list(s) for s in case["stop_ids"] or ()]
    steps = case["steps"] // blocks
    suffix = torch.zeros(0, dtype=torch.long) if suffix is None else suffix.long()
    ids = torch.cat([torch.full((length,), mask_id), suffix])
    generated = torch.arange(len(ids)) < length
    trace, stop = Trace(), length
    for number in range(blocks):
        start, end = number * block, (number + 1) * block
        if start >= stop:
            break
        open_ = int((ids[start:end] == mask_id).sum())
        for step in range(steps):
            masked = (ids == mask_id) & generated
            candidate = masked & (torch.arange(len(ids)) < min(end, stop))
            if not candidate.any():
                break
            logits = forward(ids).clone()
            logits[masked.nonzero(), torch.tensor(list(forbidden))] = -torch.inf
            at = len(trace.logits)
            proposal = logits.argmax(-1)
            if case["temperature"]:
                noise = (-uniforms[at].log()) ** case["temperature"]
                proposal = (logits.double().exp() / noise).argmax(-1)
            proposal = torch.where(masked, proposal, ids)
            confidence = logits.double().softmax(-1).gather(1, proposal[:, None])[:, 0]
            if ranks is not None:
                confidence = ranks[at].double()
            quota = open_ // steps + (step < open_ % steps)
            best = torch.where(candidate, confidence, -torch.inf).topk(min(quota, len(ids))).indices
            committed = torch.zeros_like(masked).index_fill(0, best, True)
            trace.logits.append(logits)
            trace.add(
                ids_before=ids,
                masked=masked,
                candidate=candidate,
                proposal=proposal,
                confidence=torch.where(candidate, confidence, 0),
                committed=committed,
                quota=torch.tensor(quota),
                block_and_step=torch.tensor([number, step]),
            )
            ids = torch.where(committed, proposal, ids)
            found = [n for n in range(length) for s in stops if ids[n : min(n + len(s), length)].tolist() == s]
            stop = min([stop, *found])
    trace.output = torch.cat([ids[:stop], suffix])
    return trace
