"""Blocks: sizes, orders and how passes are shared out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.blocks import block_ids, first_offset, halton_ranks
from unidiff.decoding.commit.base import BlockShares
from unidiff.decoding.config import BLOCK_ORDERS
from unidiff.decoding.state import ModalityProgress
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(5, 4)
FULL = [order for order in BLOCK_ORDERS if order != "aligned"]


def image_batch(height: int, width: int) -> TokenBatch:
    return TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_image((height, width), VOCABULARY)]])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from(FULL))
def test_every_block_is_full_but_the_last(height: int, width: int, length: int, order: str) -> None:
    batch = image_batch(height, width)
    blocks = block_ids(batch, batch.targets, length, order)[batch.targets]
    sizes = torch.bincount(blocks).tolist()
    assert sizes[:-1] == [length] * (len(sizes) - 1) and 1 <= sizes[-1] <= length
    assert sum(sizes) == height * width


def test_orders_of_a_grid() -> None:
    batch = image_batch(4, 4)
    places = {
        o: block_ids(batch, batch.targets, 4, o)[0, 2:].view(4, 4) for o in ("sequence", "checkerboard", "coarse")
    }
    assert places["sequence"].tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
    even = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert (places["checkerboard"][even] < 2).all() and (places["checkerboard"][~even] >= 2).all()
    assert places["coarse"][::2, ::2].tolist() == [[0, 0], [0, 0]]  # the grid of every second cell comes first
    assert (block_ids(batch, batch.targets, 1, "coarse")[0, 2:].view(4, 4)[0, 0]) == 0


def test_halton_order_covers_the_grid_evenly() -> None:
    """Points (0, 0), (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), ... on 4 x 3 cells; every quadrant has its share of any first part."""
    assert halton_ranks(4, 3) == (0, 4, 8, 6, 10, 2, 9, 1, 5, 3, 7, 11)
    for height, width in ((8, 8), (16, 16), (5, 9), (1, 7)):
        ranks = torch.tensor(halton_ranks(height, width)).view(height, width)
        assert ranks.flatten().sort().values.tolist() == list(range(height * width))
        if height == width:
            for part in (height * width // 4, height * width // 2):
                early = (ranks < part).float().unfold(0, height // 2, height // 2).unfold(1, width // 2, width // 2)
                assert ((early.sum((2, 3)) - part / 4).abs() <= part / 16).all()


def test_halton_order_is_that_of_each_picture() -> None:
    """Other pictures in the row, and other rows of the batch, do not change it."""
    hidden = [Span.masked_image(size, VOCABULARY) for size in ((2, 3), (4, 4))]
    rows = [[Span.text([1], True), *hidden], [hidden[1]]]
    together = TokenBatch.from_spans(rows)
    ranks = block_ids(together, together.targets, 1, "halton")
    alone = [TokenBatch.from_spans([[span]]) for span in hidden]
    small, large = (block_ids(a, a.targets, 1, "halton")[0] for a in alone)
    assert small.tolist() == list(halton_ranks(2, 3)) and large.tolist() == list(halton_ranks(4, 4))
    assert ranks[1, :16].tolist() == large.tolist()
    first, second = ranks[0, 1:7], ranks[0, 7:23]  # merged by rank, each in its own order
    assert first.argsort().tolist() == small.argsort().tolist()
    assert second.argsort().tolist() == large.argsort().tolist()


def test_known_tokens_and_padding_use_up_nothing() -> None:
    known = torch.tensor([True, False, False, True, False, False, True, False])
    batch = TokenBatch.from_spans([[Span.text(torch.arange(8) % 5, known)]]).pad_to(11)
    assert block_ids(batch, batch.targets, 2)[batch.targets].tolist() == [0, 0, 1, 1, 2]


@given(st.integers(1, 300), st.integers(1, 80), st.one_of(st.none(), st.integers(1, 90)), st.booleans())
def test_passes_are_shared_in_proportion_to_the_blocks(steps: int, size: int, length: int | None, capped: bool) -> None:
    """In whole numbers, by hand: the total is `steps`, or one per block, or (capped) one per token."""
    full = min(length or size, size)
    sizes = [min(full, size - start) for start in range(0, size, full)]
    total = max(steps, len(sizes))
    total = min(total, size) if capped else total
    shares = BlockShares(steps, torch.tensor([size]), length, capped)
    own = [int(shares.own(torch.tensor([k]))) for k in range(len(sizes))]
    assert shares.total.tolist() == [total] == [sum(own)]
    assert [int(shares.before(torch.tensor([k]))) for k in range(len(sizes) + 1)] == [
        sum(own[:k]) for k in range(len(own) + 1)
    ]
    for passes, tokens in zip(own, sizes, strict=True):
        assert passes >= 1 and abs(passes - total * tokens / size) < 1
        assert not capped or passes <= tokens


def test_rows_share_by_their_own_sizes() -> None:
    """Six passes for 4 + 4 + 1 tokens: before the second block are due 6 x 4 / 9 = 2.7, before the third 5.3."""
    shares = BlockShares(6, torch.tensor([9, 4, 0, 1]), 4, capped=True)
    own = [shares.own(torch.tensor([block, 0, 0, 0])).tolist() for block in range(3)]
    assert shares.total.tolist() == [6, 4, 1, 1] and own == [[2, 4, 1, 1], [3, 4, 1, 1], [1, 4, 1, 1]]


def test_current_block_is_the_lowest_masked_one() -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(4, VOCABULARY)]] * 2)
    progress = ModalityProgress(Modality.TEXT, ModalityDecoding(block_length=2), batch)
    masked = torch.tensor([[False, False, False, True], [True, False, False, True]])
    now = progress.begin_pass(masked, torch.tensor([False, False]))
    assert progress.block.tolist() == [1, 0] and now.remaining.tolist() == [1, 1]


@pytest.mark.parametrize("order", BLOCK_ORDERS)
def test_image_blocks_are_finished_one_after_another(order: str) -> None:
    class Flat:
        def hidden(self, ids, modality, positions, attention_mask, time=None):
            return torch.zeros(*ids.shape, VOCABULARY.size)

        def head(self, hidden, start=0, stop=None):
            return hidden[..., start:stop]

    batch = image_batch(3, 5)
    decoding = ModalityDecoding(block_length=4, block_order=order, steps=8)
    out = Sampler(Flat(), VOCABULARY, SamplerConfig(image=decoding))(batch, torch.tensor([2]), record=True)
    blocks = block_ids(batch, batch.targets, 4, order)[0, 2:]
    for ids in out.trajectory:
        hidden = ids[0, 2:] == VOCABULARY.mask_id
        if hidden.any():
            now = blocks[hidden].min()
            assert hidden[blocks > now].all()
    assert out.steps == 8


@given(st.integers(0, 9), st.integers(1, 20), st.integers(1, 7), st.integers(1, 25))
def test_aligned_blocks_are_those_of_attention(prompt: int, tokens: int, length: int, steps: int) -> None:
    """The first may be shorter, by what the prompt has of it; each has a share of the passes, and together all."""
    rows = [[Span.text([1] * prompt, True), Span.masked_text(tokens, VOCABULARY)], [Span.masked_text(3, VOCABULARY)]]
    batch = TokenBatch.from_spans(rows, left=True)
    blocks, offset = block_ids(batch, batch.targets, length, "aligned"), first_offset(batch, batch.targets, length)
    own = blocks[0][batch.targets[0]]
    index = torch.arange(prompt, prompt + tokens) // length
    assert torch.equal(own, index - index[0]) and int(offset[0]) == prompt % length and int(offset[1]) == 0
    shares = BlockShares(steps, batch.targets.sum(1), length, False, offset)
    counts = torch.bincount(own).tolist()
    passes = [int(shares.own(torch.full((2,), n))[0]) for n in range(len(counts))]
    assert sum(passes) == int(shares.total[0]) == max(steps, len(counts))
    before = 0
    for n, count in enumerate(counts):
        assert int(shares.before(torch.full((2,), n))[0]) == sum(passes[:n]) == int(shares.total[0]) * before // tokens
        before += count
