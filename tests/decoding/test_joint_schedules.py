"""How text and image advance together, and blocks in flight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_cases import POLICIES, VOCABULARY, decode, make_model, rows, rows_alone, same

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, SamplerConfig
from unidiff.decoding.blocks import block_ids, joined_blocks
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    return make_model()


def decoded_shares(batch: TokenBatch, trajectory) -> dict[Modality, torch.Tensor]:
    """Share of the targets of each modality that is decoded, `[B]` per recorded state."""
    shares = {}
    for modality in (Modality.TEXT, Modality.IMAGE):
        wanted = batch.targets & (batch.modality == modality)
        left = torch.stack([((ids == VOCABULARY.mask_id) & wanted).sum(1) for ids in trajectory])  # [S, B]
        shares[modality] = 1 - left.double() / wanted.sum(1).clamp_min(1)
    return shares


@pytest.mark.parametrize("policy", ["none", "dual", "segments"])
def test_level_order_keeps_the_decoded_shares_together(model, policy):
    """The modality that is ahead waits; rows go by their own shares; schedules of any length end."""
    config = SamplerConfig(
        text=ModalityDecoding(rule="threshold", threshold=0.4, block_length=4),
        image=ModalityDecoding(steps=7),
        guidance=Guidance(1.5),
        order="level",
    )
    make = NoCache if policy == "none" else POLICIES[policy]
    together = rows_alone(model, config, make(), length=18)
    batch = TokenBatch.cat(rows()).pad_to(18)
    text, image = decoded_shares(batch, together.trajectory).values()
    moved = [share[1:] != share[:-1] for share in (text, image)]
    assert not (moved[0] & (text > image)[:-1]).any() and not (moved[1] & (image > text)[:-1]).any()
    unfinished = (torch.minimum(text, image) < 1)[:-1]
    assert (moved[0] | moved[1])[unfinished].all()  # some modality always works
    assert (text[-1] == 1).all() and (image[-1] == 1).all()


def test_level_order_leads_schedules_of_different_lengths_to_one_end(model):
    """3 passes of text and 9 of image: in every pass but those where one waits, and both end in the last."""
    batch = TokenBatch.from_spans(
        [[Span.text([3], True), Span.masked_text(3, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)]]
    )
    fixed = ModalityDecoding(steps=3, schedule="fixed")
    config = SamplerConfig(text=fixed, image=replace(fixed, steps=9), order="level", stop_at_eos=False)
    out = decode(model, config, NoCache(), batch, [0])
    text, image = decoded_shares(batch, out.trajectory).values()
    assert [round(3 * s) for s in text[:, 0].tolist()] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [round(9 * s) for s in image[:, 0].tolist()] == list(range(10))
    lockstep = decode(model, replace(config, order="together"), NoCache(), batch, [0])
    text, image = decoded_shares(batch, lockstep.trajectory).values()
    assert [round(3 * s) for s in text[:, 0].tolist()] == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]


def test_blocks_join_when_the_one_before_is_mostly_decoded():
    blocks = torch.arange(12).div(3, rounding_mode="floor").repeat(3, 1)
    wanted = torch.ones_like(blocks, dtype=torch.bool)
    open_ = torch.tensor(
        [
            [True, True, False, False, True, True, True, True, True, True, True, True],
            [False, False, True, False, False, True, True, True, True, True, True, True],
            [False, False, False, False, True, False, False, False, False, True, True, True],
        ]
    )
    current = torch.tensor([0, 0, 1])
    for share, most, expected in ((0.5, 3, [0, 2, 2]), (0.0, 2, [2, 2, 2]), (0.3, 3, [2, 2, 2]), (1.0, 3, [0, 0, 0])):
        assert joined_blocks(blocks, wanted, open_, current, most, share).tolist() == expected


FLIGHT = ModalityDecoding(
    rule="threshold",
    threshold=0.5,
    temperature=0.0,
    block_length=3,
    blocks_in_flight=3,
    flight_share=0.6,
    flight_threshold=0.3,
)


@pytest.mark.parametrize("policy", ["none", "prefix", "dual", "segments"])
def test_blocks_in_flight(model, policy):
    """Block lengths that divide nothing; tokens ahead of their turn are sure, and only where the block before allows it."""
    config = SamplerConfig(text=FLIGHT, image=replace(FLIGHT, block_order="halton", block_length=4))
    make = NoCache if policy == "none" else POLICIES[policy]
    rows_alone(model, config, make())
    batch = TokenBatch.cat(rows())
    early = 0
    states = []
    decode(
        model, config, make(), batch, [0, 1, 2], callback=lambda step, state: states.append((state.open, state.written))
    )
    before = batch.targets
    out = decode(model, config, make(), batch, [0, 1, 2])
    for open_, written in states:
        for modality, decoding in ((Modality.TEXT, config.text), (Modality.IMAGE, config.image)):
            wanted = batch.targets & (batch.modality == modality)
            blocks = block_ids(batch, wanted, decoding.block_length, decoding.block_order)
            current = torch.where(before & wanted, blocks, 99).amin(1, keepdim=True)
            ahead = written & wanted & (blocks > current)
            early += int(ahead.sum())
            for row, place in ahead.nonzero().tolist():
                previous = wanted[row] & (blocks[row] == blocks[row, place] - 1)
                assert (previous & ~before[row]).sum() >= 0.6 * previous.sum()
                assert out.confidence[row, place] >= 0.3
        before = open_
    assert early > 0


def test_no_token_is_sure_enough_ahead_of_its_turn(model):
    """A bar that no confidence reaches is one block at a time."""
    batch = TokenBatch.cat(rows())
    one = replace(FLIGHT, blocks_in_flight=1)
    barred = replace(FLIGHT, flight_threshold=2.0)
    plain = decode(model, SamplerConfig(text=one, image=one), NoCache(), batch, [0, 1, 2])
    same(plain, decode(model, SamplerConfig(text=barred, image=barred), NoCache(), batch, [0, 1, 2]))


def test_blocks_in_flight_save_passes():
    """A sure model: the second block is filled while the first waits for its quota."""
    net = make_model(head_bias=True)
    with torch.no_grad():
        net.output_weight.zero_()
        net.output_bias[4] = 9.0
    batch = TokenBatch.from_spans([[Span.masked_text(12, VOCABULARY)]])
    slow = ModalityDecoding(steps=12, schedule="fixed", block_length=6)
    fast = replace(slow, blocks_in_flight=2)
    steps = [decode(net, SamplerConfig(text=t), NoCache(), batch, [0]).steps for t in (slow, fast)]
    assert steps == [12, 6]
