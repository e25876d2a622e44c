"""The masking process: forward noise, posterior, reverse step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.process import draw_token, posterior, reverse_step, unmask_probability

from unidiff.diffusion import get_schedule, keyed_uniform, mask_count, mask_tokens
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary(20, (0, 8), (9, 18), mask_id=8, image_mask_id=18)


def make_batch(rows=4):
    known = torch.tensor([True, False, False, False])
    row = [Span.text([1, 2, 3, 4], given=known), Span.image(torch.arange(9, 15).view(2, 3))]
    return TokenBatch.from_spans([row]).pad_to(12).rows(torch.zeros(rows, dtype=torch.long))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_posterior_marginalises_to_q(a, b, x0):
    """sum over x_t of q(x_s | x_t, x0) q(x_t | x0) = q(x_s | x0)."""
    alpha_t, alpha_s = torch.tensor(sorted((a, b)), dtype=torch.float64)
    vocab, mask = 5, 4
    clean = torch.nn.functional.one_hot(torch.tensor(x0), vocab).double()
    noise = torch.nn.functional.one_hot(torch.tensor(mask), vocab).double()
    q_t, q_s = (alpha * clean + (1 - alpha) * noise for alpha in (alpha_t, alpha_s))
    total = torch.zeros(vocab, dtype=torch.float64)
    for x_t in range(vocab):
        if q_t[x_t] > 0:
            total += q_t[x_t] * posterior(clean, torch.tensor(x_t), mask, alpha_t, alpha_s)
    torch.testing.assert_close(total, q_s, rtol=0, atol=1e-12)


def test_posterior_keeps_visible_tokens_and_sums_to_one():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    probs[..., 5] = 0
    probs /= probs.sum(-1, keepdim=True)
    x_t = torch.tensor([[5, 2, 5], [0, 5, 1]])
    alpha_t, alpha_s = torch.tensor([[0.2], [0.5]]), torch.tensor([[0.6], [0.5]])
    out = posterior(probs, x_t, 5, alpha_t, alpha_s)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert out[0, 1, 2] == 1 and out[1, 0, 0] == 1
    torch.testing.assert_close(out[0, 0, 5], torch.tensor(0.5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert out[1, 1, 5] == 1  # alpha_s = alpha_t: nothing happens


def test_mask_tokens_hides_targets_only_with_each_modality_mask():
    batch = make_batch()
    noise = keyed_uniform(0, torch.arange(4), 0, 12)
    noisy = mask_tokens(batch, torch.tensor([0.0, 0.3, 0.8, 1.0]), VOCABULARY, noise)
    assert torch.equal(noisy.masked, batch.targets & (noise < torch.tensor([0.0, 0.3, 0.8, 1.0])[:, None]))
    assert not noisy.masked[0].any() and torch.equal(noisy.masked[3], batch.targets[3])
    is_image = batch.modality == Modality.IMAGE
    assert set(noisy.batch.ids[noisy.masked & ~is_image].tolist()) == {8}
    assert set(noisy.batch.ids[noisy.masked & is_image].tolist()) == {18}
    assert torch.equal(noisy.batch.ids[~noisy.masked], batch.ids[~noisy.masked])
    assert torch.equal(batch.ids, make_batch().ids)  # the input is left alone


def test_mask_tokens_takes_a_rate_per_position():
    batch = make_batch()
    rate = torch.where(batch.modality == Modality.IMAGE, 1.0, 0.0)
    noisy = mask_tokens(batch, rate, VOCABULARY, torch.full((4, 12), 0.5))
    assert torch.equal(noisy.masked, batch.targets & (batch.modality == Modality.IMAGE))


def test_mask_rate_is_met():
    batch = make_batch(2000)
    schedule = get_schedule("cosine")
    rate = schedule.mask_rate(torch.full((2000,), 0.3, dtype=torch.float64))
    noisy = mask_tokens(batch, rate, VOCABULARY, keyed_uniform(1, torch.arange(2000), 0, 12))
    n = int(batch.targets.sum())
    share, p = float(noisy.masked.sum()) / n, float(rate[0])
    assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_mask_count_is_exact(seed):
    batch = make_batch()
    count = torch.tensor([0, 1, 5, 99])
    noisy = mask_count(batch, count, VOCABULARY, keyed_uniform(seed, torch.arange(4), 0, 12))
    assert noisy.masked.sum(1).tolist() == [0, 1, 5, 9]
    assert not bool((noisy.masked & ~batch.targets).any())


def test_mask_count_subsets_are_uniform():
    batch = TokenBatch.from_spans([[Span.text([1, 2, 3, 4])]]).rows(torch.zeros(6000, dtype=torch.long))
    noisy = mask_count(batch, torch.full((6000,), 2), VOCABULARY, keyed_uniform(2, torch.arange(6000), 0, 4))
    codes, counts = (noisy.masked.long() @ torch.tensor([1, 2, 4, 8])).unique(return_counts=True)
    assert len(codes) == 6
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


def test_noise_does_not_depend_on_batch_or_padding():
    batch, keys = make_batch(4), torch.arange(10, 14)
    rate = torch.full((4,), 0.5)
    whole = mask_tokens(batch.pad_to(20), rate, VOCABULARY, keyed_uniform(3, keys, 0, 20)).masked
    alone = mask_tokens(batch.rows([2]), rate[2:3], VOCABULARY, keyed_uniform(3, keys[2:3], 0, 12)).masked
    assert torch.equal(whole[2, :12], alone[0])


def test_hide_drops_a_condition():
    batch = make_batch()
    hidden = batch.hide(batch.given & batch.valid, VOCABULARY)
    assert (hidden.ids[:, 0] == 8).all() and torch.equal(hidden.targets, batch.targets)


def test_reverse_step_law():
    """Chances of staying masked and of each token, against the posterior; the rare token at its own rate."""
    n = 200_000
    probs = torch.tensor([0.9, 0.099, 0.001, 0.0], dtype=torch.float64)
    x_t = torch.full((n,), 8)
    alpha_t, alpha_s = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    u = keyed_uniform(4, torch.arange(n), 0, 2)
    unmask = unmask_probability(alpha_t, alpha_s)
    out = reverse_step(x_t, x_t == 8, probs.expand(n, 4), unmask, u[:, 0], u[:, 1], start=10)
    expected = {8: 0.5, 10: 0.45, 11: 0.0495, 12: 0.0005}
    assert set(out.tolist()) == set(expected)
    for token, p in expected.items():
        assert abs(float((out == token).sum()) / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5


def test_reverse_step_keeps_visible_positions():
    x_t = torch.tensor([3, 8])
    out = reverse_step(x_t, x_t == 8, torch.tensor([[0.5, 0.5]] * 2), torch.tensor(1.0), torch.zeros(2), torch.zeros(2))
    assert out.tolist() == [3, 0]


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 1.0])
def test_draw_token_never_takes_a_token_of_weight_zero(u):
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert int(draw_token(probs, torch.tensor(u, dtype=torch.float64))) == (1 if u == 0 else 3)
