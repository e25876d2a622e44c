"""UniGRPO: its loss by hand, and that it raises a reward a tiny model can learn."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from train_fixtures import VOCABULARY

from unidiff.decoding import CacheConfig, ModalityDecoding, SamplerConfig
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch
from unidiff.train.reward import RewardConfig, RewardTuner, States, advantages, decoded_states, policy_terms

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
    fixed = policy_terms(new, old, reference, torch.tensor([1.0, -2.0]), masked, 0.2, 0.5, torch.tensor([4, 8]))
    row = [-first * 2 + 0.5 * sum(k3[:2]), -second * 2 + 0.5 * sum(k3[2:])]
    assert float(fixed.total) == pytest.approx((row[0] / 4 + row[1] / 8) / 2)
    assert (fixed.divergence, fixed.clipped) == (terms.divergence, terms.clipped)


def test_the_gradient_at_the_old_weights_is_the_policy_gradient():
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logs = torch.nn.functional.logsigmoid(logits)
    advantage, masked = torch.tensor([0.5, -1.5], dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    terms = policy_terms(logs, logs.detach(), logs.detach(), advantage, masked, 0.2, 0.01)
    (got,) = torch.autograd.grad(terms.total, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(logs.mean(1) * advantage).mean(), logits)
    torch.testing.assert_close(got, expected)


def tuner(beta: float, seed: int = 0, cache: CacheConfig | None = None, **changes) -> tuple[RewardTuner, TokenBatch]:
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=32, num_layers=1, num_heads=2)

    def reward(finished: TokenBatch) -> torch.Tensor:
        return (finished.ids[:, 2:] == VOCABULARY.image[0] + 3).float().mean(1)  # pictures made of code 3

    settings = SamplerConfig(image=ModalityDecoding(steps=3))
    config = RewardConfig(group=8, beta=beta, chunk=64, seed=seed, lr=2e-2, **changes)
    words = Span.text(torch.tensor([1, 9]), True)
    prompts = TokenBatch.from_spans([[words, Span.masked_image((2, 3), VOCABULARY)] for _ in range(4)])
    return RewardTuner(model, VOCABULARY, settings, reward, config, cache), prompts


@pytest.mark.parametrize("states", get_args(States))
def test_the_reward_rises_and_the_prompt_stays(states):
    run, prompts = tuner(beta=0.01, states=states)
    reports = [run.step(prompts) for _ in range(25)]
    assert reports[0].reward < 0.2  # 16 codes
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


def test_decoded_states_are_what_the_decode_saw():
    run, prompts = tuner(beta=0.0, states="decoded")
    index = torch.arange(4).repeat_interleave(8)
    finished, seen = run.decode(prompts.rows(index), torch.arange(32), None)
    assert seen.shape == (3, 32, 8) and not bool((finished.ids == VOCABULARY.image_mask).any())
    chosen = []
    for number in range(20):
        noisy = run.state(finished, seen, torch.arange(32), number)
        same = (seen == noisy.batch.ids).all(-1)  # [passes, B]
        assert bool(same.any(0).all()) and bool(noisy.masked.any(1).all())
        assert torch.equal(noisy.masked, noisy.batch.ids == VOCABULARY.image_mask)
        assert torch.equal(noisy.batch.ids[~noisy.masked], finished.ids[~noisy.masked])
        chosen.append(noisy.masked.sum(1))
    assert torch.stack(chosen).unique().tolist() == seen.eq(VOCABULARY.image_mask).sum(-1).unique().tolist()


def test_rows_that_finish_early_repeat_their_last_state():
    full, short = torch.arange(12).view(3, 2, 2), torch.arange(4).view(2, 1, 2) + 50
    outs = [SimpleNamespace(trajectory=[*part, part[-1] * 0]) for part in (full, short)]
    states = decoded_states(outs)
    assert torch.equal(states[:, :2], full) and states[:, 2].tolist() == [[50, 51], [52, 53], [52, 53]]


@pytest.mark.parametrize("states", get_args(States))
def test_pieces_change_nothing_but_rounding(states):
    (whole, prompts), (pieces, _) = (tuner(beta=0.1, states=states, rows=rows) for rows in (64, 5))
    for _ in range(2):
        a, b = whole.step(prompts), pieces.step(prompts)
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=2e-3, abs=1e-6)


def test_a_cache_that_is_exact_gives_the_same_run():
    (plain, prompts), (cached, _) = (
        tuner(beta=0.1, cache=cache) for cache in (CacheConfig(), CacheConfig("interval", {"interval": 1}))
    )
    assert plain.step(prompts).reward == cached.step(prompts).reward


def test_bad_settings_and_rewards_are_refused():
    with pytest.raises(ValueError, match="rows is 0"):
        RewardConfig(rows=0)
    with pytest.raises(ValueError, match="states is 'all'; expected one of 'random', 'decoded'"):
        RewardConfig(states="all")
    with pytest.raises(ValueError, match="group is 1; expected a whole number from 2"):
        RewardConfig(group=1)
    with pytest.raises(ValueError, match="low <= high"):
        RewardConfig(low=0.9, high=0.1)
    run, prompts = tuner(beta=0.0)
    run.reward = lambda finished: torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected \(32,\)"):
        run.step(prompts)
