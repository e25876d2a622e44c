"""Cache policies, a small model and requests that the tests of caches share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from unidiff.decoding import RefreshPolicy, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache import (
    AdaptiveCache,
    DualCache,
    HeldGuidance,
    IntervalCache,
    MaxLogitCache,
    ModalityCache,
    PrefixCache,
    SegmentCache,
    VicinityCache,
)
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

EOS = 2
VOCABULARY = Vocabulary.unified(11, 7, {"eos": EOS})
POLICIES: dict[str, Callable[[], RefreshPolicy]] = {
    "prefix": PrefixCache,
    "dual": lambda: DualCache(interval=5),
    "vicinity": lambda: VicinityCache(look_back=1, look_ahead=2, warmup=1),
    "interval": lambda: IntervalCache(4),
    "held guidance": lambda: HeldGuidance(IntervalCache(4), 3, 2),
    "adaptive": lambda: AdaptiveCache(prompt_interval=4, response_interval=3),
    "max-logit": lambda: MaxLogitCache(ratio=0.5, warmup=0.2, interval=4),
    "modality": lambda: ModalityCache(interval=3),
    "segments": lambda: SegmentCache(DualCache(), MaxLogitCache(0.5, 0.2, 4), IntervalCache(6), IntervalCache(5)),
    "segments by layer": lambda: SegmentCache(
        AdaptiveCache(response_interval=4, ratio=0.4), AdaptiveCache(response_interval=3), IntervalCache(3), DualCache()
    ),
}
EVERY_PASS: dict[str, Callable[[], RefreshPolicy]] = {
    "interval": lambda: IntervalCache(1),
    "modality": lambda: ModalityCache(interval=2, joint=2),
    "segments": lambda: SegmentCache(DualCache(interval=1), MaxLogitCache(interval=1), IntervalCache(1)),
    "segments by layer": lambda: SegmentCache(
        AdaptiveCache(1, 1), VicinityCache(interval=1), AdaptiveCache(1, 1), PrefixCache(interval=1)
    ),
}


def make_model(vocabulary: Vocabulary = VOCABULARY, **kwargs) -> MaskedTransformer:
    torch.manual_seed(2)
    settings = dict(hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2) | kwargs
    model = MaskedTransformer(vocabulary.size, **settings).eval().double()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.35)
    return model


def rows(words: tuple[int, ...] = (5, 9, 9, 4)) -> list[TokenBatch]:
    """Requests of 17, 11 and 14 tokens, the second ending with `words`; the last packs two samples."""
    image = Span.masked_image((3, 3), VOCABULARY)
    half = Span.image(torch.tensor([[12, 14], [15, 16]]), torch.tensor([[True, False], [False, True]]))
    return [
        TokenBatch.from_spans([[Span.text([3, 1], True), Span.masked_text(6, VOCABULARY), image]]),
        TokenBatch.from_spans([[half, Span.masked_text(3, VOCABULARY), Span.text(words, True)]]),
        TokenBatch.from_packed(
            [[[Span.text([3], True), Span.masked_text(5, VOCABULARY)], [half, Span.masked_text(4, VOCABULARY)]]]
        ),
    ]


def decode(model, config: SamplerConfig, policy, batch: TokenBatch, seeds: list[int], **kwargs) -> SamplerOutput:
    return Sampler(model, VOCABULARY, config, policy)(batch, torch.tensor(seeds), record=True, **kwargs)


def same(a: SamplerOutput, b: SamplerOutput) -> None:
    assert len(a.trajectory) == len(b.trajectory)
    assert all(torch.equal(x, y) for x, y in zip(a.trajectory, b.trajectory, strict=True))
    torch.testing.assert_close(a.confidence, b.confidence)


def rows_alone(model, config: SamplerConfig, policy, seed: int = 7, length: int = 20) -> SamplerOutput:
    """Assert that the rows of a padded batch equal the rows alone; returns the batch's result."""
    together = decode(model, config, policy, TokenBatch.cat(rows()).pad_to(length), [seed, seed + 1, seed + 2])
    for i, row in enumerate(rows()):
        alone = decode(model, config, policy, row, [seed + i])
        assert torch.equal(together.batch.ids[i : i + 1, : row.shape[1]], alone.batch.ids)
        torch.testing.assert_close(together.confidence[i : i + 1, : row.shape[1]], alone.confidence)
    return together
