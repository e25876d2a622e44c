"""Lumina-DiMOO's tasks: pictures of any size, in- and outpainting, editing with two-way guidance, questions.

    prompt      <system> ... </system><user> words </user>        pictures go before the last id of the prompt
    picture     boi, then each row of codes and a newline, eoi
    answer      answer, a picture or text, /answer

The reference decodes one row at a time; here rows of any lengths and sizes go together, padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.mmada.sampling import answer_config
from unidiff.families.rows import Piece, hidden_text, image_piece, pieces_batch, text_piece
from unidiff.families.tasks import Encode, Prompt, TaskRequest, hide_codes, image_ids, prompt_ids, text_targets
from unidiff.tokens import TokenBatch, Vocabulary

MARKS = ("<system>", "</system>", "<user>", "</user>")
DRAW = "Generate an image according to the text prompt."
EDIT = "Generate an image applying the following editing instruction based on the original image."
ASK = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)


def lumina_image_sampler(steps: int = 64, guidance: float = 4.0, image_guidance: float | None = None) -> SamplerConfig:
    """Upstream's image settings. (Its noise on the ranking has a constant temperature 1; here it falls with time.)

    Args:
        guidance: g in cond + g (cond - uncond). image_guidance: the same for the direction without the input pictures.
    """
    further = () if image_guidance is None else (1 + image_guidance,)
    image = ModalityDecoding(steps=steps, schedule="cosine", choice_temperature=1.0)
    return SamplerConfig(image=image, guidance=Guidance(scale=1 + guidance, further=further))


@dataclass(frozen=True)
class LuminaRows:
    """Builds the requests of a Lumina-DiMOO model; a prompt is a string or ids of the words.

    Args:
        vocabulary: of the model.
        encode: text to ids without special ones.
        marks: ids of each of `MARKS`, where the tokenizer has ids of their own for them; None for `encode`.
        image, text: sampler settings; None for upstream's.
    """

    vocabulary: Vocabulary
    encode: Encode | None = None
    marks: Mapping[str, Sequence[int]] | None = None
    image: SamplerConfig | None = None
    text: SamplerConfig | None = None

    def text_to_image(
        self,
        prompts: Sequence[Prompt],
        size: tuple[int, int] | None = None,
        codes: Tensor | None = None,
        holes: Tensor | None = None,
        system: Prompt = DRAW,
    ) -> TaskRequest:
        """Draw pictures, or paint the `holes` of given ones: inside (inpainting) or around (outpainting).

        Args:
            size: (rows, columns) of codes, a sixteenth of the pixels; any.
            codes: int64 `[B, h, w]` instead of a size. holes: bool `[B, h, w]`, what to paint.

        Raises:
            ValueError: neither or both of size and codes, codes without holes, or a prompt that is empty.
        """
        ids, given = self._canvas(len(prompts), size, codes, holes)
        conditional = [self._prompt(system, self._words(prompt), ()) for prompt in prompts]
        nothing = self._prompt(system, [self.vocabulary.specials["uncondition"]], ())
        return self._picture(conditional, [[nothing] * len(prompts)], ids, given, self.image or lumina_image_sampler())

    def edit(
        self,
        codes: Tensor,
        prompts: Sequence[Prompt],
        size: tuple[int, int] | None = None,
        references: Tensor | None = None,
        holes: Tensor | None = None,
        system: Prompt = EDIT,
    ) -> TaskRequest:
        """Change pictures as told, guided in two directions: without the words and without the input pictures.

        Args:
            codes: int64 `[B, h, w]`. references: further pictures `[B, h', w']` (a style, a subject).
            size: of the result; None for that of `codes`.
            holes: bool `[B, h, w]`: the result is `codes` outside of them; None for all of it.
        """
        pictures = [image_ids(part, self.vocabulary) for part in (codes, references) if part is not None]
        if len(prompts) != len(codes):
            raise ValueError(f"{len(prompts)} prompts for {len(codes)} pictures; give one per picture")
        if holes is None:
            height, width = codes.shape[1:]
            ids, given = self._canvas(len(codes), size or (height, width), None, None)
        else:
            ids, given = self._canvas(len(codes), size, codes, holes)
        words = [self._words(prompt) for prompt in prompts]
        shown = [[part[row] for part in pictures] for row in range(len(codes))]
        nothing = [self.vocabulary.specials["uncondition"]]
        conditional = [self._prompt(system, own, seen) for own, seen in zip(words, shown, strict=True)]
        no_words = [self._prompt(system, nothing, seen) for seen in shown]
        no_picture = [self._prompt(system, own, ()) for own in words]
        config = self.image or lumina_image_sampler(guidance=2.5, image_guidance=4.0)
        if not config.guidance.further:
            raise ValueError(
                "editing is guided in two directions; pass image=lumina_image_sampler(..., image_guidance=...)"
            )
        return self._picture(conditional, [no_words, no_picture], ids, given, config)

    def understand(
        self, codes: Tensor, questions: Sequence[Prompt], answer_length: int = 256, system: Prompt = ASK
    ) -> TaskRequest:
        """Answer questions about pictures int64 `[B, h, w]`; a caption is the answer to a question for one."""
        if len(questions) != len(codes):
            raise ValueError(f"{len(questions)} questions for {len(codes)} pictures; give one per picture")
        ids, s = image_ids(codes, self.vocabulary), self.vocabulary.specials
        rows = []
        for question, picture in zip(questions, ids, strict=True):
            prompt = self._prompt(system, self._words(question), [picture])
            answer = [
                text_piece([s["answer"]]),
                hidden_text(answer_length, self.vocabulary),
                text_piece([s["end_answer"]]),
            ]
            rows.append([*prompt, *answer])
        batch = pieces_batch(rows, left=True)
        return TaskRequest(batch, self._text_settings(), text_targets(batch))

    def inpaint(
        self,
        prompts: Sequence[Sequence[int]],
        codes: Tensor,
        holes: Tensor,
        system: Prompt = DRAW,
    ) -> TaskRequest:
        """Fill [MASK] in prompts of ids and holes in pictures together, free-form and without guidance.

        The model was not trained for it: it was trained on either part alone, with the same [MASK].
        """
        ids, given = self._canvas(len(prompts), None, codes, holes)
        rows = [
            [*self._prompt(system, list(prompt), ()), *self._answer(*pair)]
            for prompt, pair in zip(prompts, zip(ids, given, strict=True), strict=True)
        ]
        batch = pieces_batch(rows, left=True)
        start = len(self._mark("<system>")) + len(self._words(system)) + len(self._mark("</system>"))
        start += len(self._mark("<user>"))
        stop = start + torch.tensor([len(prompt) for prompt in prompts])[:, None]
        place = batch.positions[..., 0]
        words = batch.valid & (place >= start) & (place < stop)
        text, image = self._text_settings(), self.image or lumina_image_sampler()
        never = {self.vocabulary.specials["eos"], *text.ends}
        text = replace(
            text, text=replace(text.text, forbid=tuple(sorted({*text.text.forbid, *never})), block_length=None)
        )
        return TaskRequest(batch, SamplerConfig(text.text, image.image, stop_at_eos=False), words)

    def _picture(
        self,
        conditional: Sequence[list[Piece]],
        others: Sequence[Sequence[list[Piece]]],
        ids: Tensor,
        given: Tensor,
        config: SamplerConfig,
    ) -> TaskRequest:
        answers = [self._answer(*pair) for pair in zip(ids, given, strict=True)]
        streams = [
            [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
            for prompts in (conditional, *others)
        ]
        length = max(sum(len(piece.ids) for piece in row) for rows in streams for row in rows)
        batch, *rest = (pieces_batch(rows, left=True, length=length) for rows in streams)
        return TaskRequest(batch, config, torch.zeros_like(batch.given), _unguided(config, rest))

    def _answer(self, ids: Tensor, given: Tensor) -> list[Piece]:
        s = self.vocabulary.specials
        picture = image_piece(ids, given, s["newline"])
        return [text_piece([s["answer"], s["boi"]]), picture, text_piece([s["eoi"], s["end_answer"]])]

    def _prompt(self, system: Prompt, words: Sequence[int], pictures: Sequence[Tensor]) -> list[Piece]:
        """The template with pictures (ids `[h, w]`) before its last id; [MASK] among the words is to be filled."""
        s = self.vocabulary.specials
        front = [*self._mark("<system>"), *self._words(system), *self._mark("</system>"), *self._mark("<user>")]
        ids = [*front, *words, *self._mark("</user>")]
        given = torch.tensor([i != self.vocabulary.mask_id for i in ids])
        shown = []
        for picture in pictures:
            shown += [text_piece([s["boi"]]), image_piece(picture, True, s["newline"]), text_piece([s["eoi"]])]
        return [text_piece(ids[:-1], given[:-1]), *shown, text_piece(ids[-1:])]

    def _mark(self, name: str) -> list[int]:
        if self.marks is not None:
            return list(self.marks[name])
        if self.encode is None:
            raise ValueError(f"the template needs ids for {name}; pass marks, or encode=tokenizer.encode")
        return list(self.encode(name))

    def _words(self, prompt: Prompt) -> list[int]:
        words = prompt_ids(prompt, self.encode)
        if not words:
            raise ValueError("the prompt is empty; write at least one word")
        return words

    def _canvas(
        self, rows: int, size: tuple[int, int] | None, codes: Tensor | None, holes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids and given of the pictures to decode, `[B, h, w]`."""
        if (size is None) == (codes is None):
            raise ValueError("give either the size (rows, columns) of a new picture, or codes and holes of a known one")
        if codes is None:
            assert size is not None
            if min(size) < 1 or holes is not None:
                raise ValueError(
                    f"size is {size} with holes {holes is not None}; expected at least (1, 1), without holes"
                )
            return torch.full((rows, *size), self.vocabulary.image_mask), torch.zeros(rows, *size, dtype=torch.bool)
        if len(codes) != rows or holes is None:
            raise ValueError(
                f"{len(codes)} pictures for {rows} prompts, holes given: {holes is not None}; give one each"
            )
        return hide_codes(image_ids(codes, self.vocabulary), holes, self.vocabulary)

    def _text_settings(self) -> SamplerConfig:
        if self.text is not None:
            return self.text
        s = self.vocabulary.specials
        ends = (s["end_answer"], s["answer_pad"])
        config = answer_config(self.vocabulary, steps=128, block_length=128)
        text = replace(config.text, forbid=tuple(i for i in config.text.forbid if i not in ends))
        return replace(config, text=text, ends=ends)


def _unguided(config: SamplerConfig, rest: Sequence[TokenBatch]) -> tuple[TokenBatch, ...]:
    """The unconditional rows that a config has a use for."""
    guidance = config.guidance
    return tuple(rest) if guidance.further or guidance.scale != 1 else ()
