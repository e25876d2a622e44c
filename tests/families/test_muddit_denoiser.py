"""Muddit behind the sampler's interface: same numbers as the network, given tokens kept, any part hidden."""

from __future__ import annotations

import pytest
import torch
from muddit_parts import tiny_clip, tiny_model

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.families.muddit.denoiser import MudditDenoiser
from unidiff.families.muddit.tasks import MudditSettings, micro_conditions
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary(49 + 20, (0, 48), (49, 49 + 16), 48, 49 + 19, {"bos": 46, "eos": 47})
EMPTY = torch.tensor([46, 47, *[0] * 8])
STEPS = 4


def denoiser(**changes) -> MudditDenoiser:
    values = dict(settings=MudditSettings(steps=STEPS), empty_prompt=EMPTY) | changes
    return MudditDenoiser(tiny_model(), tiny_clip(), VOCABULARY, **values)


def batch(rows: int = 3, image_first: bool = False) -> TokenBatch:
    """Rows whose text is half known and whose first image row is known."""
    g = torch.Generator().manual_seed(3)
    out = []
    for _ in range(rows):
        words = torch.randint(48, (10,), generator=g)
        codes = torch.randint(16, (4, 6), generator=g) + VOCABULARY.image[0]
        known = torch.zeros(4, 6, dtype=torch.bool)
        known[0] = True
        spans = [Span.text(words, torch.arange(10) < 5), Span.image(codes, known)]
        out.append(spans[::-1] if image_first else spans)
    return TokenBatch.from_spans(out).hide_targets(VOCABULARY)


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
def test_features_and_heads_are_the_networks(image_first):
    wrapped, rows = denoiser(), batch(image_first=image_first)
    time = torch.tensor([1.0, 0.5, 0.25])
    hidden = wrapped.hidden(rows.ids, rows.modality, rows.positions, rows.attention_mask(), time)
    words = rows.ids[rows.modality == Modality.TEXT].view(3, 10)
    codes = rows.ids[rows.modality == Modality.IMAGE].view(3, 4, 6) - VOCABULARY.image[0]
    text, pooled = wrapped.encoder(words)
    micro = micro_conditions(64, 96, wrapped.settings)
    output = wrapped.model(codes, text, pooled, micro, torch.tensor([0.75, 0.25, 0.0]))
    for modality, logits in ((Modality.TEXT, output.text), (Modality.IMAGE, output.image.flatten(1, 2))):
        ours = wrapped.head(hidden[rows.modality == modality].unflatten(0, (3, -1)), *VOCABULARY.range_of(modality))
        torch.testing.assert_close(ours, logits)
    torch.testing.assert_close(wrapped.head(hidden, 51, 55), wrapped.head(hidden, 49, 65)[..., 2:6])
    with pytest.raises(ValueError, match="span two heads"):
        wrapped.head(hidden)


@torch.no_grad()
def test_time_conventions_follow_the_samplers_clock():
    rows = batch()
    index, training = (MudditSettings(steps=STEPS, time=t) for t in ("index", "training"))
    text, hides = rows.ids[:, :10], rows.ids[:, 10:] == VOCABULARY.image_mask
    clock = torch.tensor([1.0, 0.75, 0.25])
    assert denoiser(settings=index)._time(text, hides, clock).tolist() == [3, 2, 0]
    assert denoiser(settings=training)._time(text, hides, None).tolist() == [750] * 3
    with pytest.raises(ValueError, match="needs the diffusion time"):
        denoiser()._time(text, hides, None)


@pytest.mark.parametrize("guided", [False, True])
def test_the_sampler_fills_text_and_image_together(guided):
    """Joint inpainting: known tokens stay, a row does not depend on its neighbours."""
    config = SamplerConfig(
        ModalityDecoding(steps=STEPS, rule="quota", choice_temperature=1.0),
        ModalityDecoding(steps=STEPS, rule="quota", choice_temperature=2.0),
        Guidance(scale=2.0 if guided else 1.0),
        stop_at_eos=False,
    )
    rows, seeds = batch(), torch.tensor([5, 6, 7])
    sampler = Sampler(denoiser(), VOCABULARY, config)
    out = sampler(rows, seeds)
    ids = out.batch.ids
    assert torch.equal(ids[rows.given], rows.ids[rows.given]) and out.nfe == STEPS * (2 if guided else 1)
    assert ids[:, :10].max() < 48 and ids[:, 10:].min() >= 49 and ids[:, 10:].max() < 65
    for row in range(3):
        alone = sampler(rows.rows([row]), seeds[row : row + 1])
        assert torch.equal(alone.batch.ids[0], ids[row])


@torch.no_grad()
def test_a_wholly_hidden_text_stands_for_the_empty_prompt_only_while_drawing():
    rows = batch()
    ids = rows.ids.clone()
    ids[:, :10] = VOCABULARY.mask_id
    ids[2, 10:] = 50  # a whole image: its hidden text is to be written
    empty = ids.clone()
    empty[:2, :10] = EMPTY
    time = torch.ones(3)
    actual, expected = (denoiser().hidden(x, rows.modality, rows.positions, None, time) for x in (ids, empty))
    torch.testing.assert_close(actual, expected)
    literal = denoiser(empty_prompt=None).hidden(ids, rows.modality, rows.positions, None, time)
    torch.testing.assert_close(literal[2], actual[2])
    assert not torch.allclose(literal[0], actual[0])


def test_rows_that_the_network_cannot_take_are_refused():
    wrapped, rows = denoiser(), batch()
    padded = rows.pad_to(40)
    time = torch.ones(3)
    with pytest.raises(ValueError, match="one layout without padding"):
        wrapped.hidden(padded.ids, padded.modality, padded.positions, padded.attention_mask(), time)
    mixed = TokenBatch.cat([batch(1), batch(1, image_first=True)])
    with pytest.raises(ValueError, match="one layout without padding"):
        wrapped.hidden(mixed.ids, mixed.modality, mixed.positions, None, time[:2])
    cut = [x[:, :-1] for x in (rows.ids, rows.modality, rows.positions)]
    with pytest.raises(ValueError, match="23 codes on a grid of 4x6"):
        wrapped.hidden(*cut, None, time)
    with pytest.raises(ValueError, match="0 codes on a grid of 0x0"):
        wrapped.hidden(rows.ids[:, :10], rows.modality[:, :10], rows.positions[:, :10], None, time)
