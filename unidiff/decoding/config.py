"""What a decode is asked for: settings, one set per modality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from unidiff.diffusion.schedules import SCHEDULES
from unidiff.registry import Registry
from unidiff.schema import Between, Index, check_fields, from_data
from unidiff.tokens import Modality, TokenBatch

RULES: Registry[Any] = Registry(
    "commit_rules", "unidiff.decoding.commit", lambda found: (hasattr(found, "early") and found.name) or None
)
"""Commit rules by name, see `unidiff.decoding.commit.base.NamedRule`."""
NOISES = ("gumbel", "normal")
GUIDANCE_DEFECTS = ("late", "inverted")
CONFIDENCES = ("probability", "margin", "entropy", "random")
BLOCK_ORDERS = ("sequence", "aligned", "checkerboard", "coarse", "halton")
REMASKING = ("none", "confidence", "remdm")
GUIDANCE_MODES = ("constant", "ramp", "window")
HIDES = ("given", "other", "text", "image")
ORDERS = ("together", "text_first", "image_first", "level")
# Bounds that no decode has a use to pass: work that never ends, or numbers that overflow float32
_Passes = Annotated[int, Between(1, 100_000)]
_Count = Annotated[int, Between(1)]
_Share = Annotated[float, Between(0, 1)]
_Strength = Annotated[float, Between(0, 1e6)]
_Size = Annotated[float, Between(0, 1e30)]


@dataclass(frozen=True)
class ModalityDecoding:
    """How one modality is decoded. Nothing here is shared between text and image.

    Args:
        steps: passes for the whole modality (`quota` and `ancestral`; the other rules end by themselves). Blocks share them in
            proportion to their sizes, at least one each; `quota` takes no more than one per token. Tokens that are masked
            again may add one each. What is done sooner (end of text, blocks in flight) leaves passes out.
        rule: which tokens a pass commits, at least one. `quota`: as many as `schedule` says. `threshold`: every position whose
            confidence reaches `threshold`. `factor`: the longest prefix of the sorted confidences with
            c_r >= 1 - factor / (r + 1). `hierarchical`: as `threshold`, and the best position of every run of masked
            neighbours where it reaches `low_threshold`. `credit`: as `threshold`, after adding to the logits what a token has
            earned by being the best in earlier passes, see `Credit`. `at_least`: a quota, or all above `threshold` where these
            are more, see `AtLeast`. `timed`: a quota by a clock that also runs in passes which fill nothing, see `Timed`. `even_share`: an even share in
            every pass left, and all above `threshold`, see `EvenShare`. `first_hitting`: one uniformly random position, the
            exact law of the model. `ancestral`: each position by its own coin, the reverse process on a grid of times.
        schedule: share still masked after a share u of the steps, one of `unidiff.diffusion.schedules`: `linear` 1-u,
            `cosine` cos(pi u/2), `square` 1-u^2, `root` 1-sqrt(u), `arccos` acos(u) 2/pi, ...; `fixed` commits n // steps,
            plus one in the first n % steps passes.
        confidence: what ranks positions: `probability` of the chosen token, `margin` between the best two, `entropy`
            (negative), or `random`. Always from the guided logits before temperature and filters.
        temperature: of the token draw; 0 takes the best token.
        choice_temperature: scale of the noise on the ranking, multiplied by the remaining time. choice_noise: its law, `gumbel`
            or `normal`.
        top_k, top_p: keep only the k best tokens, and the smallest set that reaches probability p.
        threshold, factor, low_threshold, credit_decay, credit_power, credit_weight, least_tokens, block_steps: see `rule`.
        own_passes, first_pass: of `timed`: in how many of its `steps` passes something is filled, spread evenly from this share
            of them on; None for all.
        block_length: tokens per block, decoded block after block; None for the whole span at once.
        block_order: which tokens form a block: `sequence`, `aligned` (runs of positions counted from the first of the sample, as
            block-causal attention counts them, so that the first and the last may be shorter), or for images `checkerboard`, `coarse` (coarse to fine) and
            `halton` (each block spread evenly over the picture, Besnier et al. 2025).
        blocks_in_flight: blocks that may be decoded at once. A block joins when `flight_share` of the one before it
            is decoded; until its turn comes, only tokens whose confidence reaches `flight_threshold` are committed in it.
        remask: `confidence`: tokens committed in earlier passes with a probability below `remask_threshold` are masked
            again, the least sure first, at most `remask_budget` times per row. `remdm`: ReMDM's law-preserving form
            for the `ancestral` rule, sigma_t = min(`remask_cap`, (1 - alpha_s) / alpha_t).
        edit_threshold: tokens of the block that is decoded are replaced by what the model would say now, where its probability
            is above this (token editing, LLaDA2.1); None for never. A block ends when a pass that began without masks changes
            nothing, or after `edit_passes` of these.
        forbid: vocabulary ids that may never be emitted, besides [MASK] and the other modality's.
        writes_mask: [MASK] may be drawn as well, as the programs of LLaDA and LLaDA2.0 do: it uses up quota, and its position stays
            hidden. What is hidden when the passes of a block are over is left so (`at_least`), or competes with
            the blocks to come (`quota` by the schedule `fixed`). For comparisons with these programs.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    steps: _Passes = 16
    rule: str = "quota"
    schedule: str = "cosine"
    confidence: str = "probability"
    temperature: Annotated[float, Between(0, float("inf"))] = 1.0
    choice_temperature: _Size = 0.0
    choice_noise: str = "gumbel"
    top_k: _Count | None = None
    top_p: _Share | None = None
    threshold: float = 0.9
    factor: Annotated[float, Between(0, float("inf"))] = 1.0
    low_threshold: float = 0.5
    credit_decay: _Share = 0.8
    credit_power: _Size = 0.2
    credit_weight: _Strength = 0.7
    least_tokens: _Count = 1
    block_steps: _Passes | None = None
    own_passes: _Passes | None = None
    first_pass: _Share = 0.0
    block_length: _Count | None = None
    block_order: str = "sequence"
    blocks_in_flight: _Count = 1
    flight_share: _Share = 0.5
    flight_threshold: float = 0.9
    remask: str = "none"
    remask_threshold: _Share = 0.0
    remask_budget: Annotated[int, Between(0, 100_000)] = 0
    remask_cap: _Share = 0.0
    edit_threshold: _Share | None = None
    edit_passes: Annotated[int, Between(0, 100_000)] = 16
    forbid: tuple[Index, ...] = ()
    writes_mask: bool = False

    def __post_init__(self) -> None:
        _tuples(self, "forbid")
        check_fields(self, "")
        if self.schedule not in SCHEDULES:
            _one_of("schedule", self.schedule, ("fixed", *SCHEDULES))
        _one_of("confidence", self.confidence, CONFIDENCES)
        _one_of("choice_noise", self.choice_noise, NOISES)
        _one_of("block_order", self.block_order, BLOCK_ORDERS)
        _one_of("remask", self.remask, REMASKING)
        if self.top_p == 0:
            raise ValueError("top_p is 0; expected a number in (0, 1], or None to keep every token")
        rule = RULES[self.rule] if self.rule in RULES else RULES.get_or_refuse(self.rule, "rule")
        rule.check(self)
        if self.blocks_in_flight > 1 and self.block_length is None:
            raise ValueError(f"blocks_in_flight is {self.blocks_in_flight}, but there is one block; set block_length")
        fixed = (self.rule, self.schedule) == ("quota", "fixed")
        if self.writes_mask and not fixed and self.rule not in ("at_least", "even_share"):
            fault = f"not rule={self.rule!r} by schedule={self.schedule!r}"
            raise ValueError(f"writes_mask goes with rule='at_least', or 'quota' by schedule='fixed', {fault}")
        if self.writes_mask and (self.remask != "none" or self.blocks_in_flight > 1):
            raise ValueError("writes_mask does not go with remask or blocks_in_flight; leave one of them out")
        if self.edit_threshold is not None:
            clashes = {"remask": self.remask != "none", "blocks_in_flight": self.blocks_in_flight > 1}
            clashes |= {"rule": not rule.looks(self) or rule.adjusts is not None}
            if clash := next((name for name, found in clashes.items() if found), None):
                raise ValueError(
                    f"edit_threshold does not go with {clash} = {getattr(self, clash)!r}; leave one of them out"
                )


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = uncond + s (cond - uncond); s = 1 is off and costs nothing.

    Args:
        scale: s at full strength. UniDisc's weight w and LLaDA's `cfg_scale` are s - 1.
        mode: `constant`; `ramp`: s(t) = 1 + (scale - 1)(1 - t), weak while all is masked (UniDisc);
            `window`: full strength while the progress 1 - t is inside `window`, off outside.
        window: start and stop of the window, shares of the decode.
        hide: what the unconditional pass does not see: all `given` tokens, every token of the `other` modality (given
            or generated; for joint generation), or the given `text` or `image`. A `condition` passed to the sampler wins.
        text_scale, image_scale: s for one modality where it differs.
        further: s of the second, third, ... unconditional rows, where the sampler is given several: every one adds
            (s - 1) (cond - uncond). Constant over time, and not for a modality whose own scale is 1. The last ones cost
            nothing where they are 1.
        defects: of reference programs, to reproduce their runs. `late`: the unconditional streams see the words that the pass
            has written. `inverted`: text is guided by 2 - s in place of s.
        chained: each of these directions begins at the rows before, not at the conditional ones (InstructPix2Pix, arXiv
            2211.09800, eq. 3): it adds (s - 1) (uncond before - uncond).
        rescale: share of the guided logits that is brought to the standard deviation, over all ids, of the conditional ones
            (Lin et al. 2024, arXiv 2305.08891, eq. 15 and 16); 0 leaves them as they are.
    """

    scale: _Strength = 1.0
    mode: str = "constant"
    window: tuple[_Share, _Share] = (0.0, 1.0)
    hide: str = "given"
    text_scale: _Strength | None = None
    image_scale: _Strength | None = None
    further: tuple[_Strength, ...] = ()
    defects: tuple[str, ...] = ()
    chained: bool = False
    rescale: _Share = 0.0

    def __post_init__(self) -> None:
        _tuples(self, "window", "further", "defects")
        check_fields(self, "guidance")
        for defect in self.defects:
            _one_of("guidance defect", defect, GUIDANCE_DEFECTS)
        _one_of("guidance mode", self.mode, GUIDANCE_MODES)
        _one_of("guidance hide", self.hide, HIDES)
        object.__setattr__(self, "further", tuple(float(s) for s in self.further))
        object.__setattr__(self, "window", tuple(float(w) for w in self.window))
        if self.window[0] > self.window[1]:
            raise ValueError(f"guidance window is {self.window}; expected (start, stop) with 0 <= start <= stop <= 1")

    @property
    def directions(self) -> tuple[float, ...]:
        """`further` without the last ones that are off."""
        used = max((n for n, scale in enumerate(self.further, 1) if scale != 1), default=0)
        return self.further[:used]

    def full_scale(self, modality: Modality) -> float:
        """s of a modality at full strength; 1 means that it is never guided."""
        own = self.text_scale if modality == Modality.TEXT else self.image_scale
        full = self.scale if own is None else own
        return 2 - full if modality == Modality.TEXT and "inverted" in self.defects else full

    def guides(self, modality: Modality) -> bool:
        """Whether some pass guides a modality."""
        own = self.text_scale if modality == Modality.TEXT else self.image_scale
        return self.full_scale(modality) != 1 or (own is None and bool(self.directions))

    def turns(self, streams: Sequence[int], work: Sequence[Any]) -> list[tuple[Sequence[int], Sequence[Any]]]:
        """The streams of a pass, and what is filled once they are evaluated: all at once, or words `late` before the others."""
        if "late" not in self.defects or len(streams) == 1:
            return [(streams, work)]
        words = [w for w in work if w.progress.modality == Modality.TEXT]
        return [((0,), words), ([s for s in streams if s], [w for w in work if w not in words])]

    def scale_at(self, modality: Modality, time: Tensor) -> Tensor:
        """s `[B]` at diffusion time t `[B]` (1 = all masked); 1 means off."""
        full = self.full_scale(modality)
        if self.mode == "ramp":
            return 1 + (full - 1) * (1 - time)
        if self.mode == "window":
            start, stop = self.window
            inside = (1 - time >= start) & (1 - time <= stop)
            return torch.where(inside, full, torch.ones_like(time))
        return torch.full_like(time, full)

    def uncond_mask(self, modality: Modality, batch: TokenBatch, condition: Tensor | None) -> Tensor:
        """bool `[B, L]`: what the unconditional pass for targets of `modality` does not see."""
        known = batch.given & batch.valid
        if condition is not None:
            return condition & known
        if self.hide == "given":
            return known
        if self.hide == "other":
            return batch.valid & (batch.modality != modality)
        return known & (batch.modality == (Modality.TEXT if self.hide == "text" else Modality.IMAGE))


@dataclass(frozen=True)
class SamplerConfig:
    """All settings of a decode.

    Args:
        text, image: per modality.
        guidance: classifier-free guidance.
        order: row by row, `together`: both modalities in every pass, each at its own pace; `text_first`, `image_first`:
            one after the other; `level`: by progress, the modality with the greater decoded share waits for the other.
        stop_at_eos: a text row ends when every position before its first generated end-of-text is known;
            what follows is filled with end-of-text.
        whole_blocks: an end of text counts when its block is complete and, with `edit_threshold`, no longer changed.
        first_end: tokens behind an end that was written are left out from then on, also while tokens before it are masked, so
            that passes are spent on these alone.
        ends: further ids that end a text, besides the vocabulary's `eos` (an end of turn, for instance).
        fill: what follows an end, where it is not end-of-text (UniDisc: padding).
    """

    text: ModalityDecoding = field(default_factory=lambda: ModalityDecoding(rule="threshold", temperature=0.0))
    image: ModalityDecoding = field(default_factory=lambda: ModalityDecoding(rule="quota", schedule="cosine"))
    guidance: Guidance = field(default_factory=Guidance)
    order: str = "together"
    stop_at_eos: bool = True
    whole_blocks: bool = False
    first_end: bool = False
    ends: tuple[Index, ...] = ()
    fill: Index | None = None

    def __post_init__(self) -> None:
        _tuples(self, "ends")
        check_fields(self, "sampler")
        _one_of("order", self.order, ORDERS)

    def of(self, modality: Modality) -> ModalityDecoding:
        """The settings of one modality."""
        return self.text if modality == Modality.TEXT else self.image

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplerConfig:
        """Inverse of `to_dict`. Keys left out keep their defaults; an unknown key is an error."""
        return from_data(cls, data, "sampler")


def _tuples(settings: object, *names: str) -> None:
    """Lists become tuples, as plain data has them."""
    for name in names:
        if isinstance(value := getattr(settings, name), list):
            object.__setattr__(settings, name, tuple(value))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r:.80}; expected one of {', '.join(allowed)}")
