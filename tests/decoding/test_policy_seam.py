"""A cache is a policy: fake ones plug into the sampler without the sampler knowing them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_model import TableModel

from unidiff.decoding import DecodeState, Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.models.denoiser import CachePlan
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)


class EveryNth(NoCache):
    """Recomputes everything in every n-th pass and reuses the last features in between."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.passes = 0
        self.observed: list[tuple[int, int, bool]] = []

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        if state.nfe == 0:
            self.passes = 0
        full = self.passes % self.interval == 0
        self.passes += 1
        return CachePlan(None if full else torch.zeros_like(candidates), candidates, full)

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        self.observed.append((state.step, int(state.just_unmasked.sum()), plan.full))


class LeftmostOnly(NoCache):
    """Recomputes and shows logits at the first open position of each row alone."""

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        first = candidates & (candidates.long().cumsum(1) == 1)
        return CachePlan(first, first, full=False)


class Withholding(NoCache):
    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        return CachePlan(logits=torch.zeros_like(candidates))


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(3)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2).eval().double()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    return net


def request_of(rows: int) -> TokenBatch:
    spans = [Span.text([3], True), Span.masked_text(4, VOCABULARY), Span.masked_image((3, 3), VOCABULARY)]
    return TokenBatch.from_spans([spans] * rows)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(2.0), Guidance(2.0, mode="window", window=(0.4, 0.9), hide="other")]
)
def test_refreshing_every_pass_is_no_cache(model: MaskedTransformer, guidance: Guidance) -> None:
    config = SamplerConfig(text=ModalityDecoding(steps=4), image=ModalityDecoding(steps=6), guidance=guidance)
    plain = Sampler(model, VOCABULARY, config)(request_of(3), torch.arange(3))
    cached = Sampler(model, VOCABULARY, config, EveryNth(1))(request_of(3), torch.arange(3))
    assert torch.equal(plain.batch.ids, cached.batch.ids) and torch.equal(plain.confidence, cached.confidence)
    assert plain.nfe == cached.nfe


def test_reuse_makes_fewer_passes_and_policies_see_what_was_written(model: MaskedTransformer) -> None:
    config = SamplerConfig(
        text=ModalityDecoding(steps=4, schedule="fixed"), image=ModalityDecoding(steps=9, schedule="fixed")
    )
    policy = EveryNth(3)
    out = Sampler(model, VOCABULARY, config, policy)(request_of(2), torch.arange(2))
    assert out.steps == 9 and out.nfe == 3
    assert (out.stats.full_passes, out.stats.partial_passes, out.stats.reused_passes) == (3, 0, 6)
    assert (out.batch.ids != VOCABULARY.mask_id).all()
    assert [full for *_, full in policy.observed] == [True, False, False] * 3
    assert sum(written for _, written, _ in policy.observed) == int(request_of(2).targets.sum())
    plain = Sampler(model, VOCABULARY, config)(request_of(2), torch.arange(2))
    assert not torch.equal(plain.batch.ids, out.batch.ids)  # features were really stale


def test_stale_logits_have_the_law_of_independent_positions() -> None:
    """Two tokens, one per pass, features of the first pass used twice: the product of the marginals, exactly."""
    joint = torch.tensor([[0.45, 0.05], [0.1, 0.4]], dtype=torch.float64)
    model, n = TableModel.from_joint(joint), 40_000
    config = SamplerConfig(text=ModalityDecoding(rule="first_hitting"))
    product = (joint.sum(1)[:, None] * joint.sum(0)).flatten()
    for policy, law in ((EveryNth(2), product), (EveryNth(1), joint.flatten())):
        out = Sampler(model, model.vocabulary, config, policy)(model.request(n), torch.arange(n))
        share = torch.bincount(model.index_of(out.batch.ids), minlength=4).double() / n
        assert ((share - law).abs() < 5 * (law * (1 - law) / n).sqrt()).all()


def test_a_policy_may_restrict_where_tokens_are_committed(model: MaskedTransformer) -> None:
    config = SamplerConfig(text=ModalityDecoding(rule="threshold", threshold=0.0), image=ModalityDecoding(steps=1))
    out = Sampler(model, VOCABULARY, config, LeftmostOnly())(request_of(2), torch.arange(2), record=True)
    for before, after in zip(out.trajectory, out.trajectory[1:], strict=False):
        for row_before, row_after in zip(before, after, strict=True):
            changed = (row_before != row_after).nonzero().flatten().tolist()
            assert changed == (row_before == VOCABULARY.mask_id).nonzero().flatten().tolist()[:1]
    assert out.steps == 13
    assert (out.stats.full_passes, out.stats.partial_passes) == (1, 12)  # there is nothing to reuse in the first


def test_state_belongs_to_the_request(model: MaskedTransformer) -> None:
    config = SamplerConfig(image=ModalityDecoding(steps=5))
    sampler = Sampler(model, VOCABULARY, config, EveryNth(2))
    first = sampler(request_of(2), torch.arange(2))
    sampler(request_of(1), torch.tensor([9]))
    again = sampler(request_of(2), torch.arange(2))
    assert torch.equal(first.batch.ids, again.batch.ids) and first.nfe == again.nfe


def test_a_policy_that_withholds_all_logits_is_reported_not_waited_for(model: MaskedTransformer) -> None:
    batch = TokenBatch.from_spans([[Span.masked_text(1, VOCABULARY)]])
    with pytest.raises(RuntimeError, match="never asks for logits"):
        Sampler(model, VOCABULARY, SamplerConfig(), Withholding())(batch, torch.tensor([0]))
