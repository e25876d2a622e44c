"""The decoding loops of LLaDA2.0 and LLaDA2.1 with all their quirks, for comparisons with recorded runs.

The sampler is the decoder of this library. These loops differ from it in what they do with [MASK]: its own logit takes part in
proposals and probabilities, so that it may be written, uses up quota, and may stay. Greedy; one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""int64 `[1, L]`, whole blocks, to logits `[1, L, V]`."""


@dataclass
class Llada2Trace:
    """One entry per forward; flags, ids and probabilities of the current block."""

    block: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    x0: list[Tensor] = field(default_factory=list)
    prob: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    edited: list[Tensor] = field(default_factory=list)
    canvas: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def generate(
    forward: Forward, prompt: Tensor, settings: dict[str, Any], mask_id: int, eos_id: int, edits: bool
) -> Llada2Trace:
    """Decode behind a prompt int64 `[P]`, by the rules of 2.0, or with `edits` those of 2.1."""
    length, block = len(prompt), settings["block_length"]
    blocks = -(-(length + settings["gen_length"]) // block)
    canvas = torch.full((blocks * block,), mask_id)
    canvas[:length] = prompt
    steps = min(settings.get("steps", 32), settings["gen_length"] // settings.get("minimal_topk", 1))
    trace, early = Llada2Trace(), settings.get("eos_early_stop", False)
    for number in range(length // block, blocks):
        place = slice(number * block, (number + 1) * block)
        inside = torch.arange(number * block, (number + 1) * block)
        step = post = 0
        while True:
            masked = canvas[place] == mask_id
            if edits:
                post += int(not masked.any())
                if post > settings["max_post_steps"]:
                    break
            elif not masked.any() or step == steps:
                break
            p = forward(canvas[None, : place.stop])[0, place].float().softmax(-1)  # [block, V]
            prob, x0 = p.max(-1)
            quota = settings.get("num_to_transfer", 1) if edits else block // steps + (step < block % steps)
            ranked = torch.where(masked, prob, -1.0)
            sure = ranked > settings["threshold"]
            if int(sure.sum()) < quota:
                best = ranked.topk(min(quota, int(masked.sum()))).indices
                sure = torch.zeros_like(masked).index_fill(0, best, True)
            replaced = torch.zeros_like(masked)
            if edits:
                replaced = ~masked & (inside >= length) & (prob > settings["editing_threshold"]) & (x0 != canvas[place])
            for name, value in (("block", number), ("step", step), ("inputs", canvas.clone()), ("x0", x0)):
                getattr(trace, name).append(value)
            for name, value in (("prob", prob), ("written", sure), ("edited", replaced)):
                getattr(trace, name).append(value)
            canvas[place] = torch.where(sure | replaced, x0, canvas[place])
            step += 1
            generated = canvas[length:]
            if not edits and early and bool((x0[sure] == eos_id).any()):
                first = int((generated == eos_id).nonzero()[0])
                if not bool((generated[:first] == mask_id).any()):
                    return finished(trace, canvas, length, settings, eos_id)
            if edits and not masked.any() and not replaced.any():
                break
        generated = canvas[length : place.stop]
        if bool((generated == eos_id).any()) and (not edits or (early and not bool((generated == mask_id).any()))):
            break
    return finished(trace, canvas, length, settings, eos_id)


def finished(trace: Llada2Trace, canvas: Tensor, length: int, settings: dict[str, Any], eos_id: int) -> Llada2Trace:
    """With what is returned: the generated part up to its first end of text."""
    output = canvas[length : length + settings["gen_length"]]
    if len(ends := (output == eos_id).nonzero()):
        output = output[: int(ends[0]) + 1]
    trace.canvas, trace.output = canvas, output
    return trace
