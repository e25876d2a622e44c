"""The adaptive feature cache through the sampler: exact at its limits, row by row, request by request."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache import AdaptiveCache, DualCache, HeldGuidance, IntervalCache, NoCache
from unidiff.models.denoiser import CachePlan
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
PLAIN = Guidance()
GUIDED = Guidance(2.0)
NO_GUIDANCE = Guidance(0.0)  # the unconditional stream alone


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(4)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1).eval().double()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    return net


def row(prompt: int, answer: int, image: tuple[int, int]) -> list[Span]:
    words = [1 + i % 9 for i in range(prompt)]
    return [Span.text(words, True), Span.masked_text(answer, VOCABULARY), Span.masked_image(image, VOCABULARY)]


ROWS = [row(3, 5, (3, 3)), row(6, 2, (2, 3)), row(1, 4, (2, 2))]


def config(guidance: Guidance = PLAIN, block: int | None = None) -> SamplerConfig:
    return SamplerConfig(
        text=ModalityDecoding(steps=4, schedule="fixed", temperature=0.7, block_length=block),
        image=ModalityDecoding(steps=6, temperature=0.8, block_length=block and 2 * block),
        guidance=guidance,
    )


def decode(model, policy, guidance: Guidance = PLAIN, rows=ROWS, seeds=None, block=None, **kwargs) -> SamplerOutput:
    seeds = torch.arange(len(rows)) if seeds is None else seeds
    sampler = Sampler(model, VOCABULARY, config(guidance, block), policy)
    return sampler(TokenBatch.from_spans(rows), seeds, **kwargs)


def assert_same(a: SamplerOutput, b: SamplerOutput) -> None:
    assert torch.equal(a.batch.ids, b.batch.ids)
    torch.testing.assert_close(a.confidence, b.confidence)


@pytest.mark.parametrize(
    "guidance", [PLAIN, GUIDED, NO_GUIDANCE, Guidance(2.0, mode="window", window=(0.4, 0.9))], ids=str
)
@pytest.mark.parametrize(
    "policy",
    [
        AdaptiveCache(1, 1),
        AdaptiveCache(1, 1, 0.5, compat="upstream"),
        AdaptiveCache(1, 100, 1.0, compat="upstream"),  # every response token is always selected
        AdaptiveCache(1, 100, 1.0, full_layers=(), compat="upstream"),
        AdaptiveCache(100, 100, full_layers=(0, 1, 2)),
    ],
    ids=str,
)
def test_recomputing_everything_is_no_cache(model, policy, guidance) -> None:
    plain, cached = decode(model, None, guidance), decode(model, policy, guidance)
    assert_same(plain, cached)
    assert plain.nfe == cached.nfe


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED, NO_GUIDANCE], ids=str)
@pytest.mark.parametrize("compat", [None, "upstream"])
@pytest.mark.parametrize("block", [None, 2])
def test_rows_of_a_padded_batch_are_single_rows(model, guidance, compat, block) -> None:
    policy = HeldGuidance(AdaptiveCache(4, 3, 0.4, compat=compat), 2, 1)
    together = decode(model, policy, guidance, block=block)
    assert together.stats.partial_passes > 0
    for i, spans in enumerate(ROWS):
        alone = decode(model, policy, guidance, [spans], torch.tensor([i]), block)
        n = alone.batch.shape[1]
        assert torch.equal(alone.batch.ids[0], together.batch.ids[i, :n])
        torch.testing.assert_close(alone.confidence[0], together.confidence[i, :n])


def test_it_changes_what_it_should_and_costs_less(model) -> None:
    plain, cached = decode(model, None), decode(model, AdaptiveCache(6, 4, 0.25))
    assert not torch.equal(plain.confidence, cached.confidence)
    assert (cached.batch.ids != VOCABULARY.mask_id).all()
    assert cached.stats.full_passes < plain.stats.full_passes and cached.nfe == plain.nfe


def test_requests_share_no_state(model) -> None:
    sampler = Sampler(model, VOCABULARY, config(GUIDED), HeldGuidance(AdaptiveCache(3, 2, 0.25), 3))
    batch, seeds = TokenBatch.from_spans(ROWS), torch.arange(3)
    first = sampler(batch, seeds)

    def interfere(step: int, state) -> None:
        sampler(TokenBatch.from_spans(ROWS[1:2]), torch.tensor([7]))  # another request in the middle of this one

    assert_same(first, sampler(batch, seeds, callback=interfere))
    assert_same(first, sampler(batch, seeds))


class Spy:
    """Stands in for a policy and keeps its plans, selections and the states they were made for."""

    def __init__(self, policy: AdaptiveCache) -> None:
        self.policy = policy
        self.plans: list[tuple[CachePlan, Tensor, Tensor]] = []
        self.selected: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def start(self, *args):
        self.policy = self.policy.start(*args)
        return self

    def plan(self, state, candidates):
        self.then = state.masked.clone(), state.ids.clone()
        return self.policy.plan(state, candidates)

    def observe(self, state, plan):
        self.plans.append((plan, *self.then))

    def select(self, layer, similarity):
        chosen = self.policy.select(layer, similarity)
        self.selected.append((chosen, similarity))
        return chosen


def test_the_quota_counts_valid_undecoded_positions_of_each_row(model) -> None:
    spy = Spy(AdaptiveCache(100, 100, 0.5))
    decode(model, spy)
    partial = [(plan, open_) for plan, open_, _ in spy.plans if plan.verify is not None]
    layers = model.config.num_layers - 1  # layer 0 compares nothing
    assert len(spy.selected) == layers * len(partial) > 0
    for i, (chosen, similarity) in enumerate(spy.selected):
        plan, open_ = partial[i // layers]
        compared = open_ & ~plan.query
        assert torch.equal(~similarity.isnan(), compared)
        n = compared.sum(1)
        assert torch.equal(chosen.sum(1), torch.maximum(n // 2, (n > 0).long()))
        assert not (chosen & ~compared).any()
        lowest, rest = (
            similarity.where(chosen, -torch.inf).amax(1),
            similarity.where(compared & ~chosen, torch.inf).amin(1),
        )
        assert (lowest <= rest).all()


def test_upstream_takes_the_share_of_the_whole_response(model) -> None:
    spy = Spy(AdaptiveCache(100, 100, 0.3, compat="upstream"))
    decode(model, spy)
    targets = TokenBatch.from_spans(ROWS).targets
    layers = model.config.num_layers - 1
    partial = [open_ for plan, open_, _ in spy.plans if plan.verify is not None]
    assert len(spy.selected) == layers * len(partial) > 0
    for i, (chosen, similarity) in enumerate(spy.selected):
        compared = targets & partial[i // layers].any(1, keepdim=True)  # complete rows rest
        assert torch.equal(~similarity.isnan(), compared)
        assert chosen.sum(1).tolist() == [int(0.3 * n) for n in compared.sum(1).tolist()]


def test_changed_tokens_are_recomputed(model) -> None:
    """Revealed ones, and those that remasking hides again."""
    settings = ModalityDecoding(steps=5, remask="confidence", remask_threshold=0.9, remask_budget=6)
    spy = Spy(AdaptiveCache(100, 100, 0.25))
    sampler = Sampler(model, VOCABULARY, SamplerConfig(text=settings, image=settings), spy)
    sampler(TokenBatch.from_spans(ROWS), torch.arange(3))
    hidden_again = 0
    for (_, _, before), (plan, open_, ids) in pairwise(spy.plans):
        assert torch.equal(plan.query, (ids != before) & open_.any(1, keepdim=True))  # complete rows rest
        hidden_again += int(((ids != before) & open_).sum())
    assert hidden_again > 0


@pytest.mark.parametrize("cache", [AdaptiveCache(1, 1), IntervalCache(1), NoCache(), DualCache(interval=1)], ids=str)
def test_the_guidance_difference_is_kept_between_evaluations(model, cache) -> None:
    """Passes of the unconditional stream: all of the warm-up, then every `interval`-th."""
    rows = [[Span.text([1, 2], True), Span.masked_text(12, VOCABULARY)]] * 2
    text = ModalityDecoding(steps=12, schedule="fixed", temperature=0.0)
    settings = SamplerConfig(text=text, guidance=GUIDED, stop_at_eos=False)
    batch, seeds = TokenBatch.from_spans(rows), torch.arange(2)
    for interval, warmup in ((1, 5), (3, 5), (4, 0)):
        policy = HeldGuidance(cache, interval, warmup)
        out = Sampler(model, VOCABULARY, settings, policy)(batch, seeds)
        unconditional = sum(i % interval == 0 or i < warmup for i in range(12))
        assert out.steps == 12 and out.nfe == 12 + unconditional
    plain = Sampler(model, VOCABULARY, settings)(batch, seeds)
    assert not torch.equal(plain.confidence, out.confidence)


def test_interval_and_ratio_are_checked() -> None:
    for bad in (
        dict(prompt_interval=0),
        dict(response_interval=1.5),
        dict(ratio=1.2),
        dict(compat="other"),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdaptiveCache(**bad)


@pytest.mark.parametrize("policy", [AdaptiveCache(4, 2, 0.3), AdaptiveCache(4, 2, 0.3, compat="upstream")], ids=str)
def test_ties_end_and_nan_is_refused(model, policy) -> None:
    level = copy.deepcopy(model)
    for p in level.parameters():
        p.data.zero_()  # every logit and every cosine is a tie
    ids = decode(level, policy, GUIDED).batch.ids
    assert not torch.isin(ids, torch.tensor([VOCABULARY.mask_id, VOCABULARY.image_mask])).any()
    broken = copy.deepcopy(model)
    broken.blocks[1].feed_forward.down.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(broken, policy, GUIDED)


@pytest.mark.gpu
def test_cuda_equals_cpu_in_float64(model) -> None:
    policy = HeldGuidance(AdaptiveCache(4, 3, 0.4), 2, 1)
    batch, seeds, on_gpu = TokenBatch.from_spans(ROWS), torch.arange(3), copy.deepcopy(model).cuda()
    cpu = Sampler(model, VOCABULARY, config(GUIDED), policy)(batch, seeds)
    gpu = Sampler(on_gpu, VOCABULARY, config(GUIDED), policy)(batch.to("cuda"), seeds.cuda())
    assert torch.equal(cpu.batch.ids, gpu.batch.ids.cpu()) and cpu.nfe == gpu.nfe
