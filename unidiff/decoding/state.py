"""What a decode knows between passes: the tokens, what is still open, and one clock per modality."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unidiff.decoding.blocks import Shares, block_ids, current_block, joined_blocks
from unidiff.decoding.commit.credit import Credit
from unidiff.decoding.config import ModalityDecoding
from unidiff.tokens import Modality, TokenBatch


@dataclass
class Clock:
    """Where each row stands in the decode of one modality.

    Attributes:
        wanted: bool `[B, L]`, the modality's targets.
        blocks: int64 `[B, L]`, see `block_ids`. shares: their passes.
        block: int64 `[B]`, the one being decoded, -1 before the first. reached: the furthest that was begun; `block` is
            an earlier one while tokens that were masked again are filled.
        made: int64 `[B]`, passes made in the furthest block. start: positions that were masked when it began.
        active: bool `[B, L]`, positions of that block that may be filled in this pass. running: bool `[B]`, rows that
            take part in it.
        remasked: int64 `[B]`, how many tokens of the row were masked again.
        joined: int64 `[B]`, blocks in flight behind the current one. ahead: bool `[B, L]`, their open positions.
        in_flight: most blocks at once. credit: what tokens have earned, for the rule of that name.
    """

    modality: Modality
    settings: ModalityDecoding
    wanted: Tensor
    blocks: Tensor
    shares: Shares
    block: Tensor
    reached: Tensor
    made: Tensor
    start: Tensor
    active: Tensor
    running: Tensor
    remasked: Tensor
    joined: Tensor
    ahead: Tensor
    in_flight: int = 1
    credit: Credit | None = None

    @classmethod
    def open(cls, modality: Modality, settings: ModalityDecoding, batch: TokenBatch) -> Clock:
        wanted = batch.targets & (batch.modality == modality)
        blocks = block_ids(batch, wanted, settings.block_length, settings.block_order)
        size = wanted.sum(1)
        shares = Shares.of(settings.steps, size, settings.block_length, settings.rule == "quota")
        zero = torch.zeros_like(size)
        nowhere, never = torch.zeros_like(wanted), torch.zeros_like(zero, dtype=torch.bool)
        credit = Credit(wanted, settings) if settings.rule == "credit" else None
        return cls(
            modality,
            settings,
            wanted,
            blocks,
            shares,
            zero - 1,
            zero - 1,
            zero,
            zero,
            nowhere,
            never,
            zero,
            zero,
            nowhere,
            min(settings.blocks_in_flight, batch.shape[1]),
            credit,
        )

    def begin_pass(self, open_: Tensor, waiting: Tensor) -> None:
        """Find the block each row works on: the lowest with an open position. Rows in `waiting` `[B]` pause."""
        own = open_ & self.wanted & ~waiting[:, None]
        block = current_block(self.blocks, own)
        pending = self.pending & ~waiting
        block = torch.where(pending, self.block, block)
        self.active = own & (self.blocks == block[:, None])
        self.running = self.active.any(1) | pending
        self.block = torch.where(self.running, block, self.block)
        begun = self.running & (block > self.reached)
        self.reached = torch.where(begun, block, self.reached)
        self.made = torch.where(begun, 0, self.made)
        self.start = torch.where(begun, self.remaining, self.start)
        if self.in_flight > 1:
            most, share = self.in_flight - 1, self.settings.flight_share
            self.joined = joined_blocks(self.blocks, self.wanted, own, block, most, share)
            self.ahead = own & ~self.active & (self.blocks <= (block + self.joined)[:, None])

    def hold(self, rows: Tensor) -> None:
        """Rows `[B]` in which the cache policy shows no logits in this pass: it does not count."""
        self.running = self.running & ~rows

    def end_pass(self) -> None:
        self.made = self.made + (self.running & (self.block == self.reached)).long()

    @property
    def step(self) -> Tensor:
        """int64 `[B]`: passes made in the current block; all of them where it was complete before."""
        return torch.where(self.block < self.reached, self.steps, self.made)

    @property
    def pending(self) -> Tensor:
        """bool `[B]`: rows whose block has passes left although nothing may be open (ReMDM may mask tokens again)."""
        if self.settings.remask != "remdm":
            return torch.zeros_like(self.running)
        return (self.block >= 0) & (self.step < self.steps)

    @property
    def remaining(self) -> Tensor:
        """int64 `[B]`: open positions of the current block."""
        return self.active.sum(1)

    @property
    def in_block(self) -> Tensor:
        """bool `[B, L]`: targets of the blocks that running rows work on."""
        block, last = self.block[:, None], (self.block + self.joined)[:, None]
        return self.wanted & (self.blocks >= block) & (self.blocks <= last) & self.running[:, None]

    @property
    def steps(self) -> Tensor:
        """int64 `[B]`: passes planned for the current block."""
        return self.shares.own(self.block.clamp_min(0))

    def time(self, open_: Tensor) -> Tensor:
        """float64 `[B]` in [0, 1], diffusion time at this pass: 1 = all masked.

        The share of the planned passes still to come, or of the positions still open where the rule plans none.
        """
        if self.settings.rule in ("quota", "ancestral"):
            block = self.reached.clamp_min(0)
            done = self.shares.before(block) + torch.minimum(self.made, self.shares.own(block))
            return 1 - done.double() / self.shares.total
        return (open_ & self.wanted).sum(1).double() / self.wanted.sum(1).clamp_min(1)


@dataclass
class DecodeState:
    """The decode between two passes. Policies read it, callbacks see a `DecodeView` of it; only the sampler writes.

    Attributes:
        batch: current tokens, [MASK] at open positions.
        open: bool `[B, L]`, targets still masked.
        settled: bool `[B, L]`, targets that may not be masked again (end-of-text fill).
        written: bool `[B, L]`, filled in the last pass.
        confidence: float32 `[B, L]`, probability of each decoded token when it was committed; 1 at known tokens
            and end-of-text fill, 0 while open.
        clocks: one per modality that has targets.
        step: passes begun, counting those that needed no forward. nfe: network evaluations, guidance streams counted.
        finishing: the next pass fills everything that is open.
        streams: guidance streams that the coming pass mixes in; 0 is the conditional one.
        users: bool `[B]` per stream, rows that need it in the coming pass.
        peaks: per stream `[B, L]`, the largest logit of a position in its modality's slice when the head last saw it,
            NaN where it never did; kept for policies that ask for it.
    """

    batch: TokenBatch
    open: Tensor
    settled: Tensor
    written: Tensor
    confidence: Tensor
    clocks: dict[Modality, Clock] = field(default_factory=dict)
    step: int = 0
    nfe: int = 0
    finishing: bool = False
    streams: tuple[int, ...] = (0,)
    users: dict[int, Tensor] = field(default_factory=dict)
    peaks: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, hidden: TokenBatch, clocks: dict[Modality, Clock]) -> DecodeState:
        """`hidden` is the request with every target masked."""
        nowhere = torch.zeros_like(hidden.given)
        confidence = (~hidden.targets).float()
        return cls(hidden, hidden.targets.clone(), nowhere, nowhere, confidence, clocks)

    @property
    def ids(self) -> Tensor:
        """int64 `[B, L]`."""
        return self.batch.ids

    @property
    def committed(self) -> Tensor:
        """bool `[B, L]`: decoded targets, which remasking may revise."""
        return self.batch.targets & ~self.open & ~self.settled

    def alike(self) -> list[bool]:
        """Per stream of the coming pass, whether the same rows need it as the conditional one; read from the device."""
        if self.streams == (0,):
            return [True]
        return torch.stack([(self.users[s] == self.users[0]).all() for s in self.streams]).tolist()

    def write(self, index: Tensor, pick: Tensor, token: Tensor, confidence: Tensor) -> Tensor:
        """Put tokens at the picked entries of an index `[B, n]`; returns the filled positions bool `[B, L]`."""
        ids = torch.where(pick, token, self.ids.gather(1, index))
        sure = torch.where(pick, confidence.float(), self.confidence.gather(1, index))
        self.batch = self.batch.replace(ids=self.ids.scatter(1, index, ids))
        self.confidence = self.confidence.scatter(1, index, sure)
        filled = torch.zeros_like(self.open).scatter(1, index, pick)
        self.open = self.open & ~filled
        return filled

    def mask_again(self, where: Tensor, mask_id: int) -> None:
        """Committed tokens at `where` bool `[B, L]` become open."""
        self.batch = self.batch.replace(ids=torch.where(where, mask_id, self.ids))
        self.confidence = torch.where(where, 0.0, self.confidence)
        self.open = self.open | where

    def settle(self, where: Tensor, token: int) -> None:
        """Fill open positions at `where` for good, with a token that was not decoded."""
        self.batch = self.batch.replace(ids=torch.where(where, token, self.ids))
        self.confidence = torch.where(where, 1.0, self.confidence)
        self.open = self.open & ~where
        self.settled = self.settled | where
