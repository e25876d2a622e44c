"""MMaDA's tasks for `run_task`: pictures from words, questions about pictures, text, and any part of both.

    rows = MMaDARows(vocabulary, encode)
    result = run_task(model, vocabulary, rows.text_to_image(["a red fox"]), seeds=[0])
    tokenizer.decode(result.codes[0][0][None])

The rows are those of `MMaDAPrompts`; pictures are squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unidiff.decoding.config import SamplerConfig
from unidiff.families.mmada.prompts import MMaDAPrompts, mmada_batch
from unidiff.families.mmada.sampling import ImageSettings, answer_config, image_config
from unidiff.families.rows import hidden_text, pieces_batch, text_piece
from unidiff.families.tasks import Encode, Prompt, TaskRequest, hide_codes, image_ids, prompt_ids, text_targets
from unidiff.tokens import Modality, TokenBatch, Vocabulary


@dataclass(frozen=True)
class MMaDARows:
    """Builds the requests of an MMaDA model; a prompt is a string or ids.

    Args:
        vocabulary: of the model.
        encode: text to ids without special ones.
        text_length: tokens of a caption, bos and eos included.
        side: rows and columns of a picture (512 pixels: 32).
        image, text: settings; None for upstream's.
    """

    vocabulary: Vocabulary
    encode: Encode | None = None
    text_length: int = 128
    side: int = 32
    image: ImageSettings | None = None
    text: SamplerConfig | None = None

    def text_to_image(
        self, prompts: Sequence[Prompt], codes: Tensor | None = None, holes: Tensor | None = None
    ) -> TaskRequest:
        """Draw pictures, or with `codes` `[B, h, w]` paint their `holes` (bool, same shape)."""
        if (codes is None) != (holes is None):
            raise ValueError("codes and holes belong together; give both to paint a part of known pictures")
        words = [self._words(prompt) for prompt in prompts]
        image = self._canvas(len(words), codes, holes)
        nothing: list[list[int]] = [[]] * len(words)
        batch, empty = self._rows(words, image), self._rows(nothing, image)
        settings = self.image or ImageSettings()
        others = (empty,) if settings.guidance > 0 else ()
        return TaskRequest(batch, image_config(settings), torch.zeros_like(batch.given), others)

    def understand(self, codes: Tensor, questions: Sequence[Prompt], answer_length: int = 256) -> TaskRequest:
        """Answer questions about pictures int64 `[B, h, w]`; strings are put into the chat template."""
        texts = [self.ids(question) for question in questions]
        longest = max((len(text) for text in texts), default=0)
        prompts = MMaDAPrompts(self.vocabulary, max(longest, self.text_length))
        batch = prompts.question(image_ids(codes, self.vocabulary).flatten(1), texts, answer_length)
        return TaskRequest(batch, self._answers(answer_length), text_targets(batch))

    def chat(self, questions: Sequence[Prompt], answer_length: int = 256) -> TaskRequest:
        """Answer in text alone; strings are put into the chat template."""
        rows = [[text_piece(self.ids(question)), hidden_text(answer_length, self.vocabulary)] for question in questions]
        batch = pieces_batch(rows)
        return TaskRequest(batch, self._answers(answer_length), text_targets(batch))

    def inpaint(self, prompts: Sequence[Sequence[int]], codes: Tensor, holes: Tensor) -> TaskRequest:
        """Fill [MASK] in captions of ids and `holes` in pictures together, free-form and without guidance.

        The model was trained on either part alone, with the same [MASK].
        """
        image = self._canvas(len(prompts), codes, holes)
        batch = self._rows([list(prompt) for prompt in prompts], image)
        s = self.vocabulary.specials
        marks = torch.tensor([s[name] for name in ("t2i", "bos", "eos", "soi", "eoi", "ipad")])
        words = batch.is_modality(Modality.TEXT) & ~torch.isin(batch.ids, marks)
        text = self._answers(1).text
        text = replace(text, forbid=tuple(sorted({*text.forbid, s["eos"], s["eot"]})), block_length=None)
        image_settings = image_config(replace(self.image or ImageSettings(), guidance=0.0)).image
        return TaskRequest(batch, SamplerConfig(text, image_settings, stop_at_eos=False), words)

    def ids(self, question: Prompt) -> list[int]:
        """A question in the chat template, with bos; ids are taken as they are."""
        if not isinstance(question, str):
            return prompt_ids(question, None)
        if not question.strip():
            raise ValueError("the question is empty; write at least one word")
        s = self.vocabulary.specials
        ids = [s["bos"]]
        for role, words in (
            ("user", f"\n{question}<eot_id>"),
            ("assistant", "\n"),
        ):  # "<eot_id>" is upstream's spelling
            ids += [s["start_header"], *prompt_ids(role, self.encode), s["end_header"], *self._plain(words)]
        return ids

    def _plain(self, words: str) -> list[int]:
        assert self.encode is not None  # prompt_ids has refused otherwise
        return list(self.encode(words))

    def _words(self, prompt: Prompt) -> list[int]:
        words = prompt_ids(prompt, self.encode)
        if not words:
            raise ValueError("the prompt is empty; write at least one word")
        return words

    def _canvas(self, rows: int, codes: Tensor | None, holes: Tensor | None) -> Tensor:
        """Image ids `[B, N]`, [MASK] where to decode."""
        if codes is None:
            return torch.full((rows, self.side**2), self.vocabulary.image_mask)
        if codes.shape != (rows, self.side, self.side):
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected {(rows, self.side, self.side)}")
        return hide_codes(image_ids(codes, self.vocabulary), holes, self.vocabulary)[0].flatten(1)

    def _rows(self, texts: Sequence[Sequence[int]], image: Tensor) -> TokenBatch:
        rows = MMaDAPrompts(self.vocabulary, self.text_length).text_to_image(texts, image)
        return mmada_batch(rows.ids, self.vocabulary, rows.visible)

    def _answers(self, answer_length: int) -> SamplerConfig:
        if self.text is not None:
            return self.text
        steps, block_length = max(1, answer_length // 2), max(1, answer_length // 4)  # upstream's
        config = answer_config(self.vocabulary, steps, block_length)
        return replace(config, ends=(self.vocabulary.specials["eot"],))
