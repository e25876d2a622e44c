"""D-DiT's rows: a text of fixed length, filled up with ends, and behind it the patches of a given picture.

    picture     words end end...                  (latents are drawn beside it)
    caption     hidden words                      patches
    answer      question, hidden words            patches

T5 reads all positions, fill included, as the network learned it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig, SamplerOutput
from unidiff.errors import read_json
from unidiff.families.ddit.denoiser import DualDenoiser, T5Text
from unidiff.families.ddit.upstream import substituted, written
from unidiff.families.layout import (
    DecodeRequest,
    Encode,
    Grid,
    Prepared,
    RowLayout,
    TaskInputs,
    TaskNeeds,
    hidden_words,
    lay_out,
)
from unidiff.schema import Index, Rows, check_fields, from_data
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary
from unidiff.tokens.image.latents import AutoencoderLatents, CodeLatents
from unidiff.tokens.image.vq import VQImageTokenizer

SETTINGS = "dual.json"
"""File of a folder whose model is not laid out as D-DiT's releases are."""


@dataclass(frozen=True)
class DualTexts:
    """How the texts of a model are laid out; the defaults are those of D-DiT's releases.

    Args:
        length: tokens of a prompt or a caption. answer_length: of a question and its answer.
        caption, question, answer: ids before a caption, before a question and behind it. Without `question` the question
            stands in the words "Q: ... A: ".
        hidden: the text that guidance leads away from is hidden words; otherwise it is empty.
        trained: tasks that the model learned.
        scale: of latents that are vectors of codes; None for those of an autoencoder.
    """

    length: Rows = 256
    answer_length: Rows = 128
    caption: tuple[Index, ...] = ()
    question: tuple[Index, ...] = ()
    answer: tuple[Index, ...] = ()
    hidden: bool = False
    trained: tuple[str, ...] = ("text_to_image", "caption", "answer")
    scale: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")

    @classmethod
    def of(cls, folder: Path) -> DualTexts:
        """What a folder says; the releases' settings where it says nothing. `ValueError` for a damaged file."""
        path = folder / SETTINGS
        if not os.path.lexists(path):
            return cls()
        try:
            return from_data(cls, read_json(path, "settings of a dual model"), "it")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def ddit_sampler(steps: int = 28, guidance: float = 7.0, passes: int = 64) -> SamplerConfig:
    """The published settings: Euler steps of pictures with their guidance, and words by the reverse process."""
    text = ModalityDecoding(rule="ancestral", steps=passes, schedule="linear", temperature=1.0)
    return SamplerConfig(text, ModalityDecoding(steps=steps), Guidance(guidance, text_scale=1.0))


def scheduler_of(folder: Path) -> Any:
    """The flow-matching scheduler that a folder names; SD3's (shift 3) where there is none."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    path = folder / "scheduler" / "scheduler_config.json"
    if not os.path.lexists(path):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    config = read_json(path, "a scheduler's config")
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        found = f"describes a {config.get('_class_name')!r:.80}"
        raise ValueError(f"{path} {found}; expected a FlowMatchEulerDiscreteScheduler")
    return FlowMatchEulerDiscreteScheduler.from_config(config)


@dataclass(frozen=True)
class DualLayout(RowLayout):
    """Pictures from words by flow matching, words about pictures by unmasking, and both together.

    Args:
        model, vocabulary: of the checkpoint. encode: text to ids without special ones. encoder: reads the texts.
        flow: scheduler of the pictures. texts: how texts are laid out. config: sampler settings.
        fixed: rows and columns of patches of every picture; None for those that the model is made for.
        compat: None, or "upstream" for the reference's way to write words, see `upstream.written`.
    """

    model: Any
    vocabulary: Vocabulary
    encode: Encode
    encoder: T5Text
    flow: Any
    texts: DualTexts = field(default_factory=DualTexts)
    config: SamplerConfig = field(default_factory=ddit_sampler)
    fixed: Grid | None = None
    compat: str | None = None
    family: str = "ddit"
    sizes: ClassVar[bool] = True
    latents: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.compat not in (None, "upstream"):
            raise ValueError(f"compat = {self.compat!r:.80}; expected None or 'upstream'")

    @classmethod
    def of(cls, released: Any, texts: Any) -> RowLayout:
        """Of a loaded folder, which holds the text encoder, and how texts are laid out where that is not the usual way."""
        folder, model = released.folder, released.model
        if folder is None:
            raise ValueError(f"{released.family.name} needs its whole folder, with the text encoder; name that")
        encoder = T5Text.from_folder(folder, model.dtype)
        vocabulary, own = released.vocabulary, DualTexts.of(folder)
        if encoder.width != model.config.text_dim or encoder.rows < vocabulary.size:
            raise ValueError(
                f"{folder / 'text_encoder'} has {encoder.rows} rows {encoder.width} wide; the network needs "
                f"{vocabulary.size} rows {model.config.text_dim} wide"
            )
        config = ddit_sampler() if own.scale is None else small_sampler()
        return cls(model, vocabulary, texts.encode, encoder, scheduler_of(folder), own, config)

    @property
    def modules(self) -> dict[str, Any]:
        return {"text_encoder": self.encoder.encoder}

    def denoiser(self, model: Any) -> DualDenoiser:
        """A network as the sampler asks it."""
        return DualDenoiser(model, self.encoder, self.vocabulary)

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        """See `RowLayout.prepared`."""
        return Prepared(self.denoiser(pipe.transformer), request, config)

    @property
    def grid(self) -> Grid:
        side = self.model.config.sample_size // self.model.config.patch_size
        return (side, side) if self.fixed is None else self.fixed

    @property
    def longest(self) -> int:
        return self.texts.length

    @property
    def most(self) -> int:
        return max(self.texts.length, self.texts.answer_length)

    def note(self, task: str) -> str:
        return (
            ""
            if task in self.texts.trained or task == "inpaint"
            else (f"this model never learned {task}: it learned {', '.join(self.texts.trained)}")
        )

    def pictures(self, images: Any) -> Any:
        if not isinstance(images, torch.nn.Module):
            return images
        if self.texts.scale is None:
            return AutoencoderLatents(images, self.model.config.patch_size)
        return CodeLatents(VQImageTokenizer(images), self.texts.scale)

    def check_parts(self, transformer: Any, images: Any, texts: Any) -> None:
        channels = transformer.config.in_channels
        if getattr(images, "channels", None) != channels:
            found = getattr(images, "channels", "no")
            raise ValueError(f"the autoencoder has {found} latent channels, but the model {channels}; give its own")
        if texts.size > self.encoder.rows:
            raise ValueError(f"the text tokenizer has {texts.size} ids, but T5 {self.encoder.rows}; give its own")

    def written(
        self, model: Any, batch: TokenBatch, config: SamplerConfig, seeds: Tensor, record: bool
    ) -> SamplerOutput:
        """Words as the reference writes them, see `unidiff.families.ddit.upstream`."""
        length, mask = int((batch.modality[0] == Modality.TEXT).sum()), self.vocabulary.mask_id
        denoiser = self.denoiser(model)

        def predict(ids: Tensor) -> Tensor:
            rows = torch.cat((ids, batch.ids[:, length:]), dim=1), batch.modality, batch.positions
            hidden = denoiser.hidden(*rows, features=batch.features)[:, :length]
            return substituted(denoiser.head(hidden), ids, mask)

        return written(predict, batch, mask, self.vocabulary.size, config.text.steps, seeds, record)

    def text_to_image(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.texts is not None  # the pipeline gives them
        rows = [self._told(self.encode(text)) for text in inputs.texts]
        away = [self._away(text) for text in inputs.negative or [""] * inputs.count]
        return lay_out(rows, self.config, others=[away], drawn=True)

    def caption(self, inputs: TaskInputs) -> DecodeRequest:
        return self._written([self.texts.caption] * inputs.count, inputs, self.texts.length)

    def answer(self, inputs: TaskInputs) -> DecodeRequest:
        assert inputs.texts is not None  # the pipeline gives them
        own = self.texts
        if own.question:
            fronts = [[*own.question, *self.encode(text), *own.answer] for text in inputs.texts]
        else:
            fronts = [[*self.encode(f"Q: {text} A: ")] for text in inputs.texts]
        if (most := max(map(len, fronts), default=0)) >= own.answer_length:
            raise ValueError(
                f"a question has {most} tokens and leaves no room for an answer in {own.answer_length}; shorten it"
            )
        return self._written(fronts, inputs, own.answer_length)

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        """Holes in pictures, in their words, or in both; without a text the words are hidden where the picture has no holes."""
        return self._both(inputs)

    def generate(self, inputs: TaskInputs) -> DecodeRequest:
        """A picture and its words together: the text has hidden words while the picture is noise."""
        return self._both(inputs)

    def known(self, inputs: TaskInputs) -> DecodeRequest:
        """Raise `ValueError`: its pictures are no tokens, so rows have no likelihood of tokens."""
        raise ValueError(
            f"scores are of models whose pictures are tokens, and those of {self.family} are latents; "
            "score with a model of another family"
        )

    def _both(self, inputs: TaskInputs) -> DecodeRequest:
        texts = inputs.texts
        if texts is None:
            count = self._room(inputs, self.texts.caption, self.texts.length)
            words: list[list[int | None]] = [[None] * count for _ in range(inputs.count)]
        else:
            words = [hidden_words(text, self.encode) for text in texts]
        rows = [self._row(self.texts.caption, own, self.texts.length) for own in words]
        drawn = inputs.codes is None or inputs.holes is not None
        if not drawn:
            rows = [[*row, self._patches(number, inputs)] for number, row in enumerate(rows)]
        away = [self._away(text) for text in inputs.negative or [""] * inputs.count]
        needs = TaskNeeds(self.texts.caption, stop_at_eos=texts is None)
        request = lay_out(rows, self.config, needs, others=[away] if drawn else ())
        hidden = bool(request.batch.targets.any())
        return replace(request, config=joint_sampler(self.config), drawn=not hidden) if drawn else request

    def _written(self, fronts: Sequence[Sequence[int]], inputs: TaskInputs, length: int) -> DecodeRequest:
        """Hidden words behind the beginning of each text, and the given pictures."""
        rows = []
        for number, front in enumerate(fronts):
            count = self._room(inputs, front, length)
            rows.append([*self._row(front, [None] * count, length), self._patches(number, inputs)])
        return lay_out(rows, self.config, TaskNeeds(ends=(self._end,)))

    def _room(self, inputs: TaskInputs, front: Sequence[int], length: int) -> int:
        return min(inputs.longest, length - len(front))

    @property
    def _end(self) -> int:
        return self.vocabulary.specials["eos"]

    def _told(self, words: Sequence[int]) -> list[Span]:
        return self._row(self.texts.caption, list(words), self.texts.length)

    def _away(self, text: str) -> list[Span]:
        if self.texts.hidden and not text.strip():
            front, mask = self.texts.caption, self.vocabulary.mask_id
            return [Span.text([*front, *[mask] * (self.texts.length - len(front))], True)]
        return self._told(self.encode(text) if text.strip() else [])

    def _row(self, front: Sequence[int], words: Sequence[int | None], length: int) -> list[Span]:
        """The beginning, words and ends up to `length`; the words are read back."""
        fill = length - len(front) - len(words)
        if fill < 0:
            raise ValueError(f"a text has {len(front) + len(words)} tokens, the model reads {length}; shorten it")
        parts = [Span.text([*front], True)] if front else []
        parts += [replace(Span.words(words, self.vocabulary), read=True)] if words else []
        return [*parts, *([Span.text([self._end] * fill, True)] if fill else [])]

    def _patches(self, row: int, inputs: TaskInputs) -> Span:
        assert inputs.codes is not None  # the pipeline gives them
        patches = self.model.patches(inputs.codes[row][None].float())[0].cpu()  # [h, w, C p p]
        return Span.continuous(patches, Modality.IMAGE)


def small_sampler() -> SamplerConfig:
    """Settings of small models of one's own: confident words first."""
    words = ModalityDecoding(rule="threshold", temperature=0.0)
    return SamplerConfig(words, ModalityDecoding(steps=16), Guidance(2.0, text_scale=1.0))


def joint_sampler(config: SamplerConfig) -> SamplerConfig:
    """Settings with which words are unmasked in the steps of the picture: a share t is hidden where its noise is at t."""
    text = replace(config.text, rule="quota", steps=config.image.steps, schedule="linear", temperature=1.0, top_p=0.9)
    return replace(config, text=text)


def to_data(texts: DualTexts) -> Mapping[str, Any]:
    """Plain data of settings, for `SETTINGS`."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(texts).items()}
