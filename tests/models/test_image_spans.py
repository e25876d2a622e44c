"""Images of packed rows: numbers and sides from positions, per-image rotary scale, partial forward with both."""

from __future__ import annotations

import pytest
import torch

from unidiff.models.denoiser import CachePlan
from unidiff.models.transformer import MaskedTransformer, image_spans
from unidiff.tokens import Modality, Span, TokenBatch

SHAPES = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def packed() -> TokenBatch:
    """Two samples in the first row (two images, then one), a single sample and padding in the second."""

    def text(n):
        return Span.text(list(range(n)))

    def image(h, w):
        return Span.image(torch.arange(h * w).reshape(h, w) % 20)

    return TokenBatch.from_packed(
        [
            [[text(2), image(2, 2), image(3, 2)], [image(2, 2), text(1)]],
            [[text(1), image(2, 4), text(3)]],
        ]
    )


def noisy_model(**options) -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(**SHAPES, **options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def test_numbers_and_sides():
    batch = packed()
    number, side = image_spans(batch.positions, batch.modality)
    assert number[0].tolist() == [0] * 6 + [1] * 6 + [0] * 5
    assert side[0].tolist() == [1, 1] + [2] * 4 + [3] * 6 + [2] * 4 + [1]
    assert number[1].sum() == 0 and side[1].tolist() == [1] + [4] * 8 + [1] * 8


@torch.no_grad()
def test_an_image_spans_the_same_steps_at_every_side():
    """A 4x4 image turns by half steps under `rope_grid=2`, a 2x2 one by whole ones; text is left alone."""
    fine, plain = noisy_model(rope_grid=2), noisy_model()
    batch = TokenBatch.from_spans([[Span.text([0, 0]), Span.image(torch.zeros(4, 4, dtype=torch.long))]])
    scaled, _ = fine.position_tables(batch.positions, batch.modality)
    halved = noisy_model(rope_linear_factor=2.0).position_tables(batch.positions, batch.modality)[0]
    assert torch.equal(scaled.cos, halved.cos)
    small = TokenBatch.from_spans([[Span.image(torch.zeros(2, 2, dtype=torch.long))]])
    for model in (fine, plain):
        assert torch.equal(
            model.position_tables(small.positions, small.modality)[0].cos,
            plain.position_tables(small.positions, small.modality)[0].cos,
        )


@torch.no_grad()
def test_the_number_of_an_image_is_an_input():
    model = noisy_model(image_embeddings=2)
    batch = packed()
    before = model(batch)
    model.embed_image.weight[1] += 1
    changed = (model(batch) - before).abs().amax(-1) > 0
    first = batch.valid & (batch.sample_ids == 0)
    assert changed[0].equal(first[0]) and not changed[1].any()  # only the sample with a second image
    with pytest.raises(ValueError, match="rope_grid = 2 needs rope '2d'"):
        noisy_model(rope="1d", rope_grid=2)


@torch.no_grad()
def test_partial_forward_sees_the_same_places():
    model = noisy_model(rope_grid=2, image_embeddings=2)
    batch = packed()
    whole = model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask())
    store = model.make_store(batch)
    model.partial(batch.ids, CachePlan(), store)
    query = batch.valid & (batch.modality == Modality.IMAGE)
    part = model.partial(batch.ids, CachePlan(query=query, full=False), store.narrow(0, 2))
    assert part.index.shape[1] < batch.shape[1]
    torch.testing.assert_close(store.hidden[:, :-1][batch.valid], whole[batch.valid], atol=1e-5, rtol=1e-5)
