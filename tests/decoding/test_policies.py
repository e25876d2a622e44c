"""Cache policies: what is exact is exact, rows and requests do not touch, decodes end, passes cost what they should."""

from __future__ import annotations

from collections.abc import Callable

import cache_cases
import pytest
import torch
from cache_cases import make_model, same
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache, DualCache, PrefixCache, VicinityCache
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
POLICIES: dict[str, Callable[..., RefreshPolicy]] = {
    "prefix": PrefixCache,
    "dual": DualCache,
    "vicinity": lambda **kw: VicinityCache(look_back=1, look_ahead=2, **{"warmup": 2, **kw}),
}
CONFIGS = {
    "quota": SamplerConfig(
        text=ModalityDecoding(steps=6, schedule="fixed", block_length=4),
        image=ModalityDecoding(steps=8, block_length=4, block_order="checkerboard"),
    ),
    "threshold": SamplerConfig(
        text=ModalityDecoding(rule="threshold", threshold=0.3, temperature=0.0, block_length=3),
        image=ModalityDecoding(rule="factor", factor=0.8, block_length=3),
        guidance=Guidance(2.5),
    ),
    "remask": SamplerConfig(
        text=ModalityDecoding(steps=4, block_length=4, remask="confidence", remask_threshold=0.6, remask_budget=4),
        image=ModalityDecoding(steps=6, rule="ancestral", remask="remdm", remask_cap=0.3, block_length=5),
        guidance=Guidance(2.0, hide="other"),
    ),
    "ordered": SamplerConfig(
        text=ModalityDecoding(rule="first_hitting", block_length=2),
        image=ModalityDecoding(steps=5),
        guidance=Guidance(3.0, mode="window", window=(0.2, 0.7)),
        order="text_first",
    ),
}


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    return make_model()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> SamplerConfig:
    return request.param


def rows() -> list[TokenBatch]:
    return cache_cases.rows((5, 2, 2, 4))


def decode(model, config, policy, batch: TokenBatch, seeds: list[int], **kwargs):
    return Sampler(model, VOCABULARY, config, policy)(batch, torch.tensor(seeds), record=True, **kwargs)


@pytest.mark.parametrize("name", POLICIES)
def test_refreshing_every_pass_is_no_cache(model, config, name):
    batch = TokenBatch.cat(rows())
    plain = decode(model, config, NoCache(), batch, [0, 1, 2])
    cached = decode(model, config, POLICIES[name](interval=1), batch, [0, 1, 2])
    same(plain, cached)
    assert cached.nfe <= plain.nfe  # a stream that no row needs is left out


@pytest.mark.parametrize("name", POLICIES)
def test_caches_are_used_and_every_target_is_filled(model, config, name):
    batch = TokenBatch.cat(rows())
    plain = decode(model, config, NoCache(), batch, [0, 1, 2])
    cached = decode(model, config, POLICIES[name](), batch, [0, 1, 2])
    assert cached.stats.partial_passes > 0
    assert cached.stats.model_tokens / cached.nfe < batch.ids.numel()  # fewer than all rows have
    assert (cached.batch.ids != VOCABULARY.mask_id).all()
    assert torch.equal(cached.batch.ids[batch.given], batch.ids[batch.given])
    assert not torch.equal(plain.confidence, cached.confidence)  # features were really old


@pytest.mark.parametrize("rule", [{}, dict(interval=3), dict(drift=0.2)], ids=str)
@pytest.mark.parametrize("name", [*POLICIES, "causal"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(model, config, name, rule):
    """Rows begin blocks, refresh, use guidance and end at different passes."""
    causal = make_model(attention="block_causal", block_length=3)
    net, policy = (causal, BlockCausalCache()) if name == "causal" else (model, POLICIES[name](**rule))
    together = decode(net, config, policy, TokenBatch.cat(rows()).pad_to(20), [7, 8, 9])
    for i, row in enumerate(rows()):
        alone = decode(net, config, policy, row, [7 + i])
        assert torch.equal(together.batch.ids[i : i + 1, : row.shape[1]], alone.batch.ids)
        torch.testing.assert_close(together.confidence[i : i + 1, : row.shape[1]], alone.confidence)


@pytest.mark.parametrize("block_length", [1, 3, 4, 30])
def test_block_causal_cache_is_exact(config, block_length):
    net = make_model(attention="block_causal", block_length=block_length)
    batch = TokenBatch.cat(rows()).pad_to(19)
    plain = decode(net, config, NoCache(), batch, [0, 1, 2])
    cached = decode(net, config, BlockCausalCache(), batch, [0, 1, 2])
    same(plain, cached)
    assert cached.stats.full_passes == 0
    assert cached.stats.model_tokens < plain.nfe * batch.ids.numel()  # whole rows


def test_block_causal_cache_computes_each_block_once_per_change():
    """8 blocks of 2, one token per pass: in the second pass of a block and the first of the next, 2 and 2 + 2 queries."""
    net = make_model(attention="block_causal", block_length=2)
    batch = TokenBatch.from_spans([[Span.masked_text(16, VOCABULARY)]])
    config = SamplerConfig(text=ModalityDecoding(rule="first_hitting", block_length=2), stop_at_eos=False)
    out = decode(net, config, BlockCausalCache(), batch, [0])
    assert out.nfe == 16 and out.stats.model_tokens == 2 + 8 * 2 + 7 * 4


def test_block_causal_cache_refuses_what_it_cannot_do():
    batch = rows()[0]
    with pytest.raises(ValueError, match="block_causal"):
        decode(make_model(), CONFIGS["quota"], BlockCausalCache(), batch, [0])
    timed = make_model(attention="block_causal", block_length=2, time_conditioning=True)
    with pytest.raises(ValueError, match="ignore the time"):
        decode(timed, CONFIGS["quota"], BlockCausalCache(), batch, [0])


def test_costs_are_those_of_the_formulas(model):
    """S = 18, P = 2, four blocks of 4 with 4 passes each: one full pass per block, then B or S - s tokens."""
    batch = TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_text(16, VOCABULARY)]])
    text = ModalityDecoding(steps=16, schedule="fixed", block_length=4)
    for guidance, streams in ((Guidance(), 1), (Guidance(2.0), 2)):
        config = SamplerConfig(text=text, guidance=guidance, stop_at_eos=False)
        cost = {
            "dual": 4 * (18 + 3 * 4),
            "prefix": sum(18 + 3 * (18 - s) for s in (2, 6, 10, 14)),
            "vicinity": sum(18 + 3 * (min(s + 6, 18) - max(s - 1, 0)) for s in (2, 6, 10, 14)),
        }
        for name, tokens in cost.items():
            policy = POLICIES[name](warmup=0) if name == "vicinity" else POLICIES[name]()
            out = decode(model, config, policy, batch, [0])
            assert out.stats.model_tokens == streams * tokens, name
            assert (out.nfe, out.stats.full_passes, out.stats.partial_passes) == (16 * streams, 4, 12)


def test_rows_pay_for_their_own_refreshes(model):
    """Two rows in other blocks at other times: the batch costs what the rows cost alone, up to the padding of blocks."""
    config = SamplerConfig(text=ModalityDecoding(rule="threshold", threshold=0.35, temperature=0.0, block_length=4))
    long = [Span.text([1, 2], True), Span.masked_text(20, VOCABULARY)]
    batch = TokenBatch.from_spans([long, [Span.text([4, 3], True), *long[1:]], [Span.text([9, 9], True), *long[1:]]])
    alone = [decode(model, config, DualCache(), batch.rows([i]), [i]) for i in range(3)]
    together = decode(model, config, DualCache(), batch, [0, 1, 2])
    assert len({out.steps for out in alone}) > 1
    own = sum(out.stats.model_tokens for out in alone)
    assert own <= together.stats.model_tokens <= own + together.steps * 3 * 4


def test_rows_refresh_by_interval_and_by_drift(model):
    """12 tokens in one block, one per pass: full passes where the rules say so."""
    batch = TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_text(12, VOCABULARY)]])
    config = SamplerConfig(text=ModalityDecoding(rule="first_hitting"), stop_at_eos=False)
    plain = decode(model, config, NoCache(), batch, [0])
    for rule, full in (
        (dict(), 1),
        (dict(interval=5), 3),  # passes 0, 5, 10
        (dict(drift=0.25), 4),  # after every 3 tokens: passes 0, 3, 6, 9
        (dict(drift=1.0), 1),
        (dict(interval=4, drift=0.5), 3),  # 0, 4, 8: a refresh by one rule restarts the other
        (dict(warmup=3), 3),
    ):
        out = decode(model, config, DualCache(**rule), batch, [0])
        assert (out.stats.full_passes, out.stats.partial_passes) == (full, 12 - full), rule
    same(plain, decode(model, config, DualCache(drift=0.0), batch, [0]))


def test_policies_meet_where_they_should(model, config):
    batch = TokenBatch.cat(rows())
    dual = decode(model, config, DualCache(), batch, [4, 5, 6])
    narrow = decode(model, config, VicinityCache(look_back=0, look_ahead=0, warmup=0, interval=None), batch, [4, 5, 6])
    if config.image.block_order == "sequence" and config.image.block_length is None:
        same(dual, narrow)
    wide = decode(model, config, VicinityCache(look_back=99, look_ahead=99, warmup=0), batch, [4, 5, 6])
    same(wide, decode(model, config, NoCache(), batch, [4, 5, 6]))
    behind = TokenBatch.from_spans([[Span.text([3, 1], True), Span.masked_text(6, VOCABULARY)]])
    one = SamplerConfig(text=ModalityDecoding(steps=5))
    same(decode(model, one, DualCache(), behind, [1]), decode(model, one, PrefixCache(), behind, [1]))


@pytest.mark.parametrize("name", POLICIES)
def test_keys_before_or_after_rotary_make_no_difference(model, config, name):
    batch = TokenBatch.cat(rows())
    kept = [decode(model, config, POLICIES[name](rotated=rotated), batch, [0, 1, 2]) for rotated in (True, False)]
    same(*kept)


@pytest.mark.parametrize("name", [*POLICIES, "causal"])
def test_interleaved_requests_share_no_state(model, config, name):
    """A second request runs to its end between two passes of the first, on the same sampler and policy."""
    net = make_model(attention="block_causal", block_length=3) if name == "causal" else model
    sampler = Sampler(net, VOCABULARY, config, BlockCausalCache() if name == "causal" else POLICIES[name]())
    first, second, third = rows()
    alone = [sampler(row, torch.tensor([3])) for row in (first, second, third)]
    inner = []

    def callback(step: int, state) -> None:
        if step in (0, 2):
            inner.append(sampler((second, third)[step // 2], torch.tensor([3])))

    outer = sampler(first, torch.tensor([3]), callback=callback)
    for expected, actual in zip(alone, [outer, *inner], strict=True):
        assert torch.equal(expected.batch.ids, actual.batch.ids)
        assert torch.equal(expected.confidence, actual.confidence)


def test_a_partial_pass_reaches_the_model_with_the_block_alone(model, monkeypatch):
    """Text and image in lockstep: both blocks are queried, nothing else, and no whole forward is made in between."""
    queried = []
    partial = MaskedTransformer.partial

    def spy(self, ids: Tensor, plan, store, time=None, select=None):
        queried.append(None if plan.full else plan.query.clone())
        return partial(self, ids, plan, store, time, select)

    def never(*args, **kwargs):
        raise AssertionError("a whole forward was made")

    monkeypatch.setattr(MaskedTransformer, "partial", spy)
    monkeypatch.setattr(MaskedTransformer, "hidden", never)
    config = SamplerConfig(
        text=ModalityDecoding(steps=4, schedule="fixed", block_length=4),
        image=ModalityDecoding(steps=4, schedule="fixed"),
        stop_at_eos=False,
    )
    batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_text(4, VOCABULARY), rows_image()]])
    decode(model, config, DualCache(), batch, [0])
    assert queried[0] is None and len(queried) == 4
    assert all(torch.equal(q, batch.targets) for q in queried[1:])


def rows_image() -> Span:
    return Span.masked_image((2, 2), VOCABULARY)


def test_a_guidance_stream_refreshes_when_it_joins(model):
    """Window guidance: the unconditional stream starts in mid-block with a full pass of its own."""
    batch = TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_text(8, VOCABULARY)]])
    text = ModalityDecoding(steps=8, schedule="fixed", block_length=8)
    config = SamplerConfig(text=text, guidance=Guidance(2.0, mode="window", window=(0.3, 0.8)), stop_at_eos=False)
    out = decode(model, config, DualCache(), batch, [0])
    assert out.nfe == 8 + 4  # progress 3/8 to 6/8
    assert out.stats.model_tokens == (10 + 7 * 8) + (10 + 3 * 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualCache(interval=0), "interval is 0"),
        (lambda: PrefixCache(warmup=-1), "warmup is -1"),
        (lambda: DualCache(drift=1.5), "drift is 1.5"),
        (lambda: VicinityCache(look_back=-2), "look_back is -2"),
        (lambda: VicinityCache(look_ahead=1.5), "look_ahead is 1.5"),
    ],
)
def test_settings_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class WholeRows:
    """A `Denoiser` that cannot compute some positions only: its partial passes keep what was not asked for."""

    def __init__(self, model: MaskedTransformer) -> None:
        self.hidden, self.head = model.hidden, model.head


@pytest.mark.parametrize("name", POLICIES)
def test_any_denoiser_decodes_under_a_policy(model, config, name):
    """Rows refresh, keep and end like rows alone, although the model sees whole rows."""
    policy, net = POLICIES[name](), WholeRows(model)
    together = decode(net, config, policy, TokenBatch.cat(rows()), [0, 1, 2])
    assert together.stats.partial_passes > 0
    for i, row in enumerate(rows()):
        alone = decode(net, config, policy, row, [i])
        assert torch.equal(together.batch.ids[i : i + 1, : row.shape[1]], alone.batch.ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*POLICIES, "causal"])
def test_cuda_equals_cpu_in_float64(config, name):
    batch, seeds = TokenBatch.cat(rows()), torch.arange(3)
    kwargs = dict(attention="block_causal", block_length=3) if name == "causal" else {}
    policy = BlockCausalCache() if name == "causal" else POLICIES[name](interval=4)
    cpu = Sampler(make_model(**kwargs), VOCABULARY, config, policy)(batch, seeds)
    gpu = Sampler(make_model(**kwargs).cuda(), VOCABULARY, config, policy)(batch.to("cuda"), seeds.cuda())
    assert torch.equal(cpu.batch.ids, gpu.batch.ids.cpu()) and cpu.nfe == gpu.nfe
