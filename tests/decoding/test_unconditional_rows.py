"""Unconditional rows of their own (another prompt, other padding) instead of hidden tokens."""

from __future__ import annotations

import pytest
import torch
from reference.batches import lumina_pair

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import AdaptiveCache, HeldGuidance
from unidiff.decoding.cache.max_logit import MaxLogitCache
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
CONFIG = SamplerConfig(
    text=ModalityDecoding(steps=3), image=ModalityDecoding(steps=5, temperature=0.9), guidance=Guidance(2.5)
)
POLICIES = [NoCache(), HeldGuidance(AdaptiveCache(3, 2, 0.3), 2, 1), MaxLogitCache(0.6, 0.2, 3)]


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(8)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2, rope="1d").eval().double()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    return net


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_rows_with_hidden_tokens_are_the_hidden_stream(model, policy) -> None:
    spans = [Span.text([1, 2, 3], True), Span.masked_text(3, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)]
    batch, seeds = TokenBatch.from_spans([spans, spans[1:]]), torch.arange(2)
    hidden = batch.replace(ids=torch.where(batch.given & batch.valid, VOCABULARY.mask_id, batch.ids))
    sampler = Sampler(model, VOCABULARY, CONFIG, policy)
    a, b = sampler(batch, seeds), sampler(batch, seeds, unconditional=hidden)
    assert torch.equal(a.batch.ids, b.batch.ids) and a.nfe == b.nfe
    torch.testing.assert_close(a.confidence, b.confidence)


def test_prompts_of_other_lengths_see_their_own_positions_only(model) -> None:
    """The mixed logits of the first pass, against two plain forwards of unpadded sequences."""
    mask = VOCABULARY.image_mask
    ids = torch.tensor(
        [[1, 2, 3, 4, 5, 8, 9, mask, mask, 7, mask, mask, 7]]
    )  # prompt, two marks, 2 x (2 codes, newline)
    prefix = torch.tensor([[6, 10]])
    batch, other = lumina_pair(ids, prefix, 7, VOCABULARY)
    assert batch.shape == other.shape == (1, 13) and int(other.valid.sum()) == 10
    assert torch.equal(batch.targets, other.targets) and int(batch.targets.sum()) == 4
    short, _ = lumina_pair(torch.cat((prefix, ids[:, 5:]), 1), prefix, 4, VOCABULARY)
    assert torch.equal(other.ids[other.valid], short.ids[0]) and torch.equal(
        other.positions[other.valid], short.positions[0]
    )
    cond, uncond = (model(b)[b.targets][:, slice(*VOCABULARY.image)] for b in (batch, short))
    config = SamplerConfig(image=ModalityDecoding(steps=1, temperature=0.0), guidance=Guidance(2.5))
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([0]), unconditional=other)
    expected = (uncond + 2.5 * (cond - uncond)).softmax(-1).max(-1)
    assert torch.equal(out.batch.ids[batch.targets], expected.indices + VOCABULARY.image[0])
    torch.testing.assert_close(out.confidence[batch.targets], expected.values.float())
    longer = torch.tensor([[6, 10, 1, 1, 1, 1, 1]])
    batch, other = lumina_pair(ids, longer, 7, VOCABULARY)  # the conditional rows may be the padded ones
    padded = Sampler(model, VOCABULARY, SamplerConfig(image=config.image))(batch, torch.tensor([0]))
    plain = Sampler(model, VOCABULARY, SamplerConfig(image=config.image))(
        lumina_pair(ids, prefix, 7, VOCABULARY)[0], torch.tensor([0])
    )
    assert batch.shape[1] == 15 and torch.equal(padded.batch.ids[:, 2:], plain.batch.ids)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_what_an_unconditional_row_is_given_stays(model, policy) -> None:
    """Targets of the batch may be known there: what is decoded at them does not reach it."""
    spans = [Span.text([1, 2, 3], True), Span.masked_text(3, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)]
    batch, seeds = TokenBatch.from_spans([spans, spans[1:]], left=True), torch.arange(2)
    known = batch.targets & (torch.arange(batch.shape[1]) % 2 == 0)
    ids = torch.where(known, torch.where(batch.modality == 1, VOCABULARY.image[0] + 2, 4), batch.ids)
    other = batch.replace(ids=ids, given=batch.given | known)
    seen = []

    class Watched:
        def hidden(self, ids, *rest):
            seen.append(ids)
            return model.hidden(ids, *rest)

        def head(self, *about):
            return model.head(*about)

    sampler = Sampler(Watched(), VOCABULARY, CONFIG, policy if policy.store is None else None)
    out = sampler(batch, seeds, unconditional=other)
    assert not (out.batch.ids == VOCABULARY.mask_id).any()
    for rows in seen:
        assert len(rows) == 4 and torch.equal(rows[2:][known], ids[known])
        assert torch.equal(rows[2:][batch.targets & ~known], rows[:2][batch.targets & ~known])
    for row in range(2):
        alone = [b.rows(slice(row, row + 1)) for b in (batch, other)]
        own = Sampler(model, VOCABULARY, CONFIG, policy)
        together, single = (
            own(batch, seeds, unconditional=other),
            own(alone[0], seeds[row : row + 1], unconditional=alone[1]),
        )
        assert torch.equal(together.batch.ids[row], single.batch.ids[0])


def test_rows_that_do_not_fit_are_refused(model) -> None:
    batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_text(2, VOCABULARY)]])
    sampler, seeds = Sampler(model, VOCABULARY, CONFIG), torch.tensor([0])
    with pytest.raises(ValueError, match="unconditional has shape"):
        sampler(batch, seeds, unconditional=batch.pad_to(5))
    with pytest.raises(ValueError, match="other targets"):
        sampler(batch, seeds, unconditional=batch.replace(given=~batch.given))
    with pytest.raises(ValueError, match="give one of them"):
        sampler(batch, seeds, batch.given, unconditional=batch)
