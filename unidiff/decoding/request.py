"""`Request`: everything one call of the sampler owns. Nothing of it lives in the sampler, the model or the process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unidiff.decoding.cache.base import RefreshPolicy
from unidiff.decoding.config import SamplerConfig
from unidiff.decoding.draw import RowNoise
from unidiff.decoding.eos import EndOfText
from unidiff.decoding.forward import Forward
from unidiff.decoding.graphs import PassGraphs
from unidiff.decoding.guidance import full_scale, hidden_from
from unidiff.decoding.state import Clock, DecodeState
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary

if TYPE_CHECKING:
    from unidiff.decoding.sampler import Work

_PATIENCE = 64  # passes in a row in which a policy may withhold every logit
_WIDTHS = 8  # different gather widths per modality; varying shapes cost memory and recompilation


@dataclass
class Request:
    """State, streams, noise and bookkeeping of one decode.

    Attributes:
        stream_of: unconditional stream of each modality with targets. further: those that are mixed in besides.
        targets: most positions of a block.
        sound: bool scalar, False once a model returned logits that cannot be used.
        most: passes that may write, see `_most_passes`; wrote: those that did.
        stalled: passes in a row that wanted logits and wrote nothing. busy: the coming pass wants logits.
        unfinished: int64, rows that are not finished, and some that are so that their number takes few values; None for all.
    """

    state: DecodeState
    forward: Forward
    noise: RowNoise
    stream_of: dict[Modality, int]
    end_of_text: EndOfText | None
    order: str
    targets: dict[Modality, int]
    sound: Tensor
    most: int
    further: tuple[int, ...] = ()
    wrote: int = 0
    stalled: int = 0
    busy: bool = False
    unfinished: Tensor | None = None

    @classmethod
    def open(
        cls,
        model: Denoiser,
        vocabulary: Vocabulary,
        config: SamplerConfig,
        batch: TokenBatch,
        seeds: Tensor,
        condition: Tensor | None,
        policy: RefreshPolicy | None = None,
        unconditional: TokenBatch | Sequence[TokenBatch] | None = None,
        graphs: PassGraphs | None = None,
    ) -> Request:
        if condition is not None and (condition.shape != batch.ids.shape or condition.dtype != torch.bool):
            raise ValueError(
                f"condition has shape {tuple(condition.shape)} and dtype {condition.dtype}; expected bool {batch.shape}"
            )
        others = (unconditional,) if isinstance(unconditional, TokenBatch) else tuple(unconditional or ())
        _check_unconditional(others, batch, condition, config.guidance.further)
        noise = RowNoise(seeds, batch.valid)
        clocks, targets, hides, stream_of = {}, {}, [], {}
        for modality, settings in ((Modality.TEXT, config.text), (Modality.IMAGE, config.image)):
            clock = Clock.open(modality, settings, batch)
            most = int(clock.wanted.sum(1).max())
            if not most:
                continue
            start, stop = vocabulary.range_of(modality)
            if start == stop:
                raise ValueError(f"the batch has {modality.name.lower()} targets, but the vocabulary has no such ids")
            clocks[modality], targets[modality] = clock, min(most, settings.block_length or most)
            hides.append(hidden_from(config.guidance, modality, batch, condition))
            stream_of[modality] = len(hides)
        if len(hides) == 2 and (others or bool((hides[0] == hides[1]).all())):  # one serves both
            hides.pop()
            stream_of = dict.fromkeys(stream_of, 1)
        unguided = all(full_scale(config.guidance, modality) == 1 for modality in clocks)
        if unguided and not config.guidance.further:  # no memory for unused streams
            hides, others = [], ()
        ends = [i for i in (vocabulary.specials.get("eos"), *config.ends) if i is not None]
        stops = config.stop_at_eos and Modality.TEXT in clocks and bool(ends)
        state = DecodeState.start(batch.hide_targets(vocabulary), clocks)
        return cls(
            state,
            Forward(model, vocabulary, batch, hides, policy, state.peaks, others, graphs),
            noise,
            stream_of,
            EndOfText(batch, ends, ends[0] if config.fill is None else config.fill) if stops else None,
            config.order,
            targets,
            torch.ones((), dtype=torch.bool, device=batch.ids.device),
            sum(_most_passes(clock) for clock in clocks.values()),
            tuple(range(2, 1 + len(others))),
        )

    def waiting(self, modality: Modality) -> Tensor:
        """bool `[B]`: rows whose other modality goes first, or is behind, and is not complete."""
        clocks = self.state.clocks
        if self.order == "level" and len(clocks) == 2 and not self.state.finishing:
            other = next(clock for name, clock in clocks.items() if name != modality)
            return self._share(clocks[modality]) > self._share(other)
        first = {"text_first": Modality.TEXT, "image_first": Modality.IMAGE}.get(self.order)
        if first is None or first == modality or first not in clocks or self.state.finishing:
            return torch.zeros_like(self.state.open[:, 0])
        leader = clocks[first]
        return (self.state.open & leader.wanted).any(1) | leader.pending

    def _share(self, clock: Clock) -> Tensor:
        """float64 `[B]`: decoded share of the targets of a modality; 1 where there are none."""
        size = clock.wanted.sum(1)
        left = (self.state.open & clock.wanted).sum(1)
        return 1 - left.double() / size.clamp_min(1)

    def synchronise(self, work: Sequence[Work], complaint: Callable[[DecodeState, Forward], str]) -> bool:
        """Read the flags of a pass from the device in one go; False when nothing is left to do.

        Args:
            complaint: says why logits could not be used.

        Raises:
            ValueError: the last pass met logits that cannot be used.
            RuntimeError: a policy withholds every logit, pass after pass.
        """
        state = self.state
        alive = state.open.any(1)  # [B]
        if not state.finishing:
            for w in work:
                alive = alive | w.clock.pending
        flags = [alive.sum(), self.sound, state.written.any()]
        for w in work:
            flags += [w.candidates.sum(1).max(), (w.scale != 1).any()]
        left, sound, wrote, *rest = torch.stack([f.long() for f in flags]).tolist()
        if not sound:
            raise ValueError(complaint(state, self.forward))
        self.stalled = 0 if wrote or not self.busy else self.stalled + 1
        self.wrote += wrote
        if self.wrote > self.most:
            raise ValueError(
                f"more than {self.most} passes wrote tokens, which no settings ask for; a cache policy of your own writes in "
                "the state of the decode, which it may only read"
            )
        for w, most, guided in zip(work, rest[::2], rest[1::2], strict=True):
            unit = math.ceil(self.targets[w.clock.modality] / _WIDTHS)
            w.width = min(unit * math.ceil(most / unit), state.open.shape[1])
            w.guided = bool(guided) or bool(self.further)
        self.busy = any(w.width for w in work)
        if left and self.stalled > _PATIENCE:
            raise RuntimeError(
                f"nothing was decoded in {self.stalled} passes; the cache policy never asks for logits at the open positions"
            )
        rows, unit = len(alive), math.ceil(len(alive) / _WIDTHS)
        kept = unit * math.ceil(left / unit)
        self.unfinished = (~alive).long().argsort(stable=True)[:kept] if kept < rows else None
        return bool(left)

    def streams(self, work: Sequence[Work]) -> list[int]:
        """The conditional stream and the unconditional ones that this pass mixes in."""
        guided = [w for w in work if w.guided]
        return sorted({0, *(self.stream_of[w.clock.modality] for w in guided), *(self.further if guided else ())})

    def users(self, work: Sequence[Work]) -> dict[int, Tensor]:
        """bool `[B]` per stream: rows that have a use for it in this pass."""
        rows = [w.candidates.any(1) for w in work]  # [B] each
        users = {0: torch.stack(rows).any(0)}
        for w, own in zip(work, rows, strict=True):
            guided = own if self.further else own & (w.scale != 1)
            for stream in (self.stream_of[w.clock.modality], *self.further) if w.guided else ():
                users[stream] = users[stream] | guided if stream in users else guided
        return users

    def time(self, work: Sequence[Work]) -> Tensor:
        """Diffusion time `[B]` for time-conditioned models: that of the row's modality which is furthest behind.

        A modality of which a row has nothing to fill, or nothing left, does not count.
        """
        busy = [(self.state.open & w.clock.wanted).any(1) | w.clock.pending for w in work]
        return torch.stack([torch.where(row, w.time, 0.0) for row, w in zip(busy, work, strict=True)]).amax(0)

    def end_pass(self) -> None:
        state = self.state
        if self.end_of_text is not None:
            state.settle(self.end_of_text.closed(state.ids, state.open), self.end_of_text.fill)
        for clock in state.clocks.values():
            clock.end_pass()
        state.step += 1


def _most_passes(clock: Clock) -> int:
    """Passes that may write tokens of a modality: one per token, those of its plan, and one per token masked again."""
    targets, planned = torch.stack([clock.wanted.sum(), clock.shares.total.max()]).tolist()
    return targets + planned + len(clock.wanted) * clock.settings.remask_budget


def _check_unconditional(
    others: Sequence[TokenBatch], batch: TokenBatch, condition: Tensor | None, further: Sequence[float]
) -> None:
    """Raise `ValueError` unless `others` may stand in for `batch` in the unconditional streams."""
    if others and condition is not None:
        raise ValueError("condition and unconditional both say what the unconditional stream sees; give one of them")
    if max(1, len(others)) != 1 + len(further):
        raise ValueError(
            f"guidance has {1 + len(further)} scales for {len(others)} unconditional batches; `Guidance.further` takes a "
            "scale for each after the first"
        )
    for rows in others:
        if rows.shape != batch.shape:
            raise ValueError(f"unconditional has shape {rows.shape}; expected {batch.shape}, that of the batch")
        if not torch.equal(rows.targets, batch.targets):
            raise ValueError(
                "unconditional has other targets than the batch; align the rows, for instance by left padding"
            )
