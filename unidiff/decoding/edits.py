"""`TokenEdits`: tokens of the block that is decoded are replaced as long as the model would say something else (LLaDA2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unidiff.decoding.config import ModalityDecoding


@dataclass
class TokenEdits:
    """Where each row stands in the editing of its current block.

    Args:
        settings: with an `edit_threshold`.
        made: int64 `[B]`, passes over the block that began without masks. still: bool `[B]`, the last of these replaced nothing.
        edited: bool `[B]`, the last pass replaced tokens.
    """

    settings: ModalityDecoding
    made: Tensor
    still: Tensor
    edited: Tensor

    @classmethod
    def of(cls, settings: ModalityDecoding, zero: Tensor) -> TokenEdits:
        """Before the first pass; `zero` int64 `[B]`."""
        return cls(settings, zero, zero.bool(), zero.bool())

    @property
    def pending(self) -> Tensor:
        """bool `[B]`: rows whose block may still change."""
        return ~self.still & (self.made < self.settings.edit_passes)

    def begin_pass(self, begun: Tensor) -> None:
        """Rows bool `[B]` begin a block."""
        self.made, self.still, self.edited = self.made.where(~begun, 0), self.still & ~begun, self.edited & False

    def end_pass(self, clean: Tensor) -> None:
        """Rows bool `[B]` began the pass without masks."""
        self.made, self.still = self.made + clean.long(), self.still.where(~clean, ~self.edited)

    def replaced(self, known: Tensor, confidence: Tensor, differs: Tensor) -> Tensor:
        """Which of the decoded tokens `known` bool `[B, n]` are replaced by the model's best, where it `differs`."""
        assert self.settings.edit_threshold is not None
        found = known & differs & (confidence > self.settings.edit_threshold)
        self.edited = found.any(1)
        return found
