"""Words and a picture decoded together by one clock, as MMaDA-Parallel's models do (Tian et al. 2025, arXiv 2511.09611).

Model A has Lumina-DiMOO's rows and model M MMaDA's. Both programs have defects, which are off here; `compat` turns them on.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from unidiff.decoding.commit.base import BlockPass, NamedRule
from unidiff.decoding.commit.timed import Timed
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.draw import Choice
from unidiff.families.layout import DecodeRequest, Prepared, TaskInputs, TaskNeeds
from unidiff.families.llada.rows import WordsAndPictures
from unidiff.schema import Between, check_fields, short_value
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

DEFECTS: Mapping[str, str] = MappingProxyType(
    {
        "any_id": "words may be any id, image codes and [MASK] too: where [MASK] is drawn, nothing is written; no text ends early",
        "overwritten": "rows of guidance are the row itself, its beginning overwritten by another prompt, shorter or not",
        "late": "rows of guidance see the words of the pass, and the row itself does not yet",
        "inverted": "words are guided towards the row without a prompt",
        "all_counted": "known codes of a picture that is repainted count among those that stay hidden",
        "one_left": "the last code is not decoded but random",
        "always_drawn": "codes are drawn at temperature 0 too",
        "rounded": "how many stay hidden is rounded in float32 (codes) and without care for rounding (words)",
        "picture_order": "codes of a picture alone are committed by the counts and the noise of `unidiff.families.upstream_order`",
        "other_mark": "a picture without another one to change begins as one of text-to-image, and not as in training",
    }
)
"""What `compat` may name, or all of them as "upstream"."""
A_DEFECTS = ("any_id", "overwritten", "late", "all_counted", "one_left", "rounded")
M_DEFECTS = ("any_id", "inverted", "all_counted", "always_drawn", "rounded", "picture_order", "other_mark")
_Guided = Annotated[float, Between(0, 1e6)]
_Temperature = Annotated[float, Between(0, 1e30)]
_Passes = Annotated[int, Between(1, 100_000)]


def chosen_defects(compat: str | Sequence[str] | None, known: Sequence[str]) -> frozenset[str]:
    """The defects that a `compat` asks for; `ValueError` for one that is not `known`."""
    if compat is None or compat == "upstream":
        return frozenset(known if compat else ())
    named = [compat] if isinstance(compat, str) else list(compat)
    if wrong := next((name for name in named if name not in known), None):
        expected = f"None, 'upstream', or some of {', '.join(known)}"
        raise ValueError(f"compat is {short_value(wrong)}; expected {expected}")
    return frozenset(named)


@dataclass(frozen=True)
class JointSettings:
    """Settings of words and a picture that are decoded together.

    Args:
        steps: passes of the clock: words in all of them. image_steps: those that decode codes too, spread evenly from the
            share `first_pass` of them on.
        guidance: g in cond + g (cond - uncond), for codes. image_guidance: the same for the direction away from what comes
            without the given picture, where there is one. text_guidance: g for words.
        temperature: of the noise on which codes stay; 0 takes the best code, other numbers draw it. text_temperature: of the
            draw of words.
        random_words: whether words are written in random order, and not the surest first.
    """

    steps: _Passes = 128
    image_steps: _Passes = 64
    guidance: _Guided = 0.0
    image_guidance: _Guided = 4.0
    text_guidance: _Guided = 0.0
    temperature: _Temperature = 1.0
    text_temperature: _Temperature = 0.0
    random_words: bool = False
    first_pass: Annotated[float, Between(0, 1)] = 0.25

    def __post_init__(self) -> None:
        check_fields(self, "joint")

    def sampler(
        self, schedule: str, noise: str, defects: frozenset[str] = frozenset(), pictured: bool = False
    ) -> SamplerConfig:
        """For the sampler.

        Args:
            schedule: of words. noise: on codes, see `ModalityDecoding`. pictured: whether a second direction leads away from
                what comes without the given picture.
        """
        order = "random" if self.random_words else "probability"
        text = ModalityDecoding(self.steps, "timed", schedule, order, temperature=self.text_temperature)
        drawn = self.temperature > 0 or "always_drawn" in defects
        image = ModalityDecoding(
            self.steps,
            "timed",
            "cosine",
            temperature=1.0 if drawn else 0.0,
            choice_temperature=self.temperature,
            choice_noise=noise,
            own_passes=self.image_steps,
            first_pass=self.first_pass,
        )
        further = (1 + self.image_guidance,) if pictured else ()
        wrong = tuple(sorted(defects & {"late", "inverted"}))
        guidance = Guidance(1 + self.guidance, text_scale=1 + self.text_guidance, further=further, defects=wrong)
        return SamplerConfig(text, image, guidance)


class WholeTable(Vocabulary):
    """Words may be any id of the table (`any_id`)."""

    def range_of(self, modality: Modality | int) -> tuple[int, int]:
        return (0, self.size) if modality == Modality.TEXT else self.image

    def forbidden(self, modality: Modality | int) -> tuple[int, ...]:
        return () if modality == Modality.TEXT else super().forbidden(modality)

    def __reduce__(self) -> tuple:
        return WholeTable.from_dict, (self.to_dict(),)


class AnswersTogether(WordsAndPictures):
    """Layouts whose `generate` and `edit` answer a prompt in a picture and words together.

    Attributes:
        joint: settings of these. compat: the defects that are on, see `chosen_defects`.
        known_defects: names of `DEFECTS` that the reference program has.
    """

    joint: JointSettings
    compat: str | Sequence[str] | None
    known_defects: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        chosen_defects(self.compat, self.known_defects)

    @property
    def defects(self) -> frozenset[str]:
        """Those that are on."""
        return chosen_defects(self.compat, self.known_defects)

    def generate(self, inputs: TaskInputs) -> DecodeRequest:
        """A picture and words as a prompt tells, guided away from no words."""
        if not inputs.told:
            raise ValueError(f"{self.family} makes a picture and words together as a prompt tells; give prompt=")
        return self.together(inputs)

    @abstractmethod
    def together(self, inputs: TaskInputs, pictures: Sequence[Tensor] = ()) -> DecodeRequest:
        """Rows of a new picture (or of one with holes) and words, of pictures that are read (codes `[B, h, w]`) or of none."""

    def needs(self, config: SamplerConfig, fill: int | None = None) -> TaskNeeds:
        """What such rows need: words that are never guided but by their own scale, and end, and are filled up."""
        scale = config.guidance.text_scale
        if "any_id" in self.defects:
            return TaskNeeds(stop_at_eos=False, text_scale=scale)
        return TaskNeeds(self._never(), self._ends(), fill, text_scale=scale)

    def prepared(self, pipe: Any, request: DecodeRequest, config: SamplerConfig, seeds: Tensor) -> Prepared:
        """With rules that reproduce the defects, where both modalities keep to a clock."""
        defects = self.defects
        if not defects or not config.text.rule == config.image.rule == "timed":
            return Prepared(pipe.transformer, request, config)
        positions = request.picture.sum(1)  # [B], codes of the picture, known ones too
        rules = {
            Modality.TEXT: WithDefects(defects, self.vocabulary.mask_id),
            Modality.IMAGE: WithDefects(defects, positions=positions),
        }
        ids = WholeTable.from_dict(self.vocabulary.to_dict()) if "any_id" in defects else None
        return Prepared(pipe.transformer, request, config, rules, ids)


@dataclass(frozen=True)
class WithDefects:
    """Makes the rule of one modality (`RuleMaker`).

    Args:
        mask: of words: the id that writes nothing. positions: of codes: int64 `[B]`, how many there are, known ones too.
    """

    defects: frozenset[str]
    mask: int = -1
    positions: Tensor | None = None

    def start(self, settings: ModalityDecoding, targets: Tensor) -> NamedRule:
        """See `RuleMaker`."""
        return DefectiveTimed(settings, targets, self)


class DefectiveTimed(Timed):
    """`Timed` as the reference programs have it. What they leave masked at the end of the clock is filled in one pass more: words
    by [MASK], which is never read, and codes by random ones."""

    adjusts = "compat"

    def __init__(self, settings: ModalityDecoding, targets: Tensor, wrong: WithDefects) -> None:
        super().__init__(settings, targets)
        self.wrong, self.words = wrong, wrong.positions is None
        self._over = self._looks = self._refused = torch.zeros(0, dtype=torch.bool)

    def count(self, now: BlockPass) -> Tensor:
        defects, over = self.wrong.defects, now.step >= now.steps
        self._over, self._looks = over, over | self.own_now(now.step)  # [B]
        if self.words and "any_id" in defects:  # planned beforehand: what was not written is not caught up with
            before = self.planned_rest(now._replace(step=now.step - 1))
            return torch.where(over, now.remaining, (before - self.planned_rest(now)).clamp_min(0))
        if not self.words and "one_left" in defects:
            own = self.own_now(now.step)
            return torch.where(over, now.remaining, torch.where(own, now.remaining - self.kept(now), 0))
        return super().count(now)

    def planned_rest(self, now: BlockPass) -> Tensor:
        if "all_counted" in self.wrong.defects and self.wrong.positions is not None:
            now = now._replace(start=self.wrong.positions)
        if "rounded" not in self.wrong.defects or self.settings.schedule not in ("linear", "cosine"):
            return super().planned_rest(now)
        done = (now.step + 1).double() / now.steps
        if self.settings.schedule == "linear":
            return (now.start * (1 - done)).long()
        return (now.start * torch.cos(done.float() * math.pi / 2)).floor().long()

    def looked_at(self, candidates: Tensor, count: Tensor) -> Tensor:
        return candidates & self._looks[:, None]  # also where nothing is to be filled

    def choose(self, logits: Tensor, index: Tensor, is_real: Tensor, u: Tensor, noise: Tensor) -> Choice:
        choice = super().choose(logits, index, is_real, u, noise)
        over, token = self._over[:, None], choice.token
        if self.words and "any_id" in self.wrong.defects:
            token = torch.where(over, self.wrong.mask, token)
            self._refused = (token == self.wrong.mask) & ~over
        elif not self.words:
            token = torch.where(over, (u * logits.shape[-1]).long(), token)
        return Choice(token, choice.probability, choice.confidence, choice.is_finite)

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        pick = super().pick(confidence, score, is_real, count, index)
        return pick & ~self._refused if self.words and "any_id" in self.wrong.defects else pick


def overwritten(request: DecodeRequest, prefixes: Sequence[Sequence[Sequence[Span]]]) -> DecodeRequest:
    """Rows of guidance that are those of the request, padded on the left, the beginning of each overwritten by another prompt."""
    batch, streams = request.batch, []
    starts = (~batch.valid).sum(1).tolist()
    for rows in prefixes:
        ids = batch.ids.clone()
        for row, (spans, start) in enumerate(zip(rows, starts, strict=True)):
            prefix = TokenBatch.from_spans([spans]).ids[0]
            ids[row, start : start + len(prefix)] = prefix
        streams.append(batch.replace(ids=ids))
    return DecodeRequest(**{**vars(request), "unconditional": tuple(streams)})
