"""Guidance: formula, schedules, what the unconditional pass hides, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.draw import Blend
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(5, 4)


class Watching:
    """Logits favour the smallest visible given text id; remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def hidden(
        self, ids: Tensor, modality: Tensor, positions: Tensor, attention_mask: Tensor | None, time=None
    ) -> Tensor:
        self.seen.append(ids.clone())
        logits = torch.zeros(*ids.shape, VOCABULARY.size)
        hint = ids[:, 0].clamp(max=4)  # the first token, or 4 where it is hidden
        return logits.scatter(2, (hint % 4 + 6)[:, None, None].expand(*ids.shape, 1), 2.0)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden[..., start:stop]


def test_mix_is_the_formula_and_exact_when_off() -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(3, 2, 5, generator=generator), torch.randn(3, 2, 5, generator=generator)
    c[0, 0, 0] = -torch.inf
    s = torch.tensor([1.0, 0.0, 3.0])
    mixed = Blend(s)([c, u])
    assert torch.equal(mixed[0], c[0])
    torch.testing.assert_close(mixed[1], u[1])
    torch.testing.assert_close(mixed[2], u[2] + 3 * (c[2] - u[2]))


def test_scales_over_time_and_per_modality() -> None:
    t = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)
    assert Guidance(3.0).scale_at(Modality.TEXT, t).tolist() == [3, 3, 3, 3]
    assert Guidance(3.0, mode="ramp").scale_at(Modality.TEXT, t).tolist() == [1, 1.5, 2, 3]
    assert Guidance(3.0, mode="window", window=(0.2, 0.6)).scale_at(Modality.TEXT, t).tolist() == [1, 3, 3, 1]
    own = Guidance(3.0, image_scale=5.0)
    assert own.scale_at(Modality.IMAGE, t).tolist() == [5] * 4 and own.scale_at(Modality.TEXT, t).tolist() == [3] * 4


def test_named_subsets() -> None:
    image = Span.image(torch.full((1, 2), 6), torch.tensor([[True, False]]))
    batch = TokenBatch.from_spans([[Span.text([1, 2], torch.tensor([True, False])), image]], length=5)
    cases = {"given": [1, 0, 1, 0, 0], "text": [1, 0, 0, 0, 0], "image": [0, 0, 1, 0, 0], "other": [1, 1, 0, 0, 0]}
    for hide, expected in cases.items():
        hidden = Guidance(2.0, hide=hide).uncond_mask(Modality.IMAGE, batch, None)
        assert hidden[0].int().tolist() == expected, hide
    own = torch.tensor([[True, True, False, False, True]])  # targets and padding cannot be conditions
    assert Guidance(2.0).uncond_mask(Modality.IMAGE, batch, own)[0].int().tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("guidance", "evaluations"),
    [
        (Guidance(1.0), 4),
        (Guidance(3.0), 8),
        (Guidance(3.0, image_scale=1.0), 4),
        (Guidance(3.0, mode="window", window=(0.25, 0.5)), 6),
    ],
)
def test_unguided_passes_cost_nothing(guidance: Guidance, evaluations: int) -> None:
    batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_image((2, 2), VOCABULARY)]])
    config = SamplerConfig(image=ModalityDecoding(steps=4, schedule="fixed"), guidance=guidance)
    model = Watching()
    out = Sampler(model, VOCABULARY, config)(batch, torch.tensor([0]))
    assert out.nfe == evaluations == sum(len(ids) for ids in model.seen)


def test_scale_zero_decodes_from_the_unconditional_stream() -> None:
    batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_image((1, 2), VOCABULARY)]])
    results = {}
    for scale in (0.0, 1.0, 4.0):
        config = SamplerConfig(image=ModalityDecoding(steps=1, temperature=0.0), guidance=Guidance(scale))
        out = Sampler(Watching(), VOCABULARY, config)(batch, torch.tensor([0]))
        results[scale] = out.batch.ids[0, 1:].tolist(), out.confidence[0, 1].item()
    assert results[0.0][0] == [6, 6] and results[1.0][0] == [7, 7] == results[4.0][0]
    logits = torch.tensor([0.0, 2.0, 0.0, 0.0]) * 4 - torch.tensor([2.0, 0.0, 0.0, 0.0]) * 3
    assert results[4.0][1] == pytest.approx(logits.softmax(0)[1].item())  # confidence is that of the guided logits


def test_each_target_modality_has_its_own_unconditional_stream() -> None:
    """Joint generation hides the other modality, generated tokens included; each modality reads its own stream."""
    batch = TokenBatch.from_spans(
        [[Span.text([1, 0, 0], torch.tensor([True, False, False])), Span.masked_image((1, 2), VOCABULARY)]]
    )
    once = ModalityDecoding(steps=2, schedule="fixed")
    model = Watching()
    config = SamplerConfig(text=once, image=once, guidance=Guidance(2.0, hide="other"))
    Sampler(model, VOCABULARY, config)(batch, torch.tensor([0]))
    second = model.seen[1]  # rows: all, for text (image hidden), for image (text hidden)
    mask = VOCABULARY.mask_id
    assert second.shape[0] == 3
    assert torch.equal(second[1, :3], second[0, :3]) and (second[1, 3:] == mask).all()
    assert torch.equal(second[2, 3:], second[0, 3:]) and (second[2, :3] == mask).all()
    assert (second[0] != mask).sum() == 3  # the known word, one generated word, one generated code
