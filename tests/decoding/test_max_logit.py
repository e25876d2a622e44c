"""The max-logit cache through the sampler: which positions it recomputes, row by row, request by request."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache.max_logit import MaxLogitCache, low_max_logits
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
GUIDANCE = [Guidance(), Guidance(3.0), Guidance(0.0)]


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(6)
    net = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2).eval().double()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    return net


def row(prompt: int, answer: int, image: tuple[int, int]) -> list[Span]:
    words = [1 + i % 9 for i in range(prompt)]
    spans = [Span.text(words, True), Span.masked_text(answer, VOCABULARY), Span.masked_image(image, VOCABULARY)]
    return [s for s in spans if s.ids.numel()]


ROWS = [row(3, 0, (4, 4)), row(6, 2, (3, 3)), row(1, 3, (2, 4))]


def decode(model, policy, guidance=GUIDANCE[0], rows=ROWS, seeds=None, block=None, **kwargs) -> SamplerOutput:
    config = SamplerConfig(
        text=ModalityDecoding(steps=4, schedule="fixed", temperature=0.7),
        image=ModalityDecoding(steps=10, temperature=0.8, block_length=block),
        guidance=guidance,
    )
    seeds = torch.arange(len(rows)) if seeds is None else seeds
    return Sampler(model, VOCABULARY, config, policy)(TokenBatch.from_spans(rows), seeds, **kwargs)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
@pytest.mark.parametrize("compat", [None, "upstream"])
@pytest.mark.parametrize("settings", [dict(interval=1, warmup=0.0), dict(warmup=1.0)], ids=str)
def test_recomputing_everything_is_no_cache(model, settings, compat, guidance) -> None:
    plain = decode(model, None, guidance)
    cached = decode(model, MaxLogitCache(**settings, compat=compat), guidance)
    assert torch.equal(plain.batch.ids, cached.batch.ids) and plain.nfe == cached.nfe
    torch.testing.assert_close(plain.confidence, cached.confidence)
    assert cached.stats.partial_passes == 0


@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
@pytest.mark.parametrize("compat", [None, "upstream"])
@pytest.mark.parametrize("block", [None, 4])
def test_rows_of_a_padded_batch_are_single_rows(model, guidance, compat, block) -> None:
    policy = MaxLogitCache(0.6, 0.2, 4, compat=compat)
    together = decode(model, policy, guidance, block=block)
    assert together.stats.partial_passes > 0
    for i, spans in enumerate(ROWS):
        alone = decode(model, policy, guidance, [spans], torch.tensor([i]), block)
        n = alone.batch.shape[1]
        assert torch.equal(alone.batch.ids[0], together.batch.ids[i, :n])
        torch.testing.assert_close(alone.confidence[0], together.confidence[i, :n])


def test_requests_share_no_state(model) -> None:
    config = SamplerConfig(image=ModalityDecoding(steps=9), guidance=Guidance(2.0))
    sampler = Sampler(model, VOCABULARY, config, MaxLogitCache(0.7, 0.1, 3))
    batch, seeds = TokenBatch.from_spans(ROWS), torch.arange(3)
    first = sampler(batch, seeds)

    def interfere(step: int, state) -> None:
        sampler(TokenBatch.from_spans(ROWS[1:2]), torch.tensor([7]))  # another request in the middle of this one

    again = sampler(batch, seeds, callback=interfere)
    assert torch.equal(first.batch.ids, again.batch.ids) and torch.equal(first.confidence, again.confidence)


class Spy:
    """Stands in for a policy and keeps its plans with the states they were made for."""

    def __init__(self, policy: MaxLogitCache) -> None:
        self.policy, self.passes = policy, []

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def start(self, *args):
        self.policy = self.policy.start(*args)
        return self

    def plan(self, state, candidates):
        peaks = {s: p.clone() for s, p in state.max_logits.items()}
        self.then = candidates.clone(), state.ids.clone(), peaks
        return self.policy.plan(state, candidates)

    def observe(self, state, plan):
        self.passes.append((plan, *self.then))


def test_the_schedule_of_full_passes(model) -> None:
    """Of the passes that the row makes: `steps`, or one per token where those are fewer."""
    for number, spans in enumerate(ROWS):
        spy, batch = Spy(MaxLogitCache(0.5, 0.3, 4)), TokenBatch.from_spans([spans])
        decode(model, spy, Guidance(2.0), [spans], torch.tensor([number]))
        hidden = [int((batch.targets & (batch.modality == modality)).sum()) for modality in Modality]
        total = min(10, max(hidden))
        begin = int(0.3 * total)
        full = [plan.full for plan, *_ in spy.passes]
        assert full == [i <= begin or (i - begin) % 4 == 0 for i in range(total)]
        assert all(plan.of(1).full == plan.full for plan, *_ in spy.passes if 1 in plan.others)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0)], ids=str)
def test_low_candidates_and_changed_tokens_are_recomputed(model, guidance) -> None:
    """By default the share is of the undecoded positions of each row and stream, and a revealed token never waits."""
    spy = Spy(MaxLogitCache(0.75, 0.0, 100))
    decode(model, spy, guidance)
    assert len(spy.passes) == 10
    for (_, _, before, _), (plan, candidates, ids, max_logits) in pairwise(spy.passes):
        changed = (ids != before) & candidates.any(1, keepdim=True)  # complete rows rest
        for stream, peak in max_logits.items():
            query = plan.of(stream).query
            assert (query[changed]).all() and not (query & ~candidates & ~changed).any()
            for i in range(len(ids)):
                values = peak[i][candidates[i]].float()
                if values.numel():
                    expected = values <= torch.quantile(values, 0.25)
                    assert torch.equal(query[i][candidates[i]], expected)
                    assert expected.sum() <= values.numel() // 4 + 1


def test_upstream_ranks_the_whole_row_and_forgets_revealed_tokens(model) -> None:
    spy = Spy(MaxLogitCache(0.8, 0.0, 100, compat="upstream"))
    decode(model, spy)
    valid, stale = TokenBatch.from_spans(ROWS).valid, 0
    for (_, _, before, _), (plan, candidates, ids, max_logits) in pairwise(spy.passes):
        for i in candidates.any(1).nonzero()[:, 0].tolist():  # complete rows rest
            values = max_logits[0][i][valid[i]].float()
            assert torch.equal(plan.query[i][valid[i]], values <= torch.quantile(values, 1 - 0.8))
        stale += int(((ids != before) & ~plan.query).sum())
    assert stale > 0


def test_quantile_is_that_of_torch_over_the_counted() -> None:
    torch.manual_seed(0)
    max_logits = torch.randn(5, 31)
    counted = torch.rand(5, 31) < 0.7
    counted[3] = False
    counted[4] = True
    for share in (0.0, 1 - 0.9, 0.5, 1.0):
        low = low_max_logits(max_logits, counted, share)
        for i in range(5):
            values = max_logits[i][counted[i]]
            expected = values <= torch.quantile(values, share) if values.numel() else torch.zeros(0, dtype=torch.bool)
            assert torch.equal(low[i][counted[i]], expected)
        assert not (low & ~counted).any()


def test_partial_passes_cost_less_and_the_result_is_whole(model) -> None:
    plain, cached = decode(model, None), decode(model, MaxLogitCache())
    assert cached.stats.model_tokens < plain.stats.model_tokens
    assert (cached.batch.ids != VOCABULARY.mask_id).all()


def test_guidance_streams_run_in_one_call(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own query."""
    calls, partial = [], MaskedTransformer.partial

    def spy(self, ids, plan, *args, **kwargs):
        calls.append((len(ids), plan.query))
        return partial(self, ids, plan, *args, **kwargs)

    monkeypatch.setattr(MaskedTransformer, "partial", spy)
    out = decode(model, MaxLogitCache(0.75, 0.0, 100), Guidance(2.0))
    assert [rows for rows, _ in calls] == [2 * len(ROWS)] * out.steps
    assert any(not torch.equal(*query.chunk(2)) for _, query in calls if query is not None)


def test_settings_are_checked() -> None:
    for bad in (dict(ratio=1.5), dict(warmup=-0.1), dict(interval=0), dict(compat="other")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MaxLogitCache(**bad)


@pytest.mark.parametrize("compat", [None, "upstream"])
def test_ties_end_and_nan_is_refused(model, compat) -> None:
    policy = MaxLogitCache(0.7, 0.1, 4, compat=compat)
    level = copy.deepcopy(model)
    for p in level.parameters():
        p.data.zero_()  # every logit is a tie
    ids = decode(level, policy, GUIDANCE[1]).batch.ids
    assert not torch.isin(ids, torch.tensor([VOCABULARY.mask_id, VOCABULARY.image_mask])).any()
    broken = copy.deepcopy(model)
    broken.blocks[1].feed_forward.down.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        decode(broken, policy, GUIDANCE[1])


@pytest.mark.gpu
def test_cuda_equals_cpu_in_float64(model) -> None:
    config = SamplerConfig(image=ModalityDecoding(steps=9), guidance=Guidance(2.0))
    batch, seeds, policy = TokenBatch.from_spans(ROWS), torch.arange(3), MaxLogitCache(0.7, 0.1, 3)
    on_gpu = copy.deepcopy(model).cuda()
    cpu = Sampler(model, VOCABULARY, config, policy)(batch, seeds)
    gpu = Sampler(on_gpu, VOCABULARY, config, policy)(batch.to("cuda"), seeds.cuda())
    assert torch.equal(cpu.batch.ids, gpu.batch.ids.cpu()) and cpu.nfe == gpu.nfe
