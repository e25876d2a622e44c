"""Rows and decoding of LLaDA2.0 and 2.1: block after block of attention, with their programs' ways as a switch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import ChatLayout, chat_layout
from unidiff.families.layout import DecodeRequest, Prepared, TaskNeeds, check_compat, lay_out
from unidiff.families.llada.rows import as_upstream
from unidiff.families.llada2.soft_blocks import BlockWindow, SoftBlocks
from unidiff.families.llada_moe import LING_CHAT
from unidiff.tokens import Span, Vocabulary

BLOCK = 32
"""Positions of a block of attention, of all released weights; in no config."""


def llada2_sampler(
    vocabulary: Vocabulary,
    block_length: int = BLOCK,
    steps: int = 32,
    threshold: float = 0.95,
    least: int | None = None,
    edit_threshold: float | None = None,
    edit_passes: int = 16,
    stop_early: bool = True,
) -> SamplerConfig:
    """The decoding of LLaDA2.0, or with `edit_threshold` (0.9 upstream, for quality 0.5) that of LLaDA2.1.

    Marks that only occur in prompts are never emitted.

    Args:
        steps: passes of a block at most. threshold: all tokens above it are written, if these are as many as the quota.
        least: the quota of every pass, in place of that of `steps` (2.1: `num_to_transfer`, 1).
        edit_passes: over a block without masks (`max_post_steps`).
        stop_early: end at the first end of text; otherwise only when a block is complete (2.0 without `eos_early_stop`).
    """
    kept = vocabulary.specials.get("eos")
    marks = tuple(sorted({i for i in vocabulary.specials.values() if i != kept}))
    quota: dict[str, Any] = {"block_steps": steps}
    if edit_threshold is not None:
        quota = {"edit_threshold": edit_threshold, "edit_passes": edit_passes, "least_tokens": least or 1}
    elif least is not None:
        quota = {"least_tokens": least}
    text = ModalityDecoding(
        rule="at_least", threshold=threshold, temperature=0.0, block_length=block_length, block_order="aligned",
        forbid=marks, **quota,
    )  # fmt: skip
    return SamplerConfig(text=text, whole_blocks=not stop_early)


def block_answer(known: int, longest: int, block: int, vocabulary: Vocabulary) -> list[Span]:
    """Hidden words to read behind so many known tokens, and those up to the end of the last block of attention."""
    hidden = [Span.words([None] * longest, vocabulary, read=True)]
    if rest := -(known + longest) % block:
        hidden.append(Span.words([None] * rest, vocabulary))
    return hidden


@dataclass(frozen=True)
class BlockChatLayout(ChatLayout):
    """Answers to the end of their last block of attention, of which the tokens asked for are read. No holes are filled: a block
    does not see what stands behind it.

    Args:
        compat: None, or "upstream": any id may be written, [MASK] too, which uses up quota and may stay; only end-of-text ends an
            answer.
        soft_blocks: with `compat`, attention as the file of LLaDA2.1 is reported to compute it, see `SoftBlocks`.
    """

    compat: str | None = None
    soft_blocks: bool = False

    def __post_init__(self) -> None:
        check_compat(self.compat)
        if self.soft_blocks and self.compat is None:
            raise ValueError("soft_blocks is a defect of the reference program; it goes with compat='upstream'")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task in super().tasks if task != "infill")

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        if self.compat is None:
            return super().prepared(pipe, request, config, seeds)
        if not self.soft_blocks:
            return Prepared(pipe.transformer, request, as_upstream(config))
        model = SoftBlocks(pipe.transformer)
        return Prepared(model, request, as_upstream(config), policy=BlockWindow(model))

    def _go_on(self, prompts: Sequence[Sequence[int]], longest: int) -> DecodeRequest:
        block = self.config.text.block_length or 1
        rows = [[Span.text(p, True), *block_answer(len(p), longest, block, self.vocabulary)] for p in prompts]
        needs = TaskNeeds(self.never, self.ends) if self.compat is None else TaskNeeds()
        return lay_out(rows, self.config, needs, left=self.left)


def llada2_layout(released: Any, texts: Any) -> BlockChatLayout:
    """The layout of a loaded model and its tokenizer, in blocks of the model's attention."""
    made = chat_layout(LING_CHAT, "llada2")(released, texts)
    config = llada2_sampler(released.vocabulary, released.model.settings.block_length)
    parts = {name: getattr(made, name) for name in ("vocabulary", "encode", "family", "template")}
    return BlockChatLayout(config=config, paced=True, **parts)
