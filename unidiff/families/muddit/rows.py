"""Muddit's and Meissonic's rows: a text of the encoder's length, then the grid of codes; all rows of a call are alike.

    picture     bos words eos pad...      codes, hidden or with holes; guided away from the empty or a negative prompt
    caption     hidden words              codes
    answer      bos question hidden words codes

Padding is ordinary text that the encoder reads. Text is never guided.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.commit.base import take_best
from unidiff.decoding.draw import UNMASK, RowNoise
from unidiff.diffusion.schedules import get_schedule
from unidiff.errors import read_json
from unidiff.families.layout import (
    DecodeRequest,
    Encode,
    Grid,
    Prepared,
    RowLayout,
    TaskInputs,
    TaskNeeds,
    check_compat,
    hidden_words,
    lay_out,
)
from unidiff.families.muddit.denoiser import MASK_EMBEDDING, ClipText, MudditConditions, MudditDenoiser
from unidiff.tokens import Modality, Span, Vocabulary

MASKING_SCHEDULES = ("cosine", "linear")


class TextMarks(NamedTuple):
    """Ids that begin and end a text, and that it is filled up with."""

    bos: int
    eos: int
    pad: int

    @classmethod
    def of(cls, folder: Path, tokenizer: Any) -> TextMarks:
        """Of the tokenizer in a folder; `ValueError` where it names one of them not."""
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in cls._fields}
        if absent := [name for name, i in ids.items() if i is None]:
            raise ValueError(f"{folder / 'tokenizer'} names no {absent[0]}_token, which CLIP's texts need; name one")
        return cls(**ids)


def scheduler_masking(folder: Path) -> str:
    """The schedule that a folder's `scheduler` names; cosine where there is none."""
    path, name = folder / "scheduler" / "scheduler_config.json", "cosine"
    if os.path.lexists(path):
        config = read_json(path, "a scheduler's config")
        if not {"_class_name", "masking_schedule"} & set(config):
            raise ValueError(f"{path} is no scheduler's config: it names neither _class_name nor masking_schedule")
        name = config.get("masking_schedule", name)
    if name not in MASKING_SCHEDULES:
        raise ValueError(f"{folder}: masking_schedule is {name!r:.80}; expected one of {list(MASKING_SCHEDULES)}")
    return name


@dataclass
class MaskGit:
    """A `CommitRule` for one request: it counts the passes that it is asked in.

    Args:
        steps: N. first: the step of the first pass; as much is hidden then as the steps before it leave.
        schedule: name of the share that is still hidden.
        upstream: None, or how many positions each row has, known ones included: the defects of the reference (Muddit,
            Meissonic, aMUSEd). Counts are rounded in float32 and are shares of all positions: of text, or of images times
            the share that is hidden at the start, which is the mean over the batch. At least one position stays hidden
            until the last step, and fewer than planned where confidences tie. tau_k is 0 in the last step, not behind it.
        text: of `upstream`, whether the positions are text.
        temperature: tau of the first step, with `upstream`; that of the settings.
    """

    steps: int
    first: int = 0
    schedule: str = "cosine"
    upstream: int | None = None
    text: bool = False
    temperature: float = 2.0
    _made: int = field(default=0, init=False)
    _start: Tensor | None = field(default=None, init=False)

    def __call__(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """See `CommitRule`."""
        hidden, step = is_real.sum(1), self.first + self._made
        self._made += 1
        start = self._start = hidden if self._start is None else self._start
        if step + 1 >= self.steps:
            return is_real
        if self.upstream is not None:
            return self._reference(confidence, score, is_real, start, step)
        share, begin = (self._share(done, torch.float64) for done in (step + 1, self.first))
        keep = torch.minimum((start * share / begin + 1e-9).floor().long(), hidden - 1)
        return take_best(score, is_real, hidden - keep)

    def _share(self, done: int, dtype: torch.dtype) -> Tensor:
        return get_schedule(self.schedule).masked_share(torch.tensor(done / self.steps, dtype=dtype))

    def _reference(self, confidence: Tensor, score: Tensor, is_real: Tensor, start: Tensor, step: int) -> Tensor:
        assert self.upstream is not None
        begin = self._share(self.first, torch.float32)
        ratio = torch.ones(()) if self.text else (start / self.upstream).mean() / begin.to(start.device)
        share = self._share(step + 1, torch.float32).to(ratio.device)
        planned = (self.upstream * (ratio * share)).floor().long().to(start.device)
        keep = torch.minimum(is_real.sum(1) - 1, planned).clamp_min(1)[:, None]  # [B, 1]
        certain, left = confidence.log(), 1 - step / (self.steps - 1)
        noise = (score - certain) / (1 - step / self.steps)  # the settings' falls to 0 behind the last step
        value = certain + left * noise if self.temperature else certain
        value = torch.where(is_real, value, torch.inf)
        cut = value.sort(dim=1).values.gather(1, keep.clamp_max(value.shape[1] - 1))
        return is_real & ~(value < cut)


def muddit_sampler(
    steps: int = 48, guidance: float = 9.0, temperature: float = 2.0, masking: str = "cosine"
) -> SamplerConfig:
    """The published settings: MaskGIT with a Gumbel noise on the ranking that falls from `temperature` to 0."""
    decoding = ModalityDecoding(steps=steps, schedule=masking, choice_temperature=temperature)
    return SamplerConfig(decoding, decoding, Guidance(guidance, hide="text", text_scale=1.0))


@dataclass(frozen=True)
class MeissonicLayout(RowLayout):
    """Pictures from words, and pictures repainted as told.

    Args:
        vocabulary: of the model. encode: text to ids without special ones.
        encoder: the text encoder. marks: ids around texts and behind them.
        told: time convention and micro conditions.
        config: sampler settings.
        usual: rows and columns of codes of a picture. fixed: those of every picture; None for the usual ones.
        compat: None, or "upstream" for the reference's commit rule with its defects, see `MaskGit`.
    """

    vocabulary: Vocabulary
    encode: Encode
    encoder: ClipText
    marks: TextMarks
    told: MudditConditions = field(default_factory=MudditConditions)
    config: SamplerConfig = field(default_factory=muddit_sampler)
    usual: Grid = (32, 32)
    fixed: Grid | None = None
    compat: str | None = None
    family: str = "meissonic"
    time: ClassVar[str] = "index"
    sizes: ClassVar[bool] = True
    strengths: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_compat(self.compat)

    @classmethod
    def of(cls, released: Any, texts: Any) -> RowLayout:
        """Of a loaded folder, which holds the text encoder; one called `1024` is for pictures of that size."""
        folder = released.folder
        if folder is None:
            raise ValueError(f"{released.family.name} needs its whole folder, with the text encoder; name that")
        encoder = ClipText.from_folder(folder, released.model.dtype)
        side = 64 if folder.resolve().name == "1024" else 32
        config = muddit_sampler(masking=scheduler_masking(folder))
        marks, told = TextMarks.of(folder, texts.tokenizer), MudditConditions(cls.time)
        return cls(released.vocabulary, texts.encode, encoder, marks, told, config, (side, side))

    @property
    def modules(self) -> dict[str, Any]:
        return {"text_encoder": self.encoder.encoder}

    @property
    def grid(self) -> Grid:
        return self.usual if self.fixed is None else self.fixed

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.texts is not None  # the pipeline gives them
        away = self._rows(inputs.negative or [""] * inputs.count, inputs)
        rows = self._rows(inputs.texts, inputs)
        return lay_out(rows, self.config, others=[away], drawn=True, strength=inputs.strength)

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        """Without a mask the whole picture. Holes in the words are filled with those in the picture, without guidance."""
        texts = [""] * inputs.count if inputs.texts is None else inputs.texts
        if not any(None in hidden_words(text, self.encode) for text in texts):
            return self.text_to_image(replace(inputs, texts=texts))
        if inputs.strength < 1:
            raise ValueError("strength is for pictures whose words are known; leave it out, or the holes in the text")
        self.check_writes()
        config, needs = replace(self.config, guidance=Guidance()), TaskNeeds(self.marks[:2], stop_at_eos=False)
        return lay_out(self._rows(texts, inputs), config, needs)

    def check_writes(self) -> None:
        """Raise `ValueError` unless words can be decoded."""
        raise ValueError(f"{self.family} reads words and writes none; give texts without <mask> holes")

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        settings, targets = {Modality.TEXT: config.text, Modality.IMAGE: config.image}, request.batch.targets
        decoded = {m: own for m, own in settings.items() if bool((targets & request.batch.is_modality(m)).any())}
        steps = passes = max(own.steps for own in decoded.values())
        rules: dict[Modality, Any] = {}
        if request.strength < 1:
            passes = int(steps * request.strength)
            if passes < 1:
                raise ValueError(f"strength = {request.strength} runs none of {steps} steps; give more of either")
            request, config, rules = self._begun(request, config, seeds, steps, passes)
        elif self.compat is not None:
            for modality, own in decoded.items():
                count = int((request.batch.modality[0] == modality).sum())
                text = modality == Modality.TEXT
                rules[modality] = MaskGit(own.steps, 0, own.schedule, count, text, own.choice_temperature)
        parts, device = (pipe.transformer, self.encoder, self.vocabulary), request.batch.ids.device
        empty, texts = torch.tensor(self._known([]), device=device), None
        if Modality.TEXT not in decoded:
            length = self.encoder.length
            texts = torch.cat(
                [empty[None], *(rows.ids[:, :length] for rows in (request.batch, *request.unconditional))]
            )
        model = MudditDenoiser(*parts, steps, passes, self.told, pipe.images.factor, empty, texts)
        return Prepared(model, request, config, rules)

    def _begun(
        self, request: DecodeRequest, config: SamplerConfig, seeds: Tensor, steps: int, passes: int
    ) -> tuple[DecodeRequest, SamplerConfig, dict[Modality, Any]]:
        """The last passes of so many steps: codes are hidden by a coin each, as many as the steps before would leave."""
        first, batch, own = steps - passes, request.batch, config.image
        image = batch.is_modality(Modality.IMAGE)
        coins = RowNoise(seeds.to(image.device), image)(first, UNMASK)
        share = get_schedule(own.schedule).masked_share(torch.tensor(first / steps, dtype=torch.float64))
        kept = image & (coins >= share)
        batch, *others = (rows.replace(given=rows.given | kept) for rows in (batch, *request.unconditional))
        rules = {Modality.IMAGE: MaskGit(steps, first, own.schedule)} if own.rule == self.config.image.rule else {}
        own = replace(own, steps=passes, choice_temperature=own.choice_temperature * passes / steps)
        return replace(request, batch=batch, unconditional=tuple(others)), replace(config, image=own), rules

    def _rows(self, texts: Sequence[str], inputs: TaskInputs) -> list[list[Span]]:
        """Texts of the encoder's length beside the pictures."""
        rows = []
        for number, text in enumerate(texts):
            words = hidden_words(text, self.encode)
            front, back = Span.text([self.marks.bos], True), self._known(words)[1 + len(words) :]
            own = [Span.words(words, self.vocabulary, read=True)] if words else []
            rows.append([front, *own, Span.words(back, self.vocabulary), self._image(number, inputs)])
        return rows

    def _known(self, words: Sequence[int | None]) -> list[int | None]:
        """bos, words, eos and padding."""
        (bos, eos, pad), length, count = self.marks, self.encoder.length, len(words) + 2
        if count > length:
            much = f"a prompt has {count} tokens, start and end included"
            raise ValueError(f"{much}; the encoder reads {length}; shorten it")
        return [bos, *words, eos, *[pad] * (length - count)]

    def _image(self, number: int, inputs: TaskInputs) -> Span:
        if inputs.codes is None:
            return inputs.picture(number, self.vocabulary, inputs.grid or self.grid)
        span = Span.codes(inputs.codes[number], self.vocabulary, read=True)
        holes = None if inputs.holes is None else inputs.holes[number].cpu()
        given = torch.zeros_like(span.ids, dtype=torch.bool) if holes is None else ~holes
        return replace(span, given=given)  # hidden codes keep their ids, see `DecodeRequest.strength`


@dataclass(frozen=True)
class MudditLayout(MeissonicLayout):
    """Besides, captions and answers about pictures."""

    family: str = "muddit"
    time: ClassVar[str] = "fraction"

    @property
    def longest(self) -> int:
        return self.encoder.length

    @property
    def most(self) -> int:
        return self.encoder.length

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self._written([[]] * inputs.count, inputs)

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.texts is not None  # the pipeline gives them
        questions = [[self.marks.bos, *self.encode(text)] for text in inputs.texts]
        if (most := max(map(len, questions), default=0)) >= (length := self.encoder.length):
            left = f"leaves no room for an answer in {length}; shorten it to {length - 1} at most"
            raise ValueError(f"a question has {most} tokens and {left}")
        return self._written(questions, inputs)

    def _written(self, fronts: Sequence[Sequence[int]], inputs: TaskInputs) -> DecodeRequest:
        """Hidden words behind the beginning of each text; known padding behind the longest text that was asked for."""
        assert inputs.codes is not None  # the pipeline gives them
        self.check_writes()
        rows, length = [], self.encoder.length
        for number, front in enumerate(fronts):
            count = min(inputs.longest, length - len(front))
            fill = [self.marks.eos, *[self.marks.pad] * length][: length - len(front) - count]
            words = Span.words([None] * count, self.vocabulary, read=True)
            spans = (Span.text(front, True), words, Span.text(fill, True))
            image = Span.codes(inputs.codes[number], self.vocabulary, read=True)
            rows.append([*(span for span in spans if span.ids.numel()), image])
        return lay_out(rows, self.config, TaskNeeds(ends=(self.encoder.end_id,)))

    def check_writes(self) -> None:
        if not self.encoder.reads_masks:
            lacking = "writing needs the row of [MASK] in the text encoder, but there is no mask embedding"
            raise ValueError(f"{lacking}; put {MASK_EMBEDDING} into the folder or beside it")
