"""Muddit and Meissonic: what their programs do wrong and the default here does right; see `test_defects_index`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from muddit_parts import tiny_clip, tiny_model
from tiny_families import family
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.families.muddit.denoiser import MudditDenoiser, TextFeatures
from unidiff.tokens import Span, TokenBatch

VOCABULARY = family("muddit").vocabulary
EMPTY, WORDS = [46, 47, *[0] * 8], [46, 5, 6, 47, *[0] * 6]
CODES = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(2)) + VOCABULARY.image[0]


def config(guidance: float = 3.0, temperature: float = 2.0, steps: int = 4) -> SamplerConfig:
    decoding = ModalityDecoding(steps=steps, choice_temperature=temperature)
    return SamplerConfig(decoding, decoding, Guidance(guidance, hide="text"))


def decode(
    rows: list[list[Span]], seeds: list[int], away: list[int] | None = EMPTY, encoder=None, **more
) -> SamplerOutput:
    batch = TokenBatch.from_spans(rows)
    others = None
    if away is not None:
        others = TokenBatch.from_spans([[Span.text(away, True), image] for _, image in rows])
    model = MudditDenoiser(tiny_model(), encoder or tiny_clip(), VOCABULARY, 4)
    sampler = Sampler(model, VOCABULARY, more.pop("config", config(1.0 if away is None else 3.0)))
    return sampler(batch, torch.tensor(seeds), unconditional=others, **more)


def draw(seeds: list[int], grid: tuple[int, int] = (4, 6), **more) -> Tensor:
    row = [Span.text(WORDS, True), Span.masked_image(grid, VOCABULARY)]
    ids = decode([row] * len(seeds), seeds, **more).batch.ids
    return ids[:, 10:].unflatten(1, grid) - VOCABULARY.image[0]


def test_several_images_of_one_prompt():
    """Upstream fails for num_images_per_prompt > 1."""
    images = draw([1, 2, 3])
    assert images.shape == (3, 4, 6) and len({tuple(i.flatten().tolist()) for i in images}) == 3
    for row, seed in enumerate((1, 2, 3)):
        assert torch.equal(draw([seed])[0], images[row])


def test_prompt_features_alone_are_enough():
    """Upstream needs the words as well. Features of the prompt and of the negative prompt, no tokenizer, no encoder."""
    g = torch.Generator().manual_seed(0)
    features = TextFeatures(torch.randn(2, 10, 16, generator=g), torch.randn(2, 12, generator=g))
    image, turned = (
        draw([1], encoder=lambda ids, order=order: TextFeatures(*(x[order] for x in features)))
        for order in ([0, 1], [1, 0])
    )
    assert image.max() < 16 and not torch.equal(image, turned)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (2, 10), (8, 6)])
def test_any_size_that_the_downsampling_divides(grid: tuple[int, int]):
    """Upstream makes image ids for one resolution only."""
    image = draw([1], grid)
    assert image.shape == (1, *grid) and image.max() < 16


def test_answers_are_the_sampled_tokens():
    """Upstream samples and then returns the argmax of the last logits instead."""
    known = torch.arange(10) < torch.tensor([[2], [3]])
    words = torch.tensor([[46, 5, *[0] * 8], [46, 1, 2, *[0] * 7]])
    rows = [[Span.text(w, k), Span.image(CODES, True)] for w, k in zip(words, known, strict=True)]
    states: list[Tensor] = []
    out = decode(rows, [1, 2], None, callback=lambda step, view: states.append(view.ids))
    for before, after in pairwise(states):
        sampled = before != VOCABULARY.mask_id
        assert torch.equal(before[sampled], after[sampled])
    model = MudditDenoiser(tiny_model(), tiny_clip(), VOCABULARY, 4)
    batch = out.batch.replace(ids=states[-2])
    with torch.no_grad():
        hidden = model.hidden(batch.ids, batch.modality, batch.positions, None, torch.full((2,), 0.25))
    last = model.head(hidden[:, :10], *VOCABULARY.text).argmax(-1)
    assert not torch.equal(out.batch.ids[:, :10][~known], last[~known])


def test_joint_generation_and_inpainting_of_text_and_image():
    """Upstream has neither: here the MM-DiT is a denoiser of the one sampler, and any part may be hidden."""
    tiny = family("muddit")
    nothing = tiny.batch.replace(given=torch.zeros_like(tiny.batch.given)).hide_targets(tiny.vocabulary)
    for batch in (tiny.batch, nothing):
        out = Sampler(tiny.model, tiny.vocabulary, tiny.config)(batch, torch.tensor([1, 2, 3]))
        assert torch.equal(out.batch.ids[batch.given], batch.ids[batch.given])
        words, codes = out.batch.ids[:, :10], out.batch.ids[:, 10:]
        assert words.max() < 48 and codes.min() >= 49 and codes.max() < 49 + 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_known_code_is_lost_in_any_precision(dtype: torch.dtype):
    """Upstream in float16: Gumbel noise outweighs the confidence of known tokens; with tau > 0 a known row loses one."""
    known = torch.zeros(3, 24, dtype=torch.bool)
    known[0, ::2], known[1, 4:], known[2] = True, True, True  # half hidden, four hidden, nothing hidden
    rows = [[Span.text(WORDS, True), Span.image(CODES, k.view(4, 6))] for k in known]
    tiny = tiny_model().to(dtype)
    model = MudditDenoiser(tiny, tiny_clip(), VOCABULARY, 6)
    sampler = Sampler(model, VOCABULARY, config(1.0, temperature=50.0, steps=6))
    out = sampler(TokenBatch.from_spans(rows), torch.tensor([1, 2, 3]), record=True)
    for ids in out.trajectory:
        assert torch.equal(ids[:, 10:][known], CODES.flatten().expand(3, -1)[known])
    assert out.batch.ids[:, 10:].max() < VOCABULARY.image[1]


def test_rows_with_other_numbers_of_hidden_codes_do_not_depend_on_each_other():
    """Upstream averages over the batch which share is hidden at the start."""
    known = torch.arange(24) >= torch.tensor([[24], [6], [12]])
    rows = [[Span.text(WORDS, True), Span.image(CODES, k.view(4, 6))] for k in known]
    together = decode(rows, [3, 4, 5]).batch.ids
    for row in range(3):
        assert torch.equal(decode([rows[row]], [3 + row]).batch.ids[0], together[row])
