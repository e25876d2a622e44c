"""`first_hitting`: one uniformly random position per pass, the exact law of the model."""

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
    compares = False

    @classmethod
    def looks(cls, settings: ModalityDecoding) -> bool:
        return False

    @classmethod
    def passes_of_a_block(cls, settings: ModalityDecoding, size: int, block: int) -> int | Fraction:
        return block

    def early(self, now: BlockPass, count: Tensor, sigma: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        return take_best(noise(ORDER), now.active, torch.ones_like(count))
