"""MMaDA's rows for every task, from the ids that a text tokenizer returned and image ids (code + offset).

    text-to-image       [iPAD]... <t2i> bos text eos soi image eoi      the text part is `text_length` + 1 long
    understanding       <mmu> soi image eoi bos text eos eos...         the text part is `text_length` long
    text                bos text eos eos...
    reasoning to image  <r2i> bos text eos eos... soi image eoi         the text part is `text_length` long

A text keeps a bos of its own. Left [iPAD]s are batch padding; eos filling is real: visible and a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

IGNORED = -100
QUESTION = "<|start_header_id|>user<|end_header_id|>\n{}<eot_id><|start_header_id|>assistant<|end_header_id|>\n"


@dataclass(frozen=True)
class PromptRows:
    """Rows of one task, all `[B, L]`.

    Attributes:
        ids, labels: int64; labels are -100 where nothing is learnt.
        visible: bool, False on [iPAD].
        prompt: bool, what noising leaves alone: task id, image marks, the given image, and the text up to and including
            the last end_header id. All False where the task has no such mask (text-to-image masks codes only).
    """

    ids: Tensor
    labels: Tensor
    visible: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class MMaDAPrompts:
    """Builds rows.

    Args:
        vocabulary: with MMaDA's specials.
        text_length: tokens of a text, bos and eos included (upstream `max_text_len`).
        overflow: a text that does not fit: "error", or "cut" (upstream; its last id becomes eos).
    """

    vocabulary: Vocabulary
    text_length: int
    overflow: str = "error"

    def __post_init__(self) -> None:
        if self.overflow not in ("error", "cut"):
            raise ValueError(f"overflow is {self.overflow!r}; expected 'error' or 'cut'")
        if self.text_length < 3:
            raise ValueError(f"text_length is {self.text_length}; bos, one token and eos need at least 3")

    def text_to_image(
        self,
        texts: Sequence[Sequence[int]],
        image_ids: Tensor,
        labels: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> PromptRows:
        """Caption, then image.

        Args:
            texts: ids per row. image_ids: int64 `[B, N]`, [MASK] where hidden.
            labels: int64 `[B, N]`, of the image; None for -100 everywhere.
            dropped: bool `[B]`, rows without their caption (guidance training, or the unconditional stream).
        """
        _check_rows(texts, image_ids)
        s, width = self.vocabulary.specials, self.text_length + 1
        rows = []
        for i, text in enumerate(texts):
            body = [s["bos"], s["eos"]] if dropped is not None and bool(dropped[i]) else self._closed(text, width - 1)
            part = [s["t2i"], *body]
            rows.append([s["ipad"]] * (width - len(part)) + part)
        head = torch.tensor(rows, device=image_ids.device)  # [B, width]
        soi, eoi = self._column("soi", image_ids), self._column("eoi", image_ids)
        ids = torch.cat((head, soi, image_ids, eoi), dim=1)
        labels = torch.full_like(image_ids, IGNORED) if labels is None else labels
        targets = torch.cat((head.masked_fill(head == s["ipad"], IGNORED), soi, labels, eoi), dim=1)
        return PromptRows(ids, targets, ids != s["ipad"], torch.zeros_like(ids, dtype=torch.bool))

    def understanding(self, image_ids: Tensor, texts: Sequence[Sequence[int]]) -> PromptRows:
        """Image, then question and answer (or caption): for training."""
        _check_rows(texts, image_ids)
        text = self._filled(texts, self.text_length, close=True, device=image_ids.device)
        front = self._image_front(image_ids)
        ids = torch.cat((front, text), dim=1)
        labels = torch.cat((torch.full_like(front, IGNORED), text), dim=1)
        prompt = torch.cat((torch.ones_like(front, dtype=torch.bool), self._asked(text)), dim=1)
        return PromptRows(ids, labels, torch.ones_like(prompt), prompt)

    def text(self, texts: Sequence[Sequence[int]], length: int) -> PromptRows:
        """Text or chat rows of `length` tokens. A cut row has no eos, as upstream."""
        ids = self._filled(texts, length, close=False, device=None)
        return PromptRows(ids, ids.clone(), torch.ones_like(ids, dtype=torch.bool), self._asked(ids))

    def reasoning_to_image(self, texts: Sequence[Sequence[int]], image_ids: Tensor) -> PromptRows:
        """Question and reasoning, then image. A text without an end_header id is all prompt."""
        _check_rows(texts, image_ids)
        text = self._filled(texts, self.text_length, close=True, device=image_ids.device)
        task, soi, eoi = (self._column(name, image_ids) for name in ("r2i", "soi", "eoi"))
        ids = torch.cat((task, text, soi, image_ids, eoi), dim=1)
        asked = self._asked(text)
        asked = asked | ~asked.any(1, keepdim=True)
        one = torch.ones_like(asked[:, :1])
        prompt = torch.cat((one, asked, one, torch.zeros_like(image_ids, dtype=torch.bool), one), dim=1)
        return PromptRows(ids, ids.clone(), torch.ones_like(prompt), prompt)

    def question(self, image_ids: Tensor, texts: Sequence[Sequence[int]], answer_length: int) -> TokenBatch:
        """Requests for the sampler: image and question given, `answer_length` hidden tokens; shorter rows are padded.

        Raises:
            ValueError: an image that is no square grid, or a question longer than `text_length` (never cut).
        """
        _check_rows(texts, image_ids)
        s, side = self.vocabulary.specials, math.isqrt(image_ids.shape[1])
        if side * side != image_ids.shape[1]:
            raise ValueError(f"an image of {image_ids.shape[1]} tokens is no square grid; MMaDA images are square")
        rows = []
        for image, text in zip(image_ids, texts, strict=True):
            if len(text) > self.text_length:
                raise ValueError(f"the question has {len(text)} tokens; at most {self.text_length} fit, so shorten it")
            rows.append(
                [
                    Span.text([s["mmu"], s["soi"]], True),
                    Span.image(image.reshape(side, side), True),
                    Span.text([s["eoi"], *text], True),
                    Span.masked_text(answer_length, self.vocabulary),
                ]
            )
        return TokenBatch.from_spans(rows)

    def _image_front(self, image_ids: Tensor) -> Tensor:
        task, soi, eoi = (self._column(name, image_ids) for name in ("mmu", "soi", "eoi"))
        return torch.cat((task, soi, image_ids, eoi), dim=1)

    def _column(self, special: str, like: Tensor) -> Tensor:
        return torch.full_like(like[:, :1], self.vocabulary.specials[special])

    def _opened(self, text: Sequence[int]) -> list[int]:
        bos = self.vocabulary.specials["bos"]
        return list(text) if len(text) and text[0] == bos else [bos, *text]

    def _closed(self, text: Sequence[int], length: int) -> list[int]:
        """bos text eos, at most `length` ids."""
        ids = [*self._opened(text), self.vocabulary.specials["eos"]]
        if len(ids) <= length:
            return ids
        self._refuse(len(ids), length)
        return [*ids[: length - 1], ids[-1]]

    def _filled(self, texts: Sequence[Sequence[int]], length: int, close: bool, device: torch.device | None) -> Tensor:
        eos, rows = self.vocabulary.specials["eos"], []
        for text in texts:
            ids = self._closed(text, length) if close else self._opened(text)
            if len(ids) > length:
                self._refuse(len(ids), length)
            rows.append((ids + [eos] * length)[:length])
        return torch.tensor(rows, device=device)

    def _refuse(self, found: int, length: int) -> None:
        if self.overflow == "error":
            raise ValueError(f"the text needs {found} tokens and {length} fit; shorten it")

    def _asked(self, text: Tensor) -> Tensor:
        """bool `[B, n]`: up to and including the last end_header id; nothing where there is none."""
        ends = text == self.vocabulary.specials["end_header"]
        return ends.flip(1).cummax(1).values.flip(1)


def _check_rows(texts: Sequence[Sequence[int]], image_ids: Tensor) -> None:
    if len(texts) != len(image_ids):
        raise ValueError(f"{len(texts)} texts for {len(image_ids)} images; give one per row")


def mmada_batch(ids: Tensor, vocabulary: Vocabulary, visible: Tensor | None = None) -> TokenBatch:
    """Rows as the network sees them: hidden positions are targets, the rest is given.

    Positions between soi and the next eoi are image tokens. Every position keeps its index in the row, padding included.

    Args:
        ids: int64 `[B, L]`.
        visible: bool `[B, L]`, False on padding; None for no padding.
    """
    visible = torch.ones_like(ids, dtype=torch.bool) if visible is None else visible.bool()
    opened = (ids == vocabulary.specials["soi"]).long().cumsum(1) - (ids == vocabulary.specials["soi"]).long()
    closed = (ids == vocabulary.specials["eoi"]).long().cumsum(1)
    image = (opened > closed) & visible  # [B, L]
    positions = ids.new_zeros(*ids.shape, 3)
    positions[..., 0] = torch.arange(ids.shape[1], device=ids.device)
    counts = image.sum(1, keepdim=True)
    side = counts.double().sqrt().long().clamp_min(1)  # [B, 1]
    grid = image & (counts == side * side)  # rows whose picture is one square
    code = (image.long().cumsum(1) - 1).clamp_min(0)
    positions[..., 1] = torch.where(grid, code // side, 0)
    positions[..., 2] = torch.where(grid, code % side, 0)
    modality = torch.where(image, int(Modality.IMAGE), int(Modality.TEXT))
    given = ids != vocabulary.mask_id
    return TokenBatch(ids, modality, given, visible, positions, torch.where(visible, 0, -1))
