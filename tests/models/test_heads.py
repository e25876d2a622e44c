"""SUBS by slicing equals the full-vocabulary definition, and partial-pass plans are checked."""

from __future__ import annotations

import pytest
import torch
from reference.subs import modality_logits, subs_log_probs

from unidiff.models.denoiser import CachePlan
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

LAYOUTS = {
    "unified": Vocabulary.unified(9, 6),
    "mask inside the text range": Vocabulary(20, (0, 12), (12, 18), 5),
    "mask per modality": Vocabulary(20, (0, 9), (10, 19), 9, image_mask_id=18),
}


@pytest.mark.parametrize("vocabulary", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_subs_matches_masking_the_full_softmax(vocabulary):
    torch.manual_seed(0)
    model = MaskedTransformer(vocabulary.size, 16, 1, 2, head_bias=True).eval()
    torch.nn.init.normal_(model.output_bias)
    text, image = vocabulary.text[0], vocabulary.image[0]
    batch = TokenBatch.from_spans(
        [
            [Span.text([text, vocabulary.mask_id, text + 2]), Span.masked_image((2, 2), vocabulary)],
            [Span.text([vocabulary.mask_id, text + 1]), Span.image(torch.tensor([[image, vocabulary.image_mask]]))],
        ]
    )
    actual = subs_log_probs(model, batch, vocabulary)
    logits = model(batch)
    expected = torch.full_like(logits, -torch.inf)
    masks = {vocabulary.mask_id, vocabulary.image_mask}
    for row, column in batch.valid.nonzero().tolist():
        modality = Modality(int(batch.modality[row, column]))
        if batch.ids[row, column] != vocabulary.mask_of(modality):
            expected[row, column, batch.ids[row, column]] = 0.0
            continue
        allowed = [i for i in range(*vocabulary.range_of(modality)) if i not in masks]
        expected[row, column, allowed] = logits[row, column, allowed].log_softmax(-1)
    torch.testing.assert_close(actual[batch.valid], expected[batch.valid])
    torch.testing.assert_close(actual.exp().sum(-1)[batch.valid], torch.ones(int(batch.valid.sum())))


def test_modality_logits_slice_and_forbid():
    vocabulary = LAYOUTS["mask inside the text range"]
    model = MaskedTransformer(vocabulary.size, 16, 1, 2)
    hidden = torch.randn(3, 16)
    text = modality_logits(model, hidden, Modality.TEXT, vocabulary)
    assert text.shape == (3, 12) and bool((text[:, 5] == -torch.inf).all())
    assert bool(torch.isfinite(text.softmax(-1)).all())
    torch.testing.assert_close(modality_logits(model, hidden, 1, vocabulary), model.head(hidden)[:, 12:18])


def test_subs_without_a_predictable_modality_is_refused():
    vocabulary = Vocabulary(10, (0, 0), (0, 9), 9)
    model = MaskedTransformer(10, 16, 1, 2)
    with pytest.raises(ValueError, match="no token of a modality"):
        subs_log_probs(model, TokenBatch.from_spans([[Span.text([9])]]), vocabulary)


def test_cache_plan_refuses_contradictions():
    positions = torch.ones(2, 3, dtype=torch.bool)
    assert CachePlan().full and CachePlan(query=positions, full=False).logits is None
    with pytest.raises(ValueError, match="full=False"):
        CachePlan(query=positions)
    with pytest.raises(ValueError, match=r"expected bool \[B, L\]"):
        CachePlan(logits=torch.zeros(3))
