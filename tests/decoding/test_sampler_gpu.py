"""The sampler on a CUDA device decodes the same tokens as on the CPU."""

from __future__ import annotations

import pytest
import torch

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(30, 40, {"eos": 2})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(guidance=Guidance(2.0, mode="ramp")),
        SamplerConfig(
            text=ModalityDecoding(rule="factor", block_length=3, forbid=(4,)),
            image=ModalityDecoding(
                steps=8,
                top_k=9,
                top_p=0.9,
                choice_temperature=2.0,
                confidence="margin",
                block_length=9,
                block_order="coarse",
            ),
            guidance=Guidance(2.0, hide="other"),
        ),
        SamplerConfig(
            text=ModalityDecoding(remask="confidence", remask_threshold=0.6, remask_budget=3, steps=5),
            image=ModalityDecoding(rule="ancestral", steps=8, remask="remdm", remask_cap=0.3),
            order="text_first",
        ),
    ],
    ids=["default", "blocks", "remask"],
)
def test_cuda_equals_cpu_in_float64(config: SamplerConfig) -> None:
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=32, num_layers=2, num_heads=2).eval().double()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    spans = [Span.text([5, 6], True), Span.masked_text(6, VOCABULARY), Span.masked_image((5, 5), VOCABULARY)]
    batch = TokenBatch.from_spans([spans] * 3 + [spans[:2]])
    seeds = torch.arange(4)
    cpu = Sampler(model, VOCABULARY, config)(batch, seeds)
    gpu = Sampler(model.cuda(), VOCABULARY, config)(batch.to("cuda"), seeds.cuda())
    assert torch.equal(cpu.batch.ids, gpu.batch.ids.cpu())
    torch.testing.assert_close(cpu.confidence, gpu.confidence.cpu(), atol=1e-6, rtol=0)
    assert cpu.nfe == gpu.nfe
