"""UniGRPO: its loss by hand, and that it raises a reward a tiny model can learn."""

from __future__ import annotations

import math

import pytest
import torch
from train_fixtures import VOCABULARY

from unidiff.decoding import ModalityDecoding, SamplerConfig
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch
from unidiff.train.config import OptimiserConfig
from unidiff.train.reward import RewardConfig, RewardTuner, advantages, policy_terms

pytestmark = pytest.mark.training


def test_advantages_are_standardised_in_each_group():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-1.0, 1.0, -1.0, 1.0]])
    expected = torch.tensor([[-math.sqrt(2), 0, 0, math.sqrt(2)], [0, 0, 0, 0], [-1, 1, -1, 1]])
    torch.testing.assert_close(advantages(rewards), expected)


def test_the_loss_by_hand():
    old = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.4, 0.3]], dtype=torch.float64).log()
    new = torch.tensor([[0.7, 0.55, 0.9], [0.1, 0.42, 0.9]], dtype=torch.float64).log()
    reference = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.4, 0.3]], dtype=torch.float64).log()
    masked = torch.tensor([[True, True, False], [True, True, False]])
    terms = policy_terms(new, old, reference, torch.tensor([1.0, -2.0]), masked, 0.2, 0.5)
    first = (min(1.4, 1.2) + 1.1) / 2
    second = (min(0.5 * -2, 0.8 * -2) + 1.05 * -2) / 2
    k3 = [math.exp(-x) - 1 + x for x in (math.log(1.4), math.log(1.1), math.log(0.5), math.log(1.05))]
    divergence = sum(k3) / 4
    assert float(terms.total) == pytest.approx(-(first + second) / 2 + 0.5 * divergence)
    assert float(terms.divergence) == pytest.approx(divergence) and min(k3) > 0
    assert float(terms.clipped) == pytest.approx(0.5)  # 1.4 and 0.5


def test_the_gradient_at_the_old_weights_is_the_policy_gradient():
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logs = torch.nn.functional.logsigmoid(logits)
    advantage, masked = torch.tensor([0.5, -1.5], dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    terms = policy_terms(logs, logs.detach(), logs.detach(), advantage, masked, 0.2, 0.01)
    (got,) = torch.autograd.grad(terms.total, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logs.mean(1) * advantage).mean(), logits)
    torch.testing.assert_close(got, expected)


def tuner(beta: float, seed: int = 0) -> tuple[RewardTuner, TokenBatch]:
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=32, num_layers=1, num_heads=2)

    def reward(finished: TokenBatch) -> torch.Tensor:
        return (finished.ids[:, 2:] == VOCABULARY.image[0] + 3).float().mean(1)  # pictures made of code 3

    settings = SamplerConfig(image=ModalityDecoding(steps=3))
    config = RewardConfig(group=8, beta=beta, chunk=64, seed=seed)
    optimiser = OptimiserConfig(lr=2e-2, weight_decay=0.0)
    words = Span.text(torch.tensor([1, 9]), True)
    prompts = TokenBatch.from_spans([[words, Span.masked_image((2, 3), VOCABULARY)] for _ in range(4)])
    return RewardTuner(model, VOCABULARY, settings, reward, config, optimiser), prompts


def test_the_reward_rises_and_the_prompt_stays():
    run, prompts = tuner(beta=0.01)
    reports = [run.step(prompts) for _ in range(25)]
    assert sum(r.reward for r in reports[:3]) / 3 < 0.2  # 16 codes
    assert sum(r.reward for r in reports[-3:]) / 3 > 0.5
    assert reports[0].divergence == pytest.approx(0, abs=0.05) and reports[-1].divergence > 0.1
    assert all(math.isfinite(r.loss) and math.isfinite(r.grad_norm) for r in reports)


def test_the_divergence_holds_the_model_back_and_runs_repeat():
    free, prompts = tuner(beta=0.0)
    held, _ = tuner(beta=5.0)
    again, _ = tuner(beta=0.0)
    for _ in range(8):
        loose, tight, same = (run.step(prompts) for run in (free, held, again))
        assert loose == same
    assert tight.divergence < loose.divergence


def test_bad_settings_and_rewards_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        RewardConfig(group=1)
    with pytest.raises(ValueError, match="low <= high"):
        RewardConfig(low=0.9, high=0.1)
    run, prompts = tuner(beta=0.0)
    run.reward = lambda finished: torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected \(32,\)"):
        run.step(prompts)
