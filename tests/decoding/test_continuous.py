"""Continuous features in place of tokens: those that are embeddings of tokens are these tokens, wherever they go."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cache_cases import POLICIES, VOCABULARY, decode, make_model, rows, rows_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.diffusion.likelihood import mask_count_nelbo, model_scorer
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import Modality, Span, TokenBatch
from unidiff.tokens.batch import CONTINUOUS
from unidiff.train.data.tasks import HiddenBatch, TaskBatch, double_rows, pack_tasks
from unidiff.train.step import TokenNLL

CONFIG = SamplerConfig(
    ModalityDecoding(steps=5, block_length=4, temperature=0.0),
    ModalityDecoding(steps=4, choice_temperature=1.0),
    Guidance(2.0),
    stop_at_eos=False,
)
MODELS = {
    "plain": {},
    "places": dict(grid_embeddings=4, image_embeddings=3, rope="1d"),
    "timed": dict(time_conditioning=True, time_tokens="image"),
    "causal": dict(attention="block_causal", block_length=4),
    "shifted": dict(shift=True, rope="1d"),
}


def as_features(batch: TokenBatch, model, share: float = 1.0, seed: int = 0) -> TokenBatch:
    """Given tokens, or a share of them, as the vectors that the model has for them."""
    chosen = torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed)) < share
    where = batch.given & batch.valid & chosen
    vectors = model.embed_tokens(batch.ids.clamp_max(model.settings.vocab_size - 1)).detach()
    ids = torch.where(where, CONTINUOUS, batch.ids)
    return batch.replace(ids=ids, features=torch.where(where[..., None], vectors, torch.nan))


@pytest.mark.parametrize("policy", [None, *POLICIES])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_with_every_cache(name: str, policy: str | None):
    """In a padded batch with packed rows and guidance, and as rows alone."""
    model, tokens = make_model(**MODELS[name]), TokenBatch.cat(rows()).pad_to(20)
    batch = as_features(tokens, model, 0.7)
    made = None if policy is None else POLICIES[policy]()
    plain, out = (decode(model, CONFIG, made, b, [1, 2, 3]) for b in (tokens, batch))
    assert len(plain.trajectory) == len(out.trajectory)
    for a, b in zip(plain.trajectory, out.trajectory, strict=True):
        assert torch.equal(a[tokens.targets], b[tokens.targets])
    assert torch.equal(plain.confidence, out.confidence)
    assert torch.equal(out.batch.ids[~tokens.targets], batch.ids[~tokens.targets])
    row = 1
    alone = decode(model, CONFIG, made, batch.rows([row]).each(lambda x: x[:, :11]), [2])
    assert torch.equal(alone.batch.ids[0], out.batch.ids[row, :11])


@given(st.integers(0, 2**20), st.floats(0, 1), st.sampled_from(sorted(MODELS)), st.booleans())
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_in_whole_and_partial_passes(seed: int, share: float, name: str, outputs: bool):
    """Any positions, recomputed in any order, in stores with and without outputs of branches."""
    model, tokens = make_model(**MODELS[name]), TokenBatch.cat(rows())
    batch = as_features(tokens, model, share, seed)
    time = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(model(batch, time), model(tokens, time), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(seed)
    stores = [model.make_store(b, StoreOptions(outputs=outputs)) for b in (tokens, batch)]
    for number in range(3):
        query = tokens.valid & (torch.rand(tokens.shape, generator=generator) < 0.5)
        plan = CachePlan() if number == 0 else CachePlan(query, full=False)
        hidden = [model.partial(b.ids, plan, s, time).hidden for b, s in zip((tokens, batch), stores, strict=True)]
        real = tokens.valid if number == 0 else slice(None)
        torch.testing.assert_close(hidden[0][real], hidden[1][real], rtol=0, atol=0)


@torch.no_grad()
def test_hidden_features_are_masks():
    """Guidance that hides what is given hides vectors too."""
    model, tokens = make_model(), TokenBatch.cat(rows())
    batch = as_features(tokens, model)
    hidden = [b.hide(tokens.given, VOCABULARY) for b in (tokens, batch)]
    assert torch.equal(hidden[0].ids, hidden[1].ids)
    torch.testing.assert_close(*(model(b)[tokens.valid] for b in hidden), rtol=0, atol=0)


def test_vectors_of_no_token_change_what_is_decoded():
    model, batch = make_model(), as_features(TokenBatch.cat(rows()), make_model())
    other = batch.replace(features=-3 * batch.features)
    first, second = (decode(model, CONFIG, None, b, [1, 2, 3]).confidence for b in (batch, other))
    assert not torch.equal(first, second)
    rows_alone(model, CONFIG, None)  # and nothing of a request stays in the model


def task_batch(batch: TokenBatch) -> TaskBatch:
    generator = torch.Generator().manual_seed(4)
    noise = torch.rand(batch.shape, generator=generator, dtype=torch.float64)
    rate = torch.tensor([0.9, 0.95, 1.0], dtype=torch.float64)
    return TaskBatch(batch, torch.arange(3), rate, noise, torch.ones(batch.shape))


@pytest.mark.parametrize("way", ["rows", "packed", "doubled"])
def test_in_training(way: str):
    """The loss is that of the tokens, on targets alone; its gradient reaches the vectors."""
    model = make_model(**(MODELS["causal"] if way == "doubled" else {}))
    text = [Span.text([3, 1, 4], True), Span.text([5, 9, 6, 7])]
    image = Span.image(torch.tensor([[12, 14], [15, 16]]))
    tokens = TokenBatch.from_spans([text, [*text, image], [text[0], image]])
    batch = as_features(tokens, model)
    vectors = batch.features.nan_to_num().requires_grad_()
    losses, felt = [], []
    for rows_ in (tokens, batch.replace(features=vectors)):
        micro = task_batch(rows_)
        if way == "packed":
            micro = pack_tasks(micro, 30)
        if way == "doubled":
            per_token = {name: getattr(micro, name)[:, None].expand(tokens.shape) for name in ("task", "rate")}
            micro = double_rows(replace(micro, **per_token), 4)
        ready = HiddenBatch.of(micro, VOCABULARY, 16)
        assert not (ready.noisy.masked & (ready.noisy.batch.ids == CONTINUOUS)).any()
        model.zero_grad()
        loss, *_ = TokenNLL(model, VOCABULARY, 16).loss(ready, micro.batch.targets.sum())
        loss.backward()
        losses.append(loss.detach())
        felt.append(model.blocks[0].attention.qkv.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(felt[0], felt[1], rtol=1e-9, atol=1e-12)
    reached = vectors.grad.abs().sum(-1) > 0
    assert torch.equal(reached, batch.ids == CONTINUOUS)


def test_likelihoods():
    model = make_model()
    text = [Span.text([3, 1, 4], True), Span.text([5, 9, 6, 7])]
    tokens = TokenBatch.from_spans([text, text[::-1]])
    keys, score = torch.arange(2), model_scorer(model, VOCABULARY)
    first, second = (mask_count_nelbo(score, b, VOCABULARY, keys).total for b in (tokens, as_features(tokens, model)))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rows_of_spans():
    grid, line = vectors(2, 3, 16), vectors(4, 16).double()
    asked = [
        [Span.text([3], True), Span.continuous(grid, Modality.IMAGE), Span.masked_text(2, VOCABULARY)],
        [Span.continuous(line), Span.masked_text(1, VOCABULARY)],
        [Span.masked_text(3, VOCABULARY)],
    ]
    batch = TokenBatch.from_spans(asked)
    assert batch.features.shape == (3, 9, 16) and batch.features.dtype == torch.float64
    assert (batch.ids == CONTINUOUS).sum(1).tolist() == [6, 4, 0]
    assert batch.positions[0, 1:7, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    torch.testing.assert_close(batch.features[0, 1:7], grid.double().flatten(0, 1))
    left = TokenBatch.from_spans(asked, left=True, length=12)
    torch.testing.assert_close(left.features[1, 7:11], line)
    torch.testing.assert_close(left.features[1, :7].abs().sum(), torch.zeros((), dtype=torch.float64))
    assert torch.equal(batch.rows([1]).features[0], batch.features[1])
    plain = TokenBatch.from_spans([asked[2]])
    both = TokenBatch.cat([plain, batch])
    assert plain.features is None and both.features.shape == (4, 9, 16) and not both.features[0].any()
    assert torch.equal(both.features[1:], batch.features)
    assert torch.equal(copy.deepcopy(batch).features, batch.features)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"features of text are torch.float32 \[2, 3, 16\]; expected floats \[n, D\]"):
        Span.continuous(vectors(2, 3, 16))
    with pytest.raises(ValueError, match=r"features of image are torch.int64 \[3, 16\]; expected floats \[h, w, D\]"):
        Span.continuous(torch.ones(3, 16, dtype=torch.long), Modality.IMAGE)
    with pytest.raises(ValueError, match=r"features of one batch are \[8, 16\] wide"):
        TokenBatch.from_spans([[Span.continuous(vectors(2, 16)), Span.continuous(vectors(2, 8))]])
    with pytest.raises(ValueError, match="features are given"):
        Span(torch.full((2,), CONTINUOUS), Modality.TEXT, False, features=vectors(2, 16))
    batch = TokenBatch.from_spans([[Span.continuous(vectors(3, 8)), Span.masked_text(2, VOCABULARY)]])
    sampler = Sampler(make_model(), VOCABULARY, CONFIG)
    with pytest.raises(ValueError, match="features are 8 wide, but the model 16"):
        sampler(batch, torch.tensor([1]))
    with pytest.raises(ValueError, match="gives ids from -1 to 0"):
        sampler(batch.replace(features=None), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"batch features have shape \(1, 4, 8\).*expected floats \[1, 5, 'D'\]"):
        sampler(batch.replace(features=vectors(1, 4, 8)), torch.tensor([1]))

    class Reader:
        def hidden(self, ids, modality, positions, attention_mask, time=None):
            return torch.zeros(*ids.shape, 4)

        def head(self, hidden, start=0, stop=None):
            return hidden.new_zeros(*hidden.shape[:-1], stop - start)

    with pytest.raises(ValueError, match="has continuous features, but Reader reads ids alone"):
        Sampler(Reader(), VOCABULARY, CONFIG)(batch, torch.tensor([1]))
