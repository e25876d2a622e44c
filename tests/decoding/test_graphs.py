"""Recorded passes compute what passes do: on CUDA as graphs, elsewhere on a tape that repeats operations blindly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_tape import TapeRecorder

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import AdaptiveCache, BlockCausalCache, HeldGuidance, RefreshPolicy
from unidiff.decoding.cache.config import CacheConfig
from unidiff.decoding.graphs import CudaRecorder, PassGraphs, bucket, recordable, widened
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
CONFIGS = {
    "quota": SamplerConfig(
        text=ModalityDecoding(steps=8, schedule="fixed", block_length=8),
        image=ModalityDecoding(steps=16, block_length=8, block_order="checkerboard"),
        order="text_first",
    ),
    "guided": SamplerConfig(
        text=ModalityDecoding(steps=8, block_length=8),
        image=ModalityDecoding(steps=16, temperature=0.0, block_length=16),
        guidance=Guidance(2.5, hide="other"),
    ),
}
CACHES: dict[str, Callable[[], RefreshPolicy]] = {
    "none": NoCache,
    "prefix": CacheConfig("prefix").build,
    "dual": CacheConfig("dual").build,
    "dual-plain": CacheConfig("dual", {"rotated": False, "interval": 4}).build,
    "vicinity": CacheConfig("vicinity", {"look_back": 3, "look_ahead": 5}).build,
    "interval": CacheConfig("interval", {"interval": 5}).build,
    "adaptive": lambda: AdaptiveCache(prompt_interval=6, response_interval=4),
    "adaptive-guided": lambda: HeldGuidance(AdaptiveCache(6, 4, full_layers=()), 3, 2),
    "adaptive-upstream": lambda: AdaptiveCache(6, 4, ratio=0.4, compat="upstream"),
    "max-logit": CacheConfig("max-logit", {"ratio": 0.5, "warmup": 0.1}).build,
    "modality": CacheConfig("modality").build,
    "segments": CacheConfig(
        segments={
            "prompt": CacheConfig("interval", {"interval": 4}),
            "text": CacheConfig("dual"),
            "image": CacheConfig("max-logit"),
        }
    ).build,
    "block-causal": BlockCausalCache,
}


def make_model(**settings: Any) -> MaskedTransformer:
    torch.manual_seed(2)
    model = MaskedTransformer(VOCABULARY.size, 16, 3, 4, num_kv_heads=2, **settings).eval().double()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.35)
    return model.requires_grad_(False)


def rows() -> TokenBatch:
    """A row of 42 tokens, and one of 41 with other places of the same kinds."""
    image = Span.masked_image((4, 4), VOCABULARY)
    long = [Span.text([3, 1], True), Span.masked_text(24, VOCABULARY), image]
    short = [Span.text([4], True), image, Span.masked_text(24, VOCABULARY)]
    return TokenBatch.from_spans([long, short])


def decode(model: MaskedTransformer, config: SamplerConfig, name: str, batch: TokenBatch, graphs: Any):
    sampler = Sampler(model, VOCABULARY, config, CACHES[name](), graphs=graphs)
    return sampler(batch, torch.arange(len(batch.ids)) + 5, record=True)


def model_for(name: str) -> MaskedTransformer:
    causal: dict[str, Any] = dict(attention="block_causal", block_length=8) if name == "block-causal" else {}
    return make_model(**causal)


def same(plain: Any, graphed: Any) -> None:
    for a, b in zip(plain.trajectory, graphed.trajectory, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(plain.confidence, graphed.confidence, rtol=1e-6, atol=1e-7)
    a, b = plain.stats, graphed.stats
    assert (plain.nfe, a.full_passes, a.partial_passes) == (graphed.nfe, b.full_passes, b.partial_passes)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", CACHES)
def test_recorded_passes_decode_the_same_and_ask_the_device_nothing(name, config):
    """The tape refuses to record an operation that a CUDA graph could not."""
    model, tape = model_for(name), TapeRecorder()
    batch = rows() if config is CONFIGS["quota"] else rows().rows(slice(1))
    same(decode(model, config, name, batch, False), decode(model, config, name, batch, tape))
    assert tape.repeated > 1


def test_models_with_time_and_learned_places_are_recorded_too():
    model = make_model(
        time_conditioning=True, time_tokens="image", sandwich_norm=True, qk_norm="head", image_embeddings=2, shift=True
    )
    for name in ("none", "dual", "adaptive"):
        tape = TapeRecorder()
        same(
            decode(model, CONFIGS["guided"], name, rows(), False), decode(model, CONFIGS["guided"], name, rows(), tape)
        )
        assert tape.repeated > 1


def test_every_request_records_its_own_and_the_cpu_records_nothing():
    model, tape = make_model(), TapeRecorder()
    decode(model, CONFIGS["quota"], "dual", rows(), tape)
    count = len(tape.tapes)
    decode(model, CONFIGS["quota"], "dual", rows(), tape)
    assert len(tape.tapes) == 2 * count > 0
    same(decode(model, CONFIGS["quota"], "dual", rows(), False), decode(model, CONFIGS["quota"], "dual", rows(), True))


def test_a_block_of_a_dual_cache_needs_one_recording():
    """Full passes and passes over a block of 8: two kinds, each run once as it is, recorded once, then repeated."""
    tape = TapeRecorder()
    out = decode(make_model(), CONFIGS["quota"], "dual", rows().rows(slice(1)), tape)
    assert len(tape.tapes) == 2
    assert tape.repeated == out.stats.full_passes + out.stats.partial_passes - 4


def test_buckets_are_few_and_waste_little():
    widths = {w: bucket(w, 4096) for w in range(4097)}
    assert all(w <= b for w, b in widths.items())
    assert all(b - w < 8 or b <= 1.125 * w for w, b in widths.items())
    assert len(set(widths.values())) <= 60
    assert bucket(0, 50) == 0 and bucket(64, 1152) == 64 and bucket(45, 47) == 47


@pytest.mark.parametrize("outputs", [False, True], ids=["narrow", "layered"])
def test_padding_of_an_index_to_its_bucket_changes_nothing(outputs):
    model, batch = make_model(), rows()
    generator = torch.Generator().manual_seed(0)
    query = torch.rand(batch.shape, generator=generator) < 0.3
    query &= batch.valid
    verify = batch.valid & ~query if outputs else None
    quota = AdaptiveCache(ratio=0.3)
    sizes = (query.sum(1), torch.zeros(2) if verify is None else quota.quota(verify.sum(1)))
    exact = CachePlan(query, None, False, verify, width=int(sizes[0].max()))
    if verify is not None:
        exact = CachePlan(
            query, None, False, verify, (1,), exact.width, batch.shape[1], int((sizes[0] + sizes[1]).max())
        )
    found = []
    for plan in (exact, widened(exact, batch.shape[1])):
        store = model.make_store(batch, StoreOptions(outputs=outputs))
        model.partial(batch.ids, CachePlan(), store)
        model.partial((batch.ids + query) % 5, plan, store, select=quota.select)
        found.append([store.key[..., :-1, :], store.value[..., :-1, :], store.hidden[:, :-1], store.computed[:, :-1]])
    assert widened(exact, batch.shape[1]) != exact and recordable(exact)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_passes_whose_sizes_are_not_known_are_not_recorded():
    query = torch.ones(2, 4, dtype=torch.bool)
    assert recordable(CachePlan())
    assert not recordable(CachePlan(query, full=False))
    assert not recordable(CachePlan(query, full=False, width=4, fresh=query[:, 0]))
    assert not recordable(CachePlan(query, full=False, width=4, compared=4, verify=query))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", CACHES)
def test_cuda_graphs_decode_as_the_cpu_does(name, config):
    model, batch = model_for(name), rows()
    plain = decode(model, config, name, batch, False)
    graphed = decode(model.cuda(), config, name, batch.to("cuda"), True)
    assert torch.equal(plain.batch.ids, graphed.batch.ids.cpu())
    torch.testing.assert_close(plain.confidence, graphed.confidence.cpu(), rtol=1e-6, atol=1e-7)
    assert plain.nfe == graphed.nfe


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["none", "dual", "adaptive", "max-logit"])
def test_cuda_graphs_replay_bf16_passes(name):
    """The same kernels in the same order: not a bit of the tokens may differ from the passes that are not recorded."""
    torch.manual_seed(1)
    model = MaskedTransformer(VOCABULARY.size, 128, 4, 4).eval().requires_grad_(False).to("cuda", torch.bfloat16)
    batch = rows().to("cuda")
    graphs = PassGraphs(CudaRecorder(batch.ids.device))
    store = model.make_store(batch)
    time = torch.ones(2, device="cuda")
    for i in range(4):
        ids = (batch.ids + i) % VOCABULARY.text_size
        graphs.partial(model, ids, CachePlan(), store, time, lambda layer, similarity: None, 0)
        fresh = model.make_store(batch)
        model.partial(ids, CachePlan(), fresh, time)
        assert torch.equal(store.hidden[:, :-1], fresh.hidden[:, :-1])
    assert (graphs.recorded, graphs.replayed) == (1, 2)
    same(decode(model, CONFIGS["quota"], name, batch, False), decode(model, CONFIGS["quota"], name, batch, True))
