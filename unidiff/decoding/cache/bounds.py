"""How much faster a cache can be: the work of every pass of a decode, and the ratio to the same decode without a cache.

`expected_passes` gives what a policy must compute, pass by pass, for one row with a fixed quota; `DecodeStats` of such a
decode equals it exactly. `speedup_bound` is the ratio of FLOPs, or of times where the rate of matrix products at each
number of rows is known (small products run slower: the corrected bound). `reference_bound` are the closed formulas
of the papers, which count tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Annotated, NamedTuple

import torch

from unidiff.decoding.cache import (
    AdaptiveCache,
    DualCache,
    HeldGuidance,
    IntervalCache,
    MaxLogitCache,
    NoCache,
    PrefixCache,
    RefreshPolicy,
    VicinityCache,
)
from unidiff.decoding.cache.refresh import BlockRefresh
from unidiff.decoding.state import BlockShares
from unidiff.decoding.stats import RowWork
from unidiff.models.denoiser import DenoiserTraits
from unidiff.models.partial import LayerWork
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality

Rate = Callable[[int], float]
"""FLOP/s of the model's matrix products at a number of rows."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one modality: given, or to be decoded, each as one of `ids` ids."""

    tokens: Annotated[int, Between(0, 2**26)]
    ids: Annotated[int, Between(0, 2**26)] = 0
    modality: Modality = Modality.TEXT
    given: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "segment")


@dataclass(frozen=True)
class Schedule:
    """A decode of one row: text first, block after block, with a fixed quota.

    Args:
        segments: the row from left to right.
        block: targets per block.
        passes: passes per full block, a whole number or a fraction (steps x block / targets, for a decode of so many steps).
            Shorter blocks take their share, and none takes more passes than it has tokens, see `BlockShares`.

    Raises:
        ValueError: nothing to decode, a block that would reach from one segment into another, or no passes.
    """

    segments: tuple[Segment, ...]
    block: Annotated[int, Between(1, 2**26)]
    passes: int | Fraction

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        if self.passes <= 0:
            raise ValueError(f"schedule passes is {self.passes}; expected more than 0")
        for modality in Modality:
            inner = self.hidden(modality)[:-1]
            if broken := [s for s in inner if s.tokens % self.block]:
                raise ValueError(
                    f"a segment of {broken[0].tokens} tokens is no whole number of blocks of {self.block}; only the last "
                    "of a modality may be"
                )
        if not self.targets:
            raise ValueError("a schedule needs a segment that is not given")

    def hidden(self, modality: Modality) -> list[Segment]:
        """Segments of a modality that are not given."""
        return [s for s in self.segments if s.modality == modality and not s.given]

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return sum(s.tokens for s in self.segments)

    @property
    def targets(self) -> int:
        return sum(s.tokens for s in self.segments if not s.given)

    @property
    def prompt(self) -> int:
        """Given tokens."""
        return self.length - self.targets

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(first place in the row, tokens, ids) of each block, in the order of decoding."""
        found: list[tuple[Modality, int, int, int]] = []
        start = 0
        for s in self.segments:
            if not s.given:
                for offset in range(0, s.tokens, self.block):
                    found.append((s.modality, start + offset, min(self.block, s.tokens - offset), s.ids))
            start += s.tokens
        return [block[1:] for block in sorted(found, key=lambda block: block[0])]

    def steps(self, modality: Modality) -> int:
        """Passes of a whole modality: what `ModalityDecoding.steps` has to be."""
        return ceil(self.passes * sum(s.tokens for s in self.hidden(modality)) / Fraction(self.block))

    def passes_of(self, modality: Modality) -> list[int]:
        """Passes of each block of a modality, in the order of decoding."""
        size = sum(s.tokens for s in self.hidden(modality))
        shares = BlockShares(self.steps(modality), torch.tensor([size]), self.block, capped=True)
        return [int(shares.own(torch.tensor([k]))) for k in range(-(-size // self.block))]


class Moment(NamedTuple):
    """Where a decode stands before a pass.

    number: passes made. inside: passes made in the block. start, size, ids: of the block. masked: open positions of the
    block; left: of the row. changed: tokens that the last pass wrote.
    """

    number: int
    inside: int
    start: int
    size: int
    ids: int
    masked: int
    left: int
    changed: int


def moments(schedule: Schedule) -> Iterator[Moment]:
    """The passes of a decode with a fixed quota: a block of n in s passes takes n // s each, one more in the first n % s."""
    number, left, changed = 0, schedule.targets, 0
    passes = [n for modality in Modality for n in schedule.passes_of(modality)]
    for (start, size, ids), own in zip(schedule.blocks, passes, strict=True):
        masked = size
        for inside in range(own):
            yield Moment(number, inside, start, size, ids, masked, left, changed)
            changed = size // own + (inside < size % own)
            number, masked, left = number + 1, masked - changed, left - changed


def expected_passes(policy: RefreshPolicy, schedule: Schedule, layers: int) -> list[RowWork]:
    """What each pass has to compute in a row without guidance. (Index padding, where rows run together, is not in it.)

    Raises:
        ValueError: a policy whose work depends on the model's answers, or is not known here.
    """
    if isinstance(policy, HeldGuidance):
        policy = policy.policy
    for kind, work in _WORK.items():
        if type(policy) is kind:
            return [work(policy, schedule, moment, layers) for moment in moments(schedule)]
    known = ", ".join(kind.__name__ for kind in _WORK)
    raise ValueError(f"the work of {type(policy).__name__} cannot be foretold; known are {known}")


def speedup_bound(policy: RefreshPolicy, schedule: Schedule, traits: DenoiserTraits, rate: Rate | None = None) -> float:
    """Time without a cache over time with it, if all time were spent in matrix products.

    Args:
        traits: of the model.
        rate: FLOP/s at a number of rows, for the corrected bound; None takes the same for all numbers.
    """
    plain, cached = (
        sum(pass_seconds(p, traits, rate) for p in expected_passes(kind, schedule, len(traits.layers)))
        for kind in (NoCache(), policy)
    )
    return plain / cached


def pass_seconds(work: RowWork, traits: DenoiserTraits, rate: Rate | None = None) -> float:
    """FLOPs of a pass over the rate at the rows of each product; attention counts at the rate of its query rows."""
    at = (lambda rows: 1.0) if rate is None else rate
    total = traits.head_flops(work.head, work.ids) / at(work.head) if work.head else 0.0
    for layer, w in zip(traits.layers, work.layers, strict=True):
        parts = (
            (w.qk, layer.query_key + work.keys * layer.pair),
            (w.v, layer.value),
            (w.out, layer.output + layer.feed_forward),
        )
        total += sum(rows * each / at(rows) for rows, each in parts if rows)
    return total


def reference_bound(policy: RefreshPolicy, schedule: Schedule, traits: DenoiserTraits) -> float | None:
    """The closed formulas for P prompt and G response tokens, S = P + G, n passes per block of B; None where there is none.

    dual n / (1 + (n - 1) B / S); prefix, over blocks from s, sum n / sum (1 + (n - 1) (S - s) / S) (Fast-dLLM);
    dLLM-Cache S / (P / Kp + G / Kr + G (1 - 1 / Kr) (rho + (1 - rho) v)) with v = 2 d d_kv / c, in all layers but those
    that are always full; ML-Cache n / (full + (n - full) (1 - ratio)).
    """
    n, blocks, length = float(schedule.passes), schedule.blocks, schedule.length
    if type(policy) is DualCache and policy.interval is None:
        return n * len(blocks) / sum(1 + (n - 1) * size / length for _, size, _ in blocks)
    if type(policy) is PrefixCache and policy.interval is None:
        return n * len(blocks) / sum(1 + (n - 1) * (length - s) / length for s, _, _ in blocks)
    if type(policy) is AdaptiveCache:
        layer, answer, rho = traits.layers[0], schedule.targets, policy.ratio
        between = answer * (1 - 1 / policy.response_interval) * (rho + (1 - rho) * layer.value / layer.token)
        share = (schedule.prompt / policy.prompt_interval + answer / policy.response_interval + between) / length
        full = len(policy.full_layers) / len(traits.layers)
        return 1 / (full + (1 - full) * share)
    if type(policy) is MaxLogitCache:
        total = sum(schedule.steps(modality) for modality in Modality)
        begin = int(total * policy.warmup)
        full = sum(i <= begin or (i - begin) % policy.interval == 0 for i in range(total))
        return total / (full + (total - full) * (1 - policy.ratio))
    return None


def _no_cache(policy: NoCache, schedule: Schedule, now: Moment, layers: int) -> RowWork:
    return _even(schedule, now, layers, schedule.length)


def _block_refresh(policy: BlockRefresh, schedule: Schedule, now: Moment, layers: int) -> RowWork:
    if policy.drift is not None:
        raise ValueError("with drift, the number of refreshes depends on what is decoded; no bound is known")
    interval = policy.interval or now.inside + 1
    if now.number < policy.warmup or now.inside % interval == 0:
        return _even(schedule, now, layers, schedule.length)
    first, last = now.start, now.start + now.size
    if isinstance(policy, PrefixCache):
        last = schedule.length
    elif isinstance(policy, VicinityCache):
        first, last = max(first - policy.look_back, 0), min(last + policy.look_ahead, schedule.length)
    return _even(schedule, now, layers, last - first)


def _max_logit(policy: MaxLogitCache, schedule: Schedule, now: Moment, layers: int) -> RowWork:
    begin = int(max(sum(schedule.passes_of(modality)) for modality in Modality) * policy.warmup)
    extra = schedule.length if policy.compat else 0  # logits everywhere
    if now.number <= begin or (now.number - begin) % policy.interval == 0:
        return _even(schedule, now, layers, schedule.length, extra)
    counted = schedule.length if policy.compat else now.masked
    rank = torch.tensor(1 - policy.ratio, dtype=torch.float32) * (counted - 1)  # as nanquantile counts
    low = int(rank) + 1
    if not policy.compat:  # candidates of a new block have no logits yet
        low = (low if now.inside else now.masked) + now.changed
    return _even(schedule, now, layers, low, extra)


def _adaptive(policy: AdaptiveCache, schedule: Schedule, now: Moment, layers: int) -> RowWork:
    prompt = schedule.prompt if now.number % policy.prompt_interval == 0 else 0
    if now.number % policy.response_interval == 0:
        queries = values = prompt + schedule.targets
    else:
        compared = schedule.targets if policy.compat else now.left
        known = prompt + (0 if policy.compat else now.changed)
        chosen = 0
        if policy.ratio > 0:
            chosen = int(compared * policy.ratio)
            chosen = chosen if policy.compat else max(chosen, 1)
        queries, values = known + chosen, known + (compared if policy.ratio > 0 else 0)
    whole, some = LayerWork(*(schedule.length,) * 3), LayerWork(queries, values, queries)
    work = tuple(whole if layer in policy.full_layers else some for layer in range(layers))
    return RowWork(work, schedule.length, now.masked, now.ids)


def _interval(policy: IntervalCache, schedule: Schedule, now: Moment, layers: int) -> RowWork:
    full = now.number % policy.interval == 0
    return _even(schedule, now, layers, schedule.length if full else now.masked + now.changed)


def _even(schedule: Schedule, now: Moment, layers: int, queries: int, extra: int = 0) -> RowWork:
    return RowWork.even(layers, queries, schedule.length, now.masked + extra, now.ids)


_WORK: dict[type, Callable[..., RowWork]] = {
    NoCache: _no_cache,
    DualCache: _block_refresh,
    PrefixCache: _block_refresh,
    VicinityCache: _block_refresh,
    MaxLogitCache: _max_logit,
    AdaptiveCache: _adaptive,
    IntervalCache: _interval,
}
