"""UniDisc's tasks: a caption with `<m>` holes and an image, any part of which is decoded with the rest given.

    static          bos words eos pad...                                 codes         (text_length + side^2 tokens)
    interleaved     bos system eos words <image> codes eos                             (padding is invisible)

Static padding is ordinary text that attention sees, so a row has one length and a finished text is followed by padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.tasks import Encode, Prompt, TaskRequest, hide_codes, image_ids, prompt_ids
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

SYSTEM = "You are a highly intelligent multimodal AI with the ability to analyze and generate images."
PAD = 0  # LLaMA-2's <unk>, which fills the static text
_HOLE = re.compile(r"<m(\d*)>")


def unidisc_sampler(steps: int = 50, guidance: float = 3.0, ramp: bool = True) -> SamplerConfig:
    """UniDisc's default sampler: MaskGIT with Gumbel noise 4.5 t on the ranking, weight `guidance` (1 - t).

    Args:
        steps: passes. guidance: w in (1 + w) cond - w uncond, where uncond hides everything given; 0 for none.
        ramp: the weight grows with progress; False for a constant one.
    """
    decoding = ModalityDecoding(steps=steps, rule="quota", schedule="cosine", choice_temperature=4.5)
    mode = "ramp" if ramp else "constant"
    return SamplerConfig(decoding, decoding, Guidance(scale=1 + guidance, mode=mode, hide="given"))


@dataclass(frozen=True)
class UniDiscRows:
    """Builds the requests of a UniDisc model; a prompt is a string or ids.

    Args:
        vocabulary: of the model.
        encode: text to ids without special ones (`TextTokenizer(...).encode`).
        side: rows and columns of an image.
        text_length: static layout: tokens of the text, bos and eos included. Interleaved: the most a caption may have.
        interleaved: the layout; `unidisc_interleaved(config)` says which.
        system: the sentence of the interleaved layout.
        config: sampler settings.
    """

    vocabulary: Vocabulary
    encode: Encode | None = None
    side: int = 16
    text_length: int = 128
    interleaved: bool = False
    system: Prompt = SYSTEM
    config: SamplerConfig | None = None

    def text_to_image(
        self, prompts: Sequence[Prompt], codes: Tensor | None = None, holes: Tensor | None = None
    ) -> TaskRequest:
        """Draw images, or with `codes` `[B, h, w]` the parts of them at `holes` (bool, same shape).

        Raises:
            ValueError: a prompt with holes or one that does not fit, or `codes` without `holes`.
        """
        slots = [self._slot(prompt) for prompt in prompts]
        if any(None in slot for slot in slots):
            raise ValueError("a prompt has <m> holes, which text_to_image does not fill; use inpaint")
        if codes is not None and holes is None:
            raise ValueError("codes are given but nothing to paint; pass holes, bool of the same shape")
        return self._request(slots, codes, holes)

    def caption(self, codes: Tensor, max_text_tokens: int = 64) -> TaskRequest:
        """Describe images: int64 codes `[B, h, w]`. A text ends before its first end-of-text."""
        return self._request([self._unknown(max_text_tokens)] * len(codes), codes, None, open_text=True)

    def inpaint(
        self, prompts: Sequence[Prompt], codes: Tensor | None = None, holes: Tensor | None = None
    ) -> TaskRequest:
        """Fill `<m>` (one token) and `<m5>` (five) in captions and `holes` in images together.

        Args:
            prompts: with holes or without; as ids, [MASK] is a hole.
            codes: int64 `[B, h, w]`; None for images of unknown content.
            holes: bool `[B, h, w]`; None for images that are given.

        Raises:
            ValueError: a prompt that does not fit, or another shape.
        """
        return self._request([self._slot(prompt) for prompt in prompts], codes, holes)

    def generate(self, count: int, max_text_tokens: int = 64) -> TaskRequest:
        """Captions and images of unknown content, `count` pairs."""
        request = self._request([self._unknown(max_text_tokens)] * count, None, None, open_text=True)
        guidance = replace(request.config.guidance, hide="other")
        return replace(request, config=replace(request.config, guidance=guidance))

    @property
    def room(self) -> int:
        """Most tokens that a caption can have."""
        return self.text_length - (0 if self.interleaved else 2)  # bos, eos

    def _unknown(self, count: int) -> list[int | None]:
        """A text of at most `count` words and, in the static layout, its end."""
        if not 1 <= count <= self.room:
            raise ValueError(f"max_text_tokens is {count}; expected a number from 1 to {self.room}")
        return [None] * (count if self.interleaved else count + 1)

    def _slot(self, prompt: Prompt) -> list[int | None]:
        """Ids of the words, None for a hole."""
        words: list[int | None] = []
        if isinstance(prompt, str):
            place = 0
            for hole in [*_HOLE.finditer(prompt), None]:
                piece = prompt[place : None if hole is None else hole.start()].strip()
                words += prompt_ids(piece, self.encode) if piece else []
                if hole is not None:
                    words += [None] * int(hole[1] or 1)
                    place = hole.end()
        else:
            words += [None if i == self.vocabulary.mask_id else i for i in prompt_ids(prompt, None)]
        if not words:
            raise ValueError("the prompt is empty; write at least one word, or <m> for a hole")
        if len(words) > self.room:
            raise ValueError(f"the prompt has {len(words)} tokens, but {self.room} fit; shorten it")
        return words

    def _request(
        self,
        slots: Sequence[Sequence[int | None]],
        codes: Tensor | None,
        holes: Tensor | None,
        open_text: bool = False,
    ) -> TaskRequest:
        grid = (len(slots), self.side, self.side)
        if codes is None:
            if holes is not None:
                raise ValueError("holes are given without codes; give the codes of the images")
            ids, given = torch.full(grid, self.vocabulary.image_mask), torch.zeros(grid, dtype=torch.bool)
        else:
            if tuple(codes.shape) != grid:
                raise ValueError(f"codes have shape {tuple(codes.shape)}; expected {grid}")
            ids, given = hide_codes(image_ids(codes, self.vocabulary), holes, self.vocabulary)
        images = [Span.image(*pair) for pair in zip(ids, given, strict=True)]
        rows = [self._row(slot, image, open_text) for slot, image in zip(slots, images, strict=True)]
        batch = TokenBatch.from_spans(rows)
        return TaskRequest(batch, self._settings(open_text), self._words(batch, slots))

    def _row(self, slot: Sequence[int | None], image: Span, open_text: bool) -> list[Span]:
        s = self.vocabulary.specials
        words = Span.text(
            [self.vocabulary.mask_id if i is None else i for i in slot], torch.tensor([i is not None for i in slot])
        )
        if self.interleaved:
            front = [s["bos"], *prompt_ids(self.system, self.encode), s["eos"]]
            return [Span.text(front, True), words, Span.text([s["image"]], True), image, Span.text([s["eos"]], True)]
        end = [] if open_text else [s["eos"]]
        fill = [PAD] * (self.text_length - 1 - len(end) - len(slot))
        return [Span.text([s["bos"]], True), words, Span.text([*end, *fill], True), image]

    def _words(self, batch: TokenBatch, slots: Sequence[Sequence[int | None]]) -> Tensor:
        start = 1 + (1 + len(prompt_ids(self.system, self.encode)) if self.interleaved else 0)
        place = batch.positions[..., 0]
        stop = start + torch.tensor([len(slot) for slot in slots])[:, None]
        return batch.is_modality(Modality.TEXT) & (place >= start) & (place < stop)

    def _settings(self, open_text: bool) -> SamplerConfig:
        """Prompt marks are never emitted, nor end-of-text in holes of a fixed number of tokens."""
        config = unidisc_sampler() if self.config is None else self.config
        s = self.vocabulary.specials
        never = {PAD, s["bos"], *(() if open_text else (s["eos"],)), *((s["image"],) if self.interleaved else ())}
        text = replace(config.text, forbid=tuple(sorted(never | set(config.text.forbid))))
        fill = None if self.interleaved else PAD
        return replace(config, text=text, stop_at_eos=open_text, fill=fill)
