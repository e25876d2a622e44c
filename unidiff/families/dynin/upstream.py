"""Defects of Dynin-Omni's program, which come back with `DyninLayout(compat="upstream")`.

The first ids of an unconditional row, as many as a number that was meant for longer prompts, come from the prompt without words
as it was at the start; all others come from the conditional row in every pass. Of pictures, the first codes stay masked in it
for good. Of edits, both rows have the same ids, words included, and differ in what is visible alone.

Codes are committed in the order of MMaDA's program, see `unidiff.families.upstream_order`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from unidiff.families.layout import DecodeRequest


def with_prefix(request: DecodeRequest, cut: int) -> DecodeRequest:
    """A request whose unconditional rows have the ids of the conditional ones from position `cut` on. What is hidden before it
    stays so; which positions exist does not change."""
    batch, (away,) = request.batch, request.unconditional
    early = (torch.arange(batch.shape[1], device=batch.ids.device) < cut).expand(batch.shape)
    away = away.replace(ids=torch.where(early, away.ids, batch.ids), given=away.given | early)
    return replace(request, unconditional=(away,))
