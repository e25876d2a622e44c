"""Counts against hand counts, the published sizes of UniDisc's models, and torch's own operation counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unidiff.models.transformer import MaskedTransformer
from unidiff.train.cost.plan import TrainingRow, block_causal_pairs, model_size, row_flops

UNIDISC = dict(norm="rms", qk_norm="width", qk_norm_type="layer_bias", qk_norm_eps=1e-5, activation="gelu_tanh")
UNIDISC |= dict(attention_gate=False, sandwich_norm=True, head_bias=True, ffn_bias=True)


def test_parameters_by_hand():
    size = model_size(
        {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "ffn_size": 128, "activation": "swiglu"}, 100
    )
    block = 64 * 3 * 64 + 64 * 64 + 64 * 256 + 128 * 64  # qkv, out, up and gate, down
    assert size.block_linear == 3 * block
    assert size.blocks == 3 * (block + 2 * 64)
    assert size.embedding == 100 * 64 + 2 * 64 and size.head == 100 * 64
    assert size.total == size.blocks + size.embedding + size.head + 64  # and the final norm
    tied = model_size({"hidden_size": 64, "num_layers": 1, "num_heads": 2, "tie_head": True}, 100)
    assert tied.head == 0


def test_experts_by_hand():
    size = model_size({"hidden_size": 32, "num_layers": 3, "num_heads": 2, "ffn_size": 64, **EXPERTS}, 100)
    heads, expert = 32 * 3 * 16 + 16 * 32, 3 * 32 * 24
    mixture, dense = 32 * 4 + 3 * 32 * 8, 3 * 32 * 64
    assert size.stacked == 2 * 4 * expert
    assert size.matrices == 3 * heads + 2 * mixture + dense
    assert size.block_linear == size.matrices + 2 * 3 * expert
    assert size.blocks == size.matrices + size.stacked + 3 * 2 * 32
    assert size.total - size.active == 2 * expert


@pytest.mark.parametrize(
    ("hidden", "blocks", "heads", "vocabulary", "millions"),
    [(768, 12, 12, 40193, 147), (768, 12, 12, 48385, 159), (1024, 24, 16, 40193, 384), (1024, 24, 16, 48385, 401)],
)
def test_unidisc_sizes(hidden, blocks, heads, vocabulary, millions):
    settings = dict(UNIDISC, hidden_size=hidden, num_layers=blocks, num_heads=heads, ffn_size=4 * hidden)
    assert abs(model_size(settings, vocabulary).total / 1e6 - millions) < 1  # published without decimals


def test_the_released_unidisc_has_1_4_billion_parameters():
    settings = dict(UNIDISC, hidden_size=2048, num_layers=24, num_heads=16, ffn_size=8192)
    assert round(model_size(settings, 48385).total / 1e9, 3) == 1.407


EXPERTS = dict(num_experts=4, experts_per_token=3, expert_size=24, shared_expert_size=8, dense_layers=[1], head_size=8)


@pytest.mark.parametrize("own", [{"activation": "swiglu"}, {"activation": "gelu"}, EXPERTS])
def test_operations_equal_torchs_own_count(own):
    settings = dict(hidden_size=32, num_layers=2, num_heads=2, **own)
    model = MaskedTransformer(vocab_size=61, **settings)
    rows, text, side = 2, 6, 3
    length = text + side * side
    ids = torch.randint(0, 20, (rows, length))
    modality = (torch.arange(length) >= text).long().expand(rows, -1)
    positions = torch.zeros(rows, length, 3, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(ids, modality, positions)
        slices = [(hidden[:, :text], 0, 40), (hidden[:, text:], 41, 61)]
        sum(model.head(h, a, b).sum() for h, a, b in slices).backward()
    shape = TrainingRow(text, side * side, 40, 20, hidden_share=1.0)
    expected = rows * row_flops(model_size(settings, 61), shape).total
    # the weighted sum over the experts of a token is a batched product, too small to be counted by us
    sums = 3 * 2 * rows * length * 3 * 32 if "num_experts" in own else 0
    assert counter.get_total_flops() == expected + sums


def test_block_causal_pairs():
    for length, block in ((8, 4), (10, 4), (5, 8), (7, 1)):
        index = torch.arange(length) // block
        assert block_causal_pairs(length, block) == int((index[:, None] >= index[None, :]).sum())
