"""`first_hitting`: one position at a time, by a law that is exactly the model's."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule, take_best
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import ORDER


class FirstHitting(NamedRule):
    """Which position is next does not depend on the model, so logits are needed there alone."""

    name = "first_hitting"
    blind = foretold = True

    @classmethod
    def passes_of_a_block(cls, settings: ModalityDecoding, size: int, block: int) -> int | Fraction:
        return block

    def early(self, now: BlockPass, count: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        return take_best(noise(ORDER), now.active, torch.ones_like(count))
