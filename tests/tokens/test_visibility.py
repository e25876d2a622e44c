"""One statement of who sees whom, as a dense mask and as FlexAttention's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Visibility
from unidiff.train.data.tasks import block_visibility

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
rows_of_samples = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


def packed(lengths: list[list[int]]) -> TokenBatch:
    return TokenBatch.from_packed([[[Span.text(torch.arange(n) + 1)] for n in row] for row in lengths], 40)


@given(rows_of_samples)
@settings(max_examples=30, deadline=None)
def test_dense_is_same_sample_and_no_padding(lengths):
    batch = packed(lengths)
    mask = Visibility(batch.sample_ids.masked_fill(~batch.valid, -1)).dense()
    for b, row in enumerate(batch.sample_ids.tolist()):
        expected = [[q == k and q >= 0 for k in row] for q in row]
        assert mask[b, 0].tolist() == expected


@given(rows_of_samples)
@settings(max_examples=30, deadline=None)
def test_a_mask_of_keys_alone_says_the_same_of_all_tokens(lengths):
    batch = packed(lengths)
    mask, every = batch.attention_mask(), Visibility(batch.sample_ids.masked_fill(~batch.valid, -1)).dense()
    assert mask is not None and (mask.shape[2] == 1) == all(len(row) == 1 for row in lengths)
    tokens = batch.valid[:, None]
    assert torch.equal(mask.expand_as(every)[tokens], every[tokens])


@given(rows_of_samples, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_dense_of_doubled_rows_follows_the_blocks(lengths, block):
    batch = packed(lengths)
    mask, length = block_visibility(batch, block).dense(), batch.shape[1]
    b, q, k = torch.nonzero(torch.ones_like(mask[:, 0]), as_tuple=True)
    sample, order = batch.sample_ids, batch.positions[..., 0] // block
    same = (sample[b, q % length] == sample[b, k % length]) & (sample[b, q % length] >= 0)
    past, own = order[b, k % length] < order[b, q % length], order[b, k % length] == order[b, q % length]
    from_clean = (k < length) & (past | own)
    from_noisy = ((k < length) & past) | ((k >= length) & own)
    assert torch.equal(mask[b, 0, q, k], same & torch.where(q < length, from_clean, from_noisy))


def network(**options) -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(64, 32, 2, 4, **options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_flex_attention_equals_the_dense_mask(kv_heads):
    batch = packed([[9, 7, 5], [8, 3], [2]])
    visible = batch.visibility()
    assert visible is not None
    model = network(num_kv_heads=kv_heads)
    with torch.no_grad():
        dense, flex = (
            model.hidden(batch.ids, batch.modality, batch.positions, mask) for mask in (visible.dense(), visible.flex())
        )
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)
    unmasked = model.hidden(batch.ids, batch.modality, batch.positions)
    assert not torch.allclose(unmasked, dense, atol=1e-2)


def test_flex_attention_of_doubled_rows_equals_the_dense_mask():
    batch = packed([[9, 7], [6]])
    both = batch.each(lambda x: torch.cat([x, x], 1))
    visible = block_visibility(batch, 3)
    model = network(attention="block_causal", block_length=3)
    with torch.no_grad():
        dense, flex = (
            model.hidden(both.ids, both.modality, both.positions, mask) for mask in (visible.dense(), visible.flex())
        )
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_gives_the_gradients_of_the_dense_mask():
    batch = packed([[9, 7, 5], [8, 3], [2]]).to("cuda")
    visible, model = batch.visibility(), network().to("cuda")
    grads = []
    for mask in (visible.dense(), visible.flex()):
        model.zero_grad()
        hidden = model.hidden(batch.ids, batch.modality, batch.positions, mask)
        hidden[batch.valid].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_blocks_without_copies_are_refused():
    with pytest.raises(ValueError, match="give both, or neither"):
        Visibility(torch.zeros(1, 2, dtype=torch.long), block=torch.zeros(1, 2, dtype=torch.long))
