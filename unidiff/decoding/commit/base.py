"""`NamedRule`: what a commit rule says of itself and decides, and `quota`, the plain one. Every rule works row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import ORDER, Choice, choose, ranking
from unidiff.diffusion.schedules import get_schedule

TOKENS_PER_PASS = 3
"""Of rules that end by themselves: Fast-dLLM reports 3.3 at a threshold of 0.9."""
ROUNDING = 1e-5
"""How far logits may lie apart that are equal but for rounding: the order in which float32 adds them up is not the same
in every batch."""
Slack = Callable[[Tensor], Tensor]
"""From a score to how far another may lie from it and still count as equal."""


class CommitRule(Protocol):
    """Which candidates of a pass are filled: a rule of one's own, in place of `ModalityDecoding.rule`.

    Rows must not depend on each other, and the same arguments must give the same answer.
    """

    def __call__(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """bool `[B, n]`, the candidates to fill; entries that are not real do not matter.

        Args:
            confidence: float64 `[B, n]`, how sure the model is of the token it chose.
            score: float64 `[B, n]`, the same with the choice noise of the settings.
            is_real: bool `[B, n]`, real candidates; the others are padding.
            count: int64 `[B]`, how many the settings would fill: their quota, or all that is left of the block.
            index: int64 `[B, n]`, positions in the row, ascending over the real ones.
        """
        ...


@runtime_checkable
class RuleMaker(Protocol):
    """What makes a `NamedRule` for each request, where a rule of one's own needs its settings, logits or a state."""

    def start(self, settings: ModalityDecoding, targets: Tensor) -> NamedRule:
        """The rule of one modality of one request; targets: bool `[B, L]`."""
        ...


class BlockPass(NamedTuple):
    """Where each row stands in its block before a pass.

    active: bool `[B, L]`, positions that may be filled. start, remaining: int64 `[B]`, how many were masked when the block
    began, and are now. step, steps: int64 `[B]`, this pass, from 0, and passes of the block.
    """

    active: Tensor
    start: Tensor
    remaining: Tensor
    step: Tensor
    steps: Tensor


class BlockShares:
    """How the passes of a modality are shared out over its blocks: in proportion to their sizes, row by row.

    Passes before a block are the share of `total` that is due to the tokens before it, rounded down. So every block gets at
    least one pass and no more than its share rounded up, and all of them together get `total`, int64 `[B]`.

    Args:
        steps: passes asked for. Rows with more blocks than that make one pass per block.
        size: int64 `[B]`, targets of the row. length: tokens per block, None for all in one.
        capped: never more passes than tokens.
        offset: int64 `[B]`, how many tokens the first block is shorter; None for none.
    """

    def __init__(
        self, steps: int, size: Tensor, length: int | None, capped: bool, offset: Tensor | None = None
    ) -> None:
        self._whole, self._size = length is None, (size := size.clamp_min(1))
        self._offset = torch.zeros_like(size) if offset is None else offset
        reach = size + self._offset  # as if the first block were whole
        self._length = reach if length is None else reach.clamp_max(length)  # [B], tokens of a full block
        total = (reach - 1).div(self._length, rounding_mode="floor").add(1).clamp_min(steps)
        self.total = torch.minimum(total, size) if capped else total

    def before(self, block: Tensor) -> Tensor:
        """int64 `[B]`: passes of all blocks before `block`, or `total` where there is no such block."""
        if self._whole:
            return torch.where(block > 0, self.total, 0)
        return self.total * torch.minimum((block * self._length - self._offset).clamp_min(0), self._size) // self._size

    def own(self, block: Tensor) -> Tensor:
        """int64 `[B]`: passes of a block."""
        return self.total if self._whole else self.before(block + 1) - self.before(block)


class NamedRule:
    """A commit rule that settings call by `name`; one object serves one modality of one request.

    Attributes:
        planned: it makes the `steps` passes of its settings, and diffusion time counts them. capped: never more than one
            per token.
        compares: it compares confidences, so that noise in their place means nothing. blind: the model's answers decide
            no position: `early` does.
        has_threshold: `ModalityDecoding.threshold` is what it goes by.
        foretold: how many positions it fills in a pass does not depend on the model.
        adjusts: the setting by which it changes logits before tokens are drawn, if it does (`adjust`).
    """

    name = ""
    planned = capped = has_threshold = blind = foretold = False
    compares = True
    adjusts: str | None = None

    def __init__(self, settings: ModalityDecoding, targets: Tensor) -> None:
        """`targets`: bool `[B, L]`, those of the modality."""
        self.settings, self.targets = settings, targets

    @classmethod
    def looks(cls, settings: ModalityDecoding) -> bool:
        """Whether the model's answers decide which positions are filled."""
        return not cls.blind and settings.confidence != "random"

    @classmethod
    def check(cls, settings: ModalityDecoding) -> None:
        """Raise `ValueError` for settings that the rule cannot go by."""
        if settings.remask == "remdm":
            raise ValueError(f"remask='remdm' keeps the law of rule='ancestral' only, but rule is {cls.name!r}")
        cls.check_looks(settings)

    @classmethod
    def check_looks(cls, settings: ModalityDecoding) -> None:
        """The part of `check` about confidences and blocks in flight."""
        if cls.compares and not cls.blind and settings.confidence == "random":
            raise ValueError(f"rule={cls.name!r} compares confidences, but confidence is 'random'; use 'probability'")
        if settings.blocks_in_flight > 1 and not cls.looks(settings):
            raise ValueError(
                f"blocks_in_flight is {settings.blocks_in_flight}, but rule={cls.name!r} with "
                f"confidence={settings.confidence!r} does not look at the model; use 1, or a rule that compares confidences"
            )

    @classmethod
    def passes_of_a_block(cls, settings: ModalityDecoding, size: int, block: int) -> int | Fraction:
        """About how many passes a block of `block` of `size` targets takes; where planned, all blocks together make `steps`."""
        if cls.planned:
            return Fraction((min(settings.steps, size) if cls.capped else settings.steps) * block, size)
        return math.ceil(block / TOKENS_PER_PASS)

    @classmethod
    def in_steps(cls, settings: ModalityDecoding, steps: int, schedule: str) -> ModalityDecoding:
        """The same decoding in so many passes; where none are planned, a quota by `schedule`."""
        if cls.planned:
            return replace(settings, steps=steps)
        whole = settings.blocks_in_flight > 1  # blocks that wait for confidence have no number of passes
        length = None if whole else settings.block_length
        return replace(settings, steps=steps, rule="quota", schedule=schedule, block_length=length, blocks_in_flight=1)

    def count(self, now: BlockPass) -> Tensor:
        """int64 `[B]`, how many positions to fill; all that remain where confidences decide."""
        return now.remaining

    def early(self, now: BlockPass, count: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        """bool `[B, L]` of the positions to fill where the model does not matter; None where it does.

        Such rules need logits only at these positions, and no pass at all when there are none. `noise` makes uniforms `[B, L]`
        for a use named in `unidiff.decoding.draw`.
        """
        return None

    def looked_at(self, candidates: Tensor, count: Tensor) -> Tensor:
        """bool `[B, L]`: those candidates, where confidences decide, whose logits are asked for; `count` [B] are to be filled."""
        return candidates

    def rank(self, confidence: Tensor, time: Tensor, u: Tensor) -> Tensor:
        """Scores `[B, n]`: confidences with the choice noise of the settings, from the time `[B]` before the pass and uniforms."""
        return ranking(confidence, self.settings, time, u)

    def adjust(self, logits: Tensor, index: Tensor, is_real: Tensor) -> Tensor:
        """Logits `[B, n, V]` at the positions of an index `[B, n]` as tokens are drawn from them."""
        return logits

    def choose(self, logits: Tensor, index: Tensor, is_real: Tensor, u: Tensor, noise: Tensor) -> Choice:
        """Tokens from guided logits, where it `adjusts` them: see `unidiff.decoding.draw.choose`."""
        return choose(self.adjust(logits, index, is_real)[None], is_real, self.settings, u, noise)

    def forget(self, where: Tensor) -> None:
        """Positions bool `[B, L]` were masked again."""

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """See `CommitRule`: bool `[B, n]`."""
        return take_best(score, is_real, count, self.ranking_slack)

    def picked(self, choice: Choice, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """`pick`, for rules that need more of what was drawn."""
        return self.pick(choice.confidence, score, is_real, count, index)

    @property
    def slack(self) -> Slack | None:
        """Of the confidences that thresholds apply to."""
        return slack_of(self.settings.confidence)

    @property
    def ranking_slack(self) -> Slack | None:
        """Of the scores that a quota ranks by: with choice noise they have no ties."""
        return None if self.settings.choice_temperature else self.slack


class Quota(NamedRule):
    """The surest positions, as many as `schedule` says; random ones with confidence "random"."""

    name = "quota"
    planned = capped = foretold = True
    compares = False

    def count(self, now: BlockPass) -> Tensor:
        if self.settings.writes_mask:  # as planned, also where [MASK] was written in place of tokens
            share, rest = now.start // now.steps, now.start % now.steps
            return torch.minimum(share + (now.step < rest).long(), now.remaining)
        return quota(self.settings.schedule, now.start, now.remaining, now.step, now.steps)

    def early(self, now: BlockPass, count: Tensor, noise: Callable[[int], Tensor]) -> Tensor | None:
        return None if self.looks(self.settings) else take_best(noise(ORDER), now.active, count)


def quota(schedule: str, start: Tensor, remaining: Tensor, step: Tensor, steps: Tensor) -> Tensor:
    """How many positions a row commits in this pass, int64 `[B]`; at least one while any remain, all in the last pass.

    Where there are enough, one is left for each pass to come, so that a block of no fewer tokens than passes makes all of them.
    What remains differs from the plan after remasking, and the quota catches up.

    `schedule` is one of `unidiff.diffusion.schedules`, or `fixed` (LLaDA): n // steps, plus one in the first n % steps passes.
    """
    last = step + 1 >= steps
    if schedule == "fixed":
        keep = start - (step + 1) * (start // steps) - torch.minimum(step + 1, start % steps)
    else:
        keep = (start * get_schedule(schedule).rate_after(progress(step + 1, steps)) + 1e-9).floor().long()
    keep = torch.maximum(keep, steps - step - 1)  # `root` would be done early
    count = torch.where(last, remaining, remaining - keep)
    return torch.maximum(count, (remaining > 0).long()).clamp_max(remaining)


class GuardedRule(NamedRule):
    """A rule of one's own in place of the settings' choice of positions, with two promises: real candidates only, and at
    least the best one of every row that has any. It gets copies, so that writing in its arguments does not reach the decode.
    """

    def __init__(self, named: NamedRule, own: CommitRule) -> None:
        super().__init__(named.settings, named.targets)
        self.planned, self.capped, self.adjusts = named.planned, named.capped, named.adjusts
        self.count, self.adjust, self.forget = named.count, named.adjust, named.forget  # type: ignore[method-assign]
        self.looked_at, self.rank = named.looked_at, named.rank  # type: ignore[method-assign]
        self._own = own

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        """See `CommitRule`; a `ValueError` where the rule returns no bool `[B, n]`."""
        pick = self._own(confidence.clone(), score.clone(), is_real.clone(), count.clone(), index.clone())
        if not isinstance(pick, Tensor) or pick.shape != is_real.shape or pick.dtype != torch.bool:
            found = f"{pick.dtype} {tuple(pick.shape)}" if isinstance(pick, Tensor) else type(pick).__name__
            raise ValueError(f"the commit rule returned {found}; expected bool {tuple(is_real.shape)}")
        pick = pick.to(is_real.device) & is_real
        return pick | take_best(score, is_real, (~pick.any(1)).long(), self.ranking_slack)


def progress(step: Tensor, steps: Tensor) -> Tensor:
    """step / steps as float64 in [0, 1]. (int / int is float32 in torch, which turns quotas of 4 into 3.)"""
    return (step.double() / steps).clamp(max=1)


def slack_of(measure: str) -> Slack | None:
    """What `ROUNDING` of the logits means for a confidence measure; None for noise, which has no rounding."""
    known: dict[str, Slack] = {
        "probability": lambda p: ROUNDING * torch.minimum(p, 1 - p),
        "margin": lambda m: ROUNDING * (1 - m),
        "entropy": lambda h: ROUNDING * h.abs(),
    }
    return known.get(measure)


def take_best(score: Tensor, is_real: Tensor, count: Tensor, slack: Slack | None = None) -> Tensor:
    """bool `[B, n]`: the `count[b]` real positions of highest score; ties go to the earlier one.

    With `slack`, scores so close to the last one taken are ties as well. So positions that a model cannot tell apart (a row
    with nothing given) are taken from the left, and not by rounding, which depends on batch and padding.
    """
    score = score.clamp_min(torch.finfo(score.dtype).min)  # a real -inf must still come before the others
    ranked = torch.where(is_real, score, -math.inf)
    if slack is not None and ranked.shape[1]:
        last = (count - 1).clamp(0, ranked.shape[1] - 1)[:, None]
        least = ranked.sort(dim=1, descending=True).values.gather(1, last)  # [B, 1]
        ranked = torch.where((ranked - least).abs() <= slack(least), least, ranked)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(1)
    return is_real & (rank < count[:, None])


def unsure_tokens(confidence: Tensor, candidates: Tensor, threshold: float, budget: Tensor) -> Tensor:
    """bool `[B, L]`: committed tokens with confidence below `threshold`, the least sure first, at most `budget` per row.

    Args:
        confidence: float32 `[B, L]`, of each token when it was committed.
        candidates: bool `[B, L]`, tokens committed in earlier passes; those of the last one could know no more by now.
        budget: int64 `[B]`, remaskings the row has left; bounds the number of passes.
    """

    def slack(score: Tensor) -> Tensor:  # of a negative probability
        return ROUNDING * torch.minimum(-score, 1 + score) + torch.finfo(score.dtype).eps

    return take_best(-confidence, candidates & (confidence < threshold), budget, slack)
