"""The objective: masked positions only, sliced heads, fixed chunk sizes, normalisation, weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.loss_weights import cosine_count, cosine_count_weight, time_weight
from reference.nelbo import condition_on

from unidiff.diffusion import (
    gather_masked,
    get_schedule,
    joint_elbo,
    keyed_uniform,
    mask_tokens,
    masked_nll,
)
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(7, 11)


def make_batch(rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start, stop = VOCABULARY.image
    return TokenBatch.from_spans(
        [
            [
                Span.text(
                    torch.randint(0, 7, (4,), generator=generator), given=torch.tensor([True, False, False, False])
                ),
                Span.image(torch.randint(start, stop, (2, 3), generator=generator)),
            ]
            for _ in range(rows)
        ]
    ).pad_to(13)


def rows_of(terms):
    """Nats of each row over both modalities."""
    return terms.row_text + terms.row_image


class Recorder:
    """A head that notes the shapes it is called with."""

    def __init__(self, width=6):
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(VOCABULARY.size, width, generator=generator, dtype=torch.float64, requires_grad=True)
        self.calls = []

    def __call__(self, hidden, start, stop):
        self.calls.append((tuple(hidden.shape), start, stop))
        return hidden @ self.weight[start:stop].T


def dense_nll(hidden, head, batch, masked, forbidden=()):
    out = torch.zeros(batch.shape, dtype=torch.float64)
    logits = hidden @ head.weight.T
    for b, i in masked.nonzero().tolist():
        start, stop = VOCABULARY.range_of(int(batch.modality[b, i]))
        out[b, i] = -logits[b, i, start:stop].log_softmax(-1)[batch.ids[b, i] - start]
    return out


@given(st.integers(1, 70), st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_masked_nll_equals_the_dense_formula_for_any_chunk_size(count, rate, seed):
    batch, head = make_batch(seed=seed), Recorder()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch.shape, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    noise = keyed_uniform(seed, torch.arange(5), 0, 13)
    masked = mask_tokens(batch, torch.full((5,), rate), VOCABULARY, noise).masked
    got, expected = masked_nll(hidden, head, masked, batch, VOCABULARY, count), dense_nll(hidden, head, batch, masked)
    torch.testing.assert_close(got.double(), expected, rtol=1e-12, atol=1e-12)
    if masked.any():
        for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, head.weight)) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    unit = -(-count // 8)
    assert {shape for shape, *_ in head.calls} <= {(min(count, n * unit), 6) for n in range(1, 9)}  # never B x L x V
    assert {c[1:] for c in head.calls} <= {VOCABULARY.text, VOCABULARY.image}


@given(st.integers(1, 40), st.integers(0, 2**20 - 1))
@settings(max_examples=60, deadline=None)
def test_gather_drops_nothing(count, bits):
    masked = torch.tensor([bits >> i & 1 for i in range(20)], dtype=torch.bool).view(4, 5)
    ids = torch.arange(100, 120).view(4, 5)
    x0 = TokenBatch.from_spans([[Span.text(row)] for row in ids])
    gathered = gather_masked(masked, x0, Vocabulary(200, (90, 200), (0, 90), mask_id=40), Modality.TEXT, count)
    chunks, width = gathered.index.shape
    assert width in {min(count, n * -(-count // 8)) for n in range(9)} and gathered.index.shape == gathered.real.shape
    assert chunks == -(-int(masked.sum()) // count) and chunks * (width - -(-count // 8)) < max(1, int(masked.sum()))
    assert torch.equal(gathered.index[gathered.real], masked.flatten().nonzero()[:, 0])
    assert torch.equal(gathered.target[gathered.real] + 90, ids[masked])
    assert bool((gathered.slot[~gathered.real] == 20).all())


def test_gather_refuses_a_count_of_zero():
    with pytest.raises(ValueError, match="at least 1"):
        gather_masked(torch.ones(2, 5, dtype=torch.bool), make_batch(), VOCABULARY, Modality.TEXT, 0)


def test_nothing_masked_is_zero_and_still_differentiable():
    batch = make_batch()
    hidden = torch.randn(*batch.shape, 6, requires_grad=True)
    nll = masked_nll(hidden, Recorder(), torch.zeros(batch.shape, dtype=torch.bool), batch, VOCABULARY)
    terms = joint_elbo(nll, torch.ones(5), batch)
    terms.total.backward()
    assert terms.total == 0 and hidden.grad is not None and not hidden.grad.any()


def test_a_mask_id_inside_the_slice_is_never_a_candidate():
    vocabulary = Vocabulary(6, (0, 6), (6, 6), mask_id=3)
    batch = TokenBatch.from_spans([[Span.text([0, 5])]])
    hidden = torch.zeros(1, 2, 2)
    nll = masked_nll(hidden, lambda h, a, b: h.new_zeros(len(h), b - a), batch.valid, batch, vocabulary)
    torch.testing.assert_close(nll, torch.full((1, 2), math.log(5)))


def test_a_target_of_the_other_modality_is_refused():
    batch = make_batch()
    broken = batch.replace(ids=torch.where(batch.modality == Modality.IMAGE, 2, batch.ids))
    with pytest.raises(ValueError, match="masked image target lies outside"):
        masked_nll(torch.zeros(*batch.shape, 6).double(), Recorder(), broken.targets, broken, VOCABULARY)


def test_normalised_by_targets_not_by_masked_positions():
    batch = make_batch(rows=2)
    nll = torch.zeros(batch.shape)
    nll[0, 1], nll[1, 5] = 3.0, 4.0
    terms = joint_elbo(nll, torch.tensor([2.0, 0.5]), batch)
    assert float(terms.total) == pytest.approx((2 * 3 + 0.5 * 4) / 18)
    assert float(terms.text) == pytest.approx(6 / 6) and float(terms.image) == pytest.approx(2 / 12)
    assert rows_of(terms).tolist() == [6.0, 2.0]
    assert terms.count_text.tolist() == [3, 3] and terms.count_image.tolist() == [6, 6]
    weighted = joint_elbo(nll, torch.tensor([2.0, 0.5]), batch, {Modality.IMAGE: 0.1}, normalizer=10.0)
    assert float(weighted.total) == pytest.approx((6 + 0.2) / 10) and weighted.image == terms.image


def test_padding_and_given_positions_never_count():
    batch = make_batch()
    nll = torch.rand(batch.shape, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(5, generator=torch.Generator().manual_seed(1))
    terms = joint_elbo(nll, weight, batch)
    wider = batch.pad_to(20)
    padded = joint_elbo(torch.nn.functional.pad(nll, (0, 7), value=5.0), weight, wider)
    noisy = joint_elbo(torch.where(batch.targets, nll, 99.0), weight, batch)
    for other in (padded, noisy):
        torch.testing.assert_close(other.total, terms.total)


def test_weights():
    t = torch.tensor([1e-4, 0.2, 0.9], dtype=torch.float64)
    schedule = get_schedule("loglinear")
    alpha, slope = schedule.alpha(t), schedule.dalpha(t)
    torch.testing.assert_close(time_weight("elbo", schedule, t), 1 / t)
    sigma = -alpha.log()
    softmin = -slope / alpha / (torch.expm1(sigma) + 1 / 5)
    torch.testing.assert_close(time_weight("softmin_snr", schedule, t, gamma=5.0), softmin)
    capped = torch.tensor([1000.0, 1 / (0.999 * 0.2), 1 / (0.999 * 0.9)], dtype=torch.float64)
    torch.testing.assert_close(time_weight("muddit", schedule, t), capped)
    assert time_weight("ce", schedule, t).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="unknown weight 'snr'"):
        time_weight("snr", schedule, t)


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_cosine_count_weight_is_one_over_n_times_its_probability(length):
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    share = torch.bincount(cosine_count(u, length), minlength=length + 1) / 400_000
    n = torch.arange(length + 1)
    weight = cosine_count_weight(n, length)
    assert weight[0] == 0
    torch.testing.assert_close(1 / (n * weight)[1:], share[1:].double(), rtol=0, atol=2e-5)


def test_cosine_count_weight_takes_a_length_per_row():
    weight = cosine_count_weight(torch.tensor([2, 2]), torch.tensor([3, 8]))
    assert weight[0] == cosine_count_weight(torch.tensor(2), 3) and weight[1] == cosine_count_weight(torch.tensor(2), 8)


def test_condition_on_makes_the_rest_the_target():
    batch = make_batch()
    rows = torch.tensor([True, False, True, False, False])
    some = condition_on(batch, Modality.TEXT, rows)
    is_text = batch.modality == Modality.TEXT
    assert not bool((some.targets & is_text)[rows].any())
    assert torch.equal(some.targets[~rows], batch.targets[~rows])
    assert torch.equal(condition_on(batch, Modality.IMAGE).targets, batch.targets & is_text)


class CopiedBit:
    """The exact denoiser of one text bit and n image copies of it: certain once anything is visible."""

    def __init__(self, copies):
        self.vocabulary = Vocabulary.unified(2, 2)
        self.batch = TokenBatch.from_spans(
            [[Span.text([bit]), Span.image(torch.full((1, copies), 3 + bit))] for bit in (0, 1)]
        )

    def loss(self, targets, hidden_counts, weight):
        """Summed text and image NLL with the first k positions of each modality hidden, times a weight."""
        batch = self.batch.replace(given=~targets)
        where = torch.zeros(batch.shape, dtype=torch.bool)
        where[:, : hidden_counts[0]] = True
        where[:, 1 : 1 + hidden_counts[1]] = True
        x_t = batch.hide(where, self.vocabulary)
        unknown = (x_t.ids == self.vocabulary.mask_id).all(1, keepdim=True)
        nll = torch.where(where & unknown, math.log(2.0), 0.0)
        return joint_elbo(nll, torch.full((2,), weight), batch)


def test_joint_counter_example():
    """DESIGN.md: shared t gives ln 2 = 0.693, independent times 0.357 (not a bound), the two conditionals 0."""
    copies = 64
    toy = CopiedBit(copies)
    everything = torch.ones(toy.batch.shape, dtype=torch.bool)
    is_text = toy.batch.modality == Modality.TEXT
    # the code is symmetric in the copies and exact in the counts, so counts are summed, not drawn
    n = copies + 1
    shared = torch.zeros(2)
    for k in range(1, n + 1):
        with_text = k / n  # share of the k-subsets that hold the text bit
        for text in (0, 1):
            if k - text <= copies:
                chance = with_text if text else 1 - with_text
                shared += chance / n * rows_of(toy.loss(everything, (text, k - text), n / k))
    torch.testing.assert_close(shared, torch.full((2,), math.log(2)))
    # independent uniform times make independent uniform counts
    independent = torch.zeros(2)
    for other in range(copies + 1):
        independent += toy.loss(everything, (1, other), 1.0).row_text / (copies + 1)
    for k in range(1, copies + 1):
        for text in (0, 1):
            independent += toy.loss(everything, (text, k), copies / k).row_image / (2 * copies)
    expected = math.log(2) * (1 / 65 + 1 / 2)
    assert expected == pytest.approx(0.357, abs=5e-4)
    torch.testing.assert_close(independent, torch.full((2,), expected))
    # conditionals: the other modality is given, so never hidden
    for k in range(1, copies + 1):
        assert rows_of(toy.loss(~is_text, (0, k), copies / k)).tolist() == [0, 0]
    assert rows_of(toy.loss(is_text, (1, 0), 1.0)).tolist() == [0, 0]


def test_with_the_transformer_in_bf16_autocast():
    torch.manual_seed(0)
    model = MaskedTransformer(vocab_size=VOCABULARY.size, hidden_size=32, num_layers=1, num_heads=2)
    batch = make_batch()
    noisy = mask_tokens(batch, torch.full((5,), 0.7), VOCABULARY, keyed_uniform(0, torch.arange(5), 0, 13))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = noisy.batch
            hidden = model.hidden(x.ids, x.modality, x.positions, x.attention_mask())
            nll = masked_nll(hidden, model.head, noisy.masked, batch, VOCABULARY, count=16)
        assert nll.dtype == torch.float32
        results.append(joint_elbo(nll, torch.full((5,), 1 / 0.7), batch).total)
    results[1].backward()
    assert abs(float((results[0] - results[1]).detach())) < 0.05
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
