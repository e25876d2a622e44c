"""Guidance in several directions: the mixture, its settings, and what is refused."""

from __future__ import annotations

import pytest
import torch

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.draw import Blend
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(6, 0)


def test_every_direction_adds_its_difference():
    cond, first, second = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    cond[0, 0, 0] = first[0, 0, 0] = -torch.inf
    scale = torch.tensor([1.0, 2.5])
    mixed = Blend(scale, [4.0])([cond, first, second])
    expected = cond + (scale - 1)[:, None, None] * (cond - first) + 3.0 * (cond - second)
    finite = torch.isfinite(cond)
    torch.testing.assert_close(mixed[finite], expected[finite])
    assert mixed[0, 0, 0] == -torch.inf and torch.equal(Blend(torch.ones(2), [1.0])([cond, first, second]), cond)


def test_settings_go_to_plain_data_and_back():
    config = SamplerConfig(guidance=Guidance(2.0, further=(3.0, 1.5)), ends=(4,), fill=0)
    assert SamplerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"guidance further is \(-1.0,\)"):
        Guidance(further=(-1.0,))


def test_one_batch_per_scale():
    torch.manual_seed(0)
    model = MaskedTransformer(7, 8, 1, 1, rope="1d").eval()
    batch = TokenBatch.from_spans([[Span.text([1, 2], True), Span.masked_text(2, VOCABULARY)]])
    config = SamplerConfig(text=ModalityDecoding(steps=2), guidance=Guidance(2.0, further=(2.0,)))
    for others in (batch, None):
        with pytest.raises(ValueError, match="2 scales for"):
            Sampler(model, VOCABULARY, config)(batch, torch.tensor([0]), unconditional=others)
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([0]), unconditional=[batch, batch])
    alone = Sampler(model, VOCABULARY, SamplerConfig(text=ModalityDecoding(steps=2)))(batch, torch.tensor([0]))
    assert torch.equal(out.batch.ids, alone.batch.ids)  # three equal streams
    assert (out.nfe, alone.nfe) == (6, 2)
