"""Reference variants against what they should reduce to."""

import pytest
import torch
from reference.objectives import (
    d3pm_loss,
    discrete_time,
    plain_cross_entropy,
    sedd_log_score,
    sedd_loss,
    unidisc_capped_total,
    unidisc_dropout,
)
from reference.process import posterior

from unidiff.diffusion import get_schedule, joint_elbo
from unidiff.tokens import Modality, Span, TokenBatch

MASK = 5


def random_probs(mask_share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(4, MASK, generator=generator, dtype=torch.float64)
    probs = probs / probs.sum(-1, keepdim=True) * (1 - mask_share)
    return torch.cat([probs, torch.full((4, 1), mask_share, dtype=torch.float64)], -1)


def test_d3pm_is_the_divergence_of_the_posteriors():
    """KL(q(x_s | x_t = m, x0) || p(x_s | x_t = m)), with p from Bayes' rule over x0 in {tokens, m}."""
    x0, steps = torch.tensor([0, 1, 2, 3]), 8
    alpha_t = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
    alpha_s = alpha_t + 1 / steps
    probs = random_probs(0.2)
    clean = torch.nn.functional.one_hot(x0, MASK + 1).double()
    true = posterior(clean, torch.full((4,), MASK), MASK, alpha_t, alpha_s)
    # D3PM feeds the predicted mixture itself through q: unnormalised weights of x_s given x_t = m
    noise = torch.nn.functional.one_hot(torch.tensor(MASK), MASK + 1).double()
    forward = alpha_s[:, None] * probs + (1 - alpha_s)[:, None] * noise  # p(x_s)
    to_mask = torch.where(torch.arange(MASK + 1) == MASK, 1.0, 1 - (alpha_t / alpha_s)[:, None])  # q(x_t = m | x_s)
    model = forward * to_mask
    model = model / model.sum(-1, keepdim=True)
    expected = torch.where(true > 0, true * (true / model).log(), 0).sum(-1)
    actual = d3pm_loss(probs.log().gather(-1, x0[:, None])[:, 0], probs[:, MASK].log(), alpha_t, alpha_s, steps)
    torch.testing.assert_close(actual, steps * expected, rtol=1e-10, atol=1e-12)


def test_sedd_with_a_subs_score_is_the_elbo_loss():
    x0, t = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.2, 0.7], dtype=torch.float64)
    schedule = get_schedule("geometric")
    sigma = schedule.sigma(t)
    probs = random_probs(0.0).view(2, 2, -1)
    log_score = probs.log() - torch.log(torch.expm1(sigma))[:, None, None]
    masked = torch.tensor([[True, True], [True, False]])
    loss = schedule.dsigma(t)[:, None] * sedd_loss(log_score, x0, masked, MASK, sigma)
    nll = -probs.log().gather(-1, x0[..., None])[..., 0] * masked
    torch.testing.assert_close(loss, schedule.weight(t)[:, None] * nll)


def test_sedd_score_of_the_current_token_is_one():
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    x_t = torch.tensor([[0, 1, 5], [5, 5, 2]])
    score = sedd_log_score(logits, x_t, torch.tensor([0.1, 2.0]))
    assert not bool(score.gather(-1, x_t[..., None]).any()) and int((score == 0).sum()) == 6


def test_discrete_time_rounds_up():
    assert discrete_time(torch.tensor([0.01, 0.24, 0.26, 0.99]), 4).tolist() == [0.25, 0.25, 0.5, 1.0]


def test_unidisc_dropout_never_drops_both():
    modality = torch.tensor([[0, 0, 1, 1]] * 4)
    masked = torch.tensor([[True, False, True, False]] * 4)
    low, high = 0.1, 0.9
    dropped = unidisc_dropout(
        masked, modality, 0.5, torch.tensor([high, low, high, low]), torch.tensor([high, high, low, low])
    )
    assert dropped.text.tolist() == [False, True, False, False]
    assert dropped.image.tolist() == [False, False, True, False]
    same, text, image = masked[0].tolist(), [True, True, False, False], [False, False, True, True]
    assert dropped.masked.tolist() == [same, text, image, same]


@pytest.mark.parametrize(("text_nll", "expected"), [(8.0, 2.0), (1.0, 1.5)])
def test_capped_total(text_nll, expected):
    batch = TokenBatch.from_spans([[Span.text([1]), Span.image(torch.tensor([[9]]))]])
    nll = torch.tensor([[text_nll, 4.0]], requires_grad=True)
    weights = {Modality.TEXT: 1.0, Modality.IMAGE: 0.5}
    total = unidisc_capped_total(joint_elbo(nll, torch.ones(1), batch, weights), weights)
    total.backward()
    assert float(total.detach()) == expected  # terms 4.0 or 0.5, and 1.0
    assert nll.grad is not None and nll.grad[0, 1] == 0.25  # the cap is detached from the image term
    assert nll.grad[0, 0] == pytest.approx(0.5 * min(1.0, 2.0 / text_nll))


def test_a_batch_without_images_is_not_capped():
    batch = TokenBatch.from_spans([[Span.text([1, 2])]])
    weights = {Modality.TEXT: 1.0, Modality.IMAGE: 0.5}
    terms = joint_elbo(torch.tensor([[3.0, 0.0]]), torch.ones(1), batch, weights)
    assert float(unidisc_capped_total(terms, weights)) == 1.5


def test_plain_cross_entropy_skips_ignored_labels():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, -100, 3], [-100, -100, 1]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 0] + log_p[0, 2, 3] + log_p[1, 2, 1]) / 3
    torch.testing.assert_close(plain_cross_entropy(logits, labels), expected)
