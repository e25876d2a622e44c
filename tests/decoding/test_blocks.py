"""Blocks: sizes, orders and how passes are shared out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.blocks import block_ids, block_steps, current_block
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(5, 4)


def image_batch(height: int, width: int) -> TokenBatch:
    return TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_image((height, width), VOCABULARY)]])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from(["sequence", "checkerboard", "coarse"]))
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


def test_known_tokens_and_padding_use_up_nothing() -> None:
    known = torch.tensor([True, False, False, True, False, False, True, False])
    batch = TokenBatch.from_spans([[Span.text(torch.arange(8) % 5, known)]]).pad_to(11)
    assert block_ids(batch, batch.targets, 2)[batch.targets].tolist() == [0, 0, 1, 1, 2]


@given(st.integers(1, 40), st.integers(1, 12))
def test_passes_are_split_evenly(steps: int, blocks: int) -> None:
    count, block = torch.full((blocks,), blocks), torch.arange(blocks)
    own, before = block_steps(steps, count, block)
    assert (own >= 1).all() and own.max() - own.min() <= 1
    if steps >= blocks:
        assert own.sum() == steps and before.tolist() == [0, *own.cumsum(0).tolist()[:-1]]


def test_current_block_is_the_lowest_open_one() -> None:
    blocks = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    open_ = torch.tensor([[False, False, False, True], [True, False, False, True]])
    assert current_block(blocks, open_).tolist() == [1, 0]


@pytest.mark.parametrize("order", ["sequence", "checkerboard", "coarse"])
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
