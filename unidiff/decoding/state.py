"""What a decode knows between passes: the tokens, what is still masked, and the progress of each modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidiff.decoding.blocks import block_ids, first_offset, joined_blocks
from unidiff.decoding.commit.base import BlockPass, BlockShares, CommitRule, GuardedRule, NamedRule, RuleMaker
from unidiff.decoding.config import RULES, ModalityDecoding
from unidiff.decoding.edits import TokenEdits
from unidiff.tokens import Modality, TokenBatch, Vocabulary


class ModalityProgress:
    """Where each row stands in the decode of one modality.

    Args:
        own: a commit rule of the caller's own in place of the settings' choice of positions.
        host: `batch` on the CPU, where the order of blocks is worked out.
    Attributes:
        targets: bool `[B, L]`, the modality's. rule: decides which of them a pass fills.
        blocks: int64 `[B, L]`, see `block_ids`. shares: their passes.
        block: int64 `[B]`, the one being decoded, -1 before the first. reached: the furthest that was begun; `block` is
            an earlier one while tokens that were masked again are filled.
        made: int64 `[B]`, passes made in the furthest block. start: positions that were masked when it began.
        active: bool `[B, L]`, positions of that block that may be filled in this pass. running: bool `[B]`, rows that
            take part in it.
        remasked: int64 `[B]`, how many tokens of the row were masked again.
        edits: of the current block, where the settings ask for it.
        joined: int64 `[B]`, blocks in flight behind the current one. ahead: bool `[B, L]`, their masked positions.
    """

    def __init__(
        self,
        modality: Modality,
        settings: ModalityDecoding,
        batch: TokenBatch,
        own: CommitRule | RuleMaker | None = None,
        host: TokenBatch | None = None,
    ) -> None:
        self.modality, self.settings = modality, settings
        self.targets = batch.targets & (batch.modality == modality)
        rule: NamedRule = RULES[settings.rule](settings, self.targets)
        if isinstance(own, RuleMaker):
            self.rule = own.start(settings, self.targets)
        else:
            self.rule = rule if own is None else GuardedRule(rule, own)
        length, size = settings.block_length, self.targets.sum(1)
        self.blocks = torch.zeros_like(batch.ids)
        if length is not None:
            own_rows = batch if host is None else host
            targets = own_rows.targets & (own_rows.modality == modality)
            self.blocks = block_ids(own_rows, targets, length, settings.block_order).to(batch.ids.device)
        aligned = length is not None and settings.block_order == "aligned"
        offset = first_offset(batch, self.targets, length) if aligned and length is not None else None
        self.shares = BlockShares(settings.steps, size, length, rule.capped, offset)
        self._joining = min(settings.blocks_in_flight, batch.shape[1]) - 1  # most blocks besides the current one
        zero = torch.zeros_like(size)
        self.block = self.reached = zero - 1
        self.made = self.start = self.remasked = self.joined = zero
        self.edits = None if settings.edit_threshold is None else TokenEdits.of(settings, zero)
        self._over = zero  # blocks whose passes are all made; more than 0 with `writes_mask` alone
        self.active = self.ahead = torch.zeros_like(self.targets)
        self.running = zero.bool()

    def begin_pass(self, masked: Tensor, waiting: Tensor) -> BlockPass:
        """Find the block each row works on: the lowest with a masked position. Rows in `waiting` `[B]` pause."""
        own = masked & self.targets & ~waiting[:, None]
        none = torch.iinfo(torch.long).max
        block = torch.where(own & (self.blocks >= self._over[:, None]), self.blocks, none).amin(1)  # [B]
        pending = self.pending & ~waiting
        block = torch.where(pending, self.block, block)
        self.active = own & (self.blocks == block[:, None])
        late = self.settings.writes_mask and self.rule.planned  # what earlier blocks have left is filled besides
        if late:
            stays = (own & (self.blocks <= self.block[:, None])).any(1) & (self.block >= self._over)
            block = torch.where(stays, self.block, block)
            self.active = own & (self.blocks <= block[:, None]) & (block != none)[:, None]
        self.running = self.active.any(1) | pending
        self.block = torch.where(self.running, block, self.block)
        begun, remaining = self.running & (block > self.reached), self.active.sum(1)
        self.reached = torch.where(begun, block, self.reached)
        self.made = torch.where(begun, 0, self.made)
        size = (self.active & (self.blocks == block[:, None])).sum(1) if late else remaining
        self.start = torch.where(begun, size, self.start)
        if self.edits is not None:
            self.edits.begin_pass(begun)
        if self._joining > 0:
            share = self.settings.flight_share
            self.joined = joined_blocks(self.blocks, self.targets, own, block, self._joining, share)
            self.ahead = own & ~self.active & (self.blocks <= (block + self.joined)[:, None])
        return BlockPass(self.active, self.start, remaining, self.step, self.steps)

    def hold(self, rows: Tensor) -> None:
        """Rows `[B]` in which the cache policy shows no logits in this pass: it does not count."""
        self.running = self.running & ~rows

    def end_pass(self) -> None:
        if self.edits is not None:
            self.edits.end_pass(self.running & ~self.active.any(1))
        self.made = self.made + (self.running & (self.block == self.reached)).long()

    def given_up(self, masked: Tensor) -> Tensor:
        """bool `[B, L]`: what stays masked because the passes of its block are made (`writes_mask`)."""
        own, limit = masked & self.targets, self.steps if self.rule.planned else self.settings.block_steps
        if limit is None:
            return own & False
        done = self.running & (self.made >= limit)
        self._over = torch.where(done, self.block + 1, self._over)
        if self.rule.planned:  # with the last block
            return own & (self._over > self.blocks.where(self.targets, -1).amax(1))[:, None]
        return own & (self.blocks < self._over[:, None])

    @property
    def step(self) -> Tensor:
        """int64 `[B]`: passes made in the current block; all of them where it was complete before."""
        return torch.where(self.block < self.reached, self.steps, self.made)

    @property
    def steps(self) -> Tensor:
        """int64 `[B]`: passes planned for the current block; 1 for rows without targets."""
        return self.shares.own(self.block.clamp_min(0)).clamp_min(1)

    @property
    def pending(self) -> Tensor:
        """bool `[B]`: rows whose block has passes left although nothing may be masked (ReMDM may mask tokens again, editing
        replace them)."""
        if self.edits is not None:
            return (self.block >= 0) & self.edits.pending
        if self.settings.remask != "remdm":
            return torch.zeros_like(self.running)
        return (self.block >= 0) & (self.step < self.steps)

    @property
    def most_edits(self) -> int:
        """Most passes that only replace tokens, of all rows together."""
        return 0 if self.edits is None else len(self.block) * (1 + int(self.blocks.max())) * self.settings.edit_passes

    def editable(self, masked: Tensor) -> Tensor:
        """bool `[B, L]`: decoded tokens of the current block."""
        return self.in_block & ~masked

    def settled(self, masked: Tensor) -> Tensor:
        """bool `[B]`: rows whose current block is complete and no longer changed."""
        return ~((masked & self.targets & (self.blocks == self.block[:, None])).any(1) | self.pending)

    @property
    def foretold(self) -> bool:
        """Whether the rule, one of the named ones, fills numbers of positions that are known beforehand, and remasks as many."""
        own, known = self.settings, self.rule.foretold and type(self.rule) is RULES[self.settings.rule]
        plain = self.edits is None and not own.writes_mask and own.blocks_in_flight == 1
        return known and plain and own.remask != "confidence"

    @property
    def in_block(self) -> Tensor:
        """bool `[B, L]`: targets of the blocks that running rows work on."""
        block, last = self.block[:, None], (self.block + self.joined)[:, None]
        return self.targets & (self.blocks >= block) & (self.blocks <= last) & self.running[:, None]

    def left(self, masked: Tensor) -> Tensor:
        """float64 `[B]`: share of the targets that is masked; 0 where there are none."""
        return (masked & self.targets).sum(1).double() / self.targets.sum(1).clamp_min(1)

    def time(self, masked: Tensor) -> Tensor:
        """float64 `[B]` in [0, 1], diffusion time at this pass: 1 = all masked.

        The share of the planned passes still to come, or of the positions still masked where the rule plans none.
        """
        if not self.rule.planned:
            return self.left(masked)
        block = self.reached.clamp_min(0)
        done = self.shares.before(block) + torch.minimum(self.made, self.shares.own(block))
        return 1 - done.double() / self.shares.total


@dataclass
class PassWork:
    """What one modality does in one pass.

    Attributes:
        candidates: bool `[B, L]`, positions whose logits are asked for.
        decided: all candidates are filled whatever the model says (rules that do not look at confidences).
        quota: int64 `[B]`. time: float64 `[B]`. scale: guidance `[B]`.
        rows: bool `[B]`, those with candidates. guided_rows: those of them with scale != 1.
        width: most candidates in a row, rounded up so that few different shapes occur. guided: there are guided rows.
    """

    progress: ModalityProgress
    candidates: Tensor
    decided: bool
    quota: Tensor
    time: Tensor
    scale: Tensor
    rows: Tensor = field(init=False)
    guided_rows: Tensor = field(init=False)
    width: int = 0
    guided: bool = False

    def shown(self, logits: Tensor | None) -> Tensor:
        """bool `[B, L]`: the candidates whose `logits` a policy shows, None for all; rows in which it shows none are held."""
        if logits is None:
            return self.candidates
        shown = self.candidates & logits
        self.progress.hold(self.rows & ~shown.any(1))
        return shown

    def foretold(self, shown: Tensor) -> Tensor:
        """bool `[B, L]`: as many of the `shown` candidates as a rule fills whose numbers are known beforehand."""
        return shown if self.decided else shown & (shown.long().cumsum(1) <= self.quota[:, None])


@dataclass
class DecodeState:
    """The decode between two passes. Policies read it, callbacks see a `DecodeView` of it; only the sampler writes.

    Attributes:
        batch: current tokens, [MASK] at masked positions.
        masked: bool `[B, L]`, targets still masked. frozen: those that may not be masked again (end-of-text fill).
        just_unmasked: bool `[B, L]`, filled in the last pass.
        confidence: float32 `[B, L]`, probability of each decoded token when it was committed; 1 at known tokens
            and end-of-text fill, 0 while masked. recomputed: bool `[B, L]`, see `CachePlan.recomputed`; for callbacks.
        progress: one per modality that has targets.
        exists: bool `[B, L]`, tokens of any stream; the unconditional rows may be longer than those of the batch.
        step: passes begun, counting those that needed no forward. nfe: network evaluations, guidance streams counted.
        finishing: the next pass fills everything that is masked. reopened: tokens that callbacks masked again.
        streams: guidance streams that the coming pass may mix in; 0 is the conditional one.
        users: bool `[B]` per stream, rows that need it in the coming pass; one object where they are the same rows.
        max_logits: per stream `[B, L]`, the largest logit of a position in its modality's slice when the head last saw
            it, NaN where it never did; kept for policies that ask for it.
    """

    batch: TokenBatch
    masked: Tensor
    frozen: Tensor
    just_unmasked: Tensor
    confidence: Tensor
    recomputed: Tensor
    exists: Tensor
    progress: dict[Modality, ModalityProgress] = field(default_factory=dict)
    step: int = 0
    nfe: int = 0
    finishing: bool = False
    reopened: int = 0
    streams: tuple[int, ...] = (0,)
    users: dict[int, Tensor] = field(default_factory=dict)
    max_logits: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls, hidden: TokenBatch, progress: dict[Modality, ModalityProgress], others: Sequence[Tensor] = ()
    ) -> DecodeState:
        """`hidden` is the request with every target masked; others: bool `[B, L]`, tokens of the unconditional rows."""
        nowhere, exists = torch.zeros_like(hidden.given), hidden.valid
        for valid in others:
            exists = exists | valid
        return cls(
            hidden, hidden.targets.clone(), nowhere, nowhere, (~hidden.targets).float(), nowhere, exists, progress
        )

    @property
    def ids(self) -> Tensor:
        """int64 `[B, L]`."""
        return self.batch.ids

    @property
    def committed(self) -> Tensor:
        """bool `[B, L]`: decoded targets, which remasking may revise."""
        return self.batch.targets & ~self.masked & ~self.frozen

    @property
    def unfinished(self) -> Tensor:
        """bool `[B]`: rows that are not complete."""
        return torch.stack([self.masked.any(1), *(progress.pending for progress in self.progress.values())]).any(0)

    def write(self, index: Tensor, pick: Tensor, token: Tensor, confidence: Tensor, mask_id: int = -1) -> None:
        """Put tokens at the picked entries of an index `[B, n]`; where [MASK] is written, a position is masked."""
        hidden = pick & (token == mask_id)
        confidence = confidence.masked_fill(hidden, 0.0)
        ids = torch.where(pick, token, self.ids.gather(1, index))
        sure = torch.where(pick, confidence.float(), self.confidence.gather(1, index))
        self.batch = self.batch.replace(ids=self.ids.scatter(1, index, ids))
        self.confidence = self.confidence.scatter(1, index, sure)
        nowhere = torch.zeros_like(self.masked)
        filled, again = nowhere.scatter(1, index, pick), nowhere.scatter(1, index, hidden)
        self.masked, self.just_unmasked = (self.masked & ~filled) | again, self.just_unmasked | filled

    def mask_again(self, where: Tensor, mask_id: int) -> None:
        """Committed tokens at `where` bool `[B, L]` become masked."""
        self._put(where, mask_id, 0.0)
        self.masked = self.masked | where

    def fill(self, where: Tensor, token: int) -> None:
        """Put one token at masked positions."""
        self._put(where, token, 1.0)
        self.masked, self.just_unmasked = self.masked & ~where, self.just_unmasked | where

    def freeze(self, where: Tensor, token: int) -> None:
        """Fill masked positions at `where` for good, with a token that was not decoded."""
        self._put(where, token, 1.0)
        self.masked, self.frozen = self.masked & ~where, self.frozen | where

    def leave(self, where: Tensor) -> None:
        """Positions bool `[B, L]` stay masked for good."""
        self.masked, self.frozen = self.masked & ~where, self.frozen | where

    def heed(self, answer: object, vocabulary: Vocabulary) -> bool:
        """Do what a callback answers, see `Callback`; after a False nothing but one last pass follows. Whether it asked for a change.

        Raises:
            ValueError: ids of another shape or dtype, a change of a given token, or an id that its position cannot hold.
        """
        if isinstance(answer, Mapping) and "ids" in answer and not self.finishing:
            self._rewrite(answer["ids"], vocabulary)
        self.finishing = self.finishing or declines(answer)
        return self.finishing or isinstance(answer, Mapping)

    def _rewrite(self, ids: Any, vocabulary: Vocabulary) -> None:
        if not isinstance(ids, Tensor) or ids.shape != self.ids.shape or ids.dtype != torch.long:
            found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"the callback returned ids as {found}; expected int64 {tuple(self.ids.shape)}")
        ids = ids.to(self.ids.device)
        changed, fits = ids != self.ids, torch.zeros_like(self.masked)
        opened = torch.zeros_like(changed)
        for modality, progress in self.progress.items():
            (start, stop), mask = vocabulary.range_of(modality), ids == vocabulary.mask_of(modality)
            fits |= progress.targets & ((ids >= start) & (ids < stop) | mask)
            opened |= changed & progress.targets & mask
            progress.rule.forget(changed & progress.targets & mask)
        if bool((changed & ~fits).any()):
            raise ValueError("the callback changed a given token, or wrote an id that its position cannot hold")
        written = changed & ~opened
        self.batch = self.batch.replace(ids=ids)
        self.confidence = torch.where(written, 1.0, torch.where(opened, 0.0, self.confidence))
        self.masked, self.frozen = (self.masked & ~written) | opened, self.frozen & ~changed
        self.just_unmasked = (self.just_unmasked & ~opened) | written
        self.reopened += int(opened.sum())

    def _put(self, where: Tensor, token: int, confidence: float) -> None:
        self.batch = self.batch.replace(ids=torch.where(where, token, self.ids))
        self.confidence = torch.where(where, confidence, self.confidence)


def own_copy(batch: TokenBatch) -> TokenBatch:
    """The same batch in tensors of its own."""
    return batch.each(Tensor.clone)


class DecodeView:
    """A decode after one of its passes, for callbacks. Tensors are copies, made when they are asked for: writing in them
    changes nothing, and a view that is kept does not change with the passes to come.

    `open`: targets still masked, `written`: filled in the last pass, `settled`: not to be masked again; others as in `DecodeState`.
    """

    __slots__ = ("_state",)
    _state: DecodeState
    batch: TokenBatch
    ids: Tensor
    open: Tensor
    written: Tensor
    settled: Tensor
    committed: Tensor
    confidence: Tensor
    recomputed: Tensor
    step: int
    nfe: int
    finishing: bool

    def __init__(self, state: DecodeState) -> None:
        object.__setattr__(self, "_state", replace(state))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} of a decode cannot be set by a callback; it may only look on, or return False")

    def __getattr__(self, name: str) -> object:
        if name.startswith("_") or name not in self.__annotations__:
            raise AttributeError(f"a DecodeView has no {name!r}")
        names = {"open": "masked", "settled": "frozen", "written": "just_unmasked"}
        value = getattr(self._state, names.get(name, name))
        if isinstance(value, TokenBatch):
            return own_copy(value)
        return value.clone() if isinstance(value, Tensor) else value


Callback = Callable[[int, DecodeView], object]
"""`callback(step, view)` after each pass, from 0. False fills the rest in one last pass. `{"ids": ids}`, int64 `[B, L]`, puts
other tokens at targets: they count as decoded, those that become [MASK] as still to be."""


def declines(answer: object) -> bool:
    """Whether a callback's answer is False, of Python, NumPy or torch. Anything else, None above all, goes on."""
    if isinstance(answer, Tensor):
        return answer.dtype == torch.bool and answer.numel() == 1 and not bool(answer)
    return isinstance(answer, bool | np.bool_) and not answer
