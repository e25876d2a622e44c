"""Muddit and Meissonic: what their programs do wrong and the default here does right; see `test_defects_index`."""

from __future__ import annotations

import pytest
import torch
from muddit_parts import tiny_clip, tiny_model
from tiny_families import family
from torch import Tensor

from unidiff.decoding import Sampler
from unidiff.families.muddit.scheduler import MaskGitSchedule, RowDraws
from unidiff.families.muddit.tasks import MudditSettings, generate_image, write_text
from unidiff.families.muddit.text import TextFeatures, question_rows

SETTINGS = MudditSettings(steps=4, guidance_scale=3.0)
MASK = 19  # of the tiny model's image table


def draw(text: TextFeatures, seeds: list[int], grid: tuple[int, int] = (4, 6), negative=None) -> Tensor:
    tokens = torch.full((len(seeds), *grid), MASK)
    empty = tiny_clip()(torch.tensor([[46, 47, *[0] * 8]])) if negative is None else negative
    draws = RowDraws(torch.tensor(seeds), grid[0] * grid[1])
    return generate_image(tiny_model(), text, tokens, SETTINGS, draws, negative=empty)


def one_text() -> TextFeatures:
    return tiny_clip()(torch.tensor([[46, 5, 6, 47, *[0] * 6]]))


def test_several_images_of_one_prompt():
    """Upstream fails for num_images_per_prompt > 1."""
    images = draw(one_text(), [1, 2, 3])
    assert images.shape == (3, 4, 6) and len({tuple(i.flatten().tolist()) for i in images}) == 3
    for row, seed in enumerate((1, 2, 3)):
        assert torch.equal(draw(one_text(), [seed])[0], images[row])


def test_prompt_features_alone_are_enough():
    """Upstream needs the words as well. Features of the prompt and of the negative prompt, no tokenizer, no encoder."""
    g = torch.Generator().manual_seed(0)
    text, negative = (
        TextFeatures(torch.randn(1, 7, 16, generator=g), torch.randn(1, 12, generator=g)) for _ in range(2)
    )
    image = draw(text, [1], negative=negative)
    assert image.max() < 16 and not torch.equal(image, draw(negative, [1], negative=text))


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (2, 10), (8, 6)])
def test_any_size_that_the_downsampling_divides(grid: tuple[int, int]):
    """Upstream makes image ids for one resolution only."""
    image = draw(one_text(), [1], grid)
    assert image.shape == (1, *grid) and image.max() < 16


def test_answers_are_the_sampled_tokens():
    """Upstream samples and then returns the argmax of the last logits instead."""
    model, encoder = tiny_model(), tiny_clip()
    codes = torch.randint(16, (2, 4, 6), generator=torch.Generator().manual_seed(2))
    rows = question_rows([[46, 5], [46, 1, 2]], encoder.length, encoder.mask_id)
    results = {
        compat: write_text(
            model, encoder, codes, rows, MudditSettings(steps=4, compat=compat), RowDraws(torch.tensor([1, 2]), 10)
        )
        for compat in (None, "upstream")
    }
    ours, theirs = results[None], results["upstream"]
    assert any(a != b for a, b in zip(ours.answers, theirs.answers, strict=True))
    for row, (answer, length) in enumerate(zip(ours.answers, (2, 3), strict=True)):
        assert answer == ours.tokens[row, length : length + len(answer)].tolist()
    assert theirs.answers == [theirs.last_choice[0, 2:].tolist(), theirs.last_choice[1, 3:].tolist()]


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
    schedule, g = MaskGitSchedule(6, (50.0, 20.0)), torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (3, 24), generator=g)
    tokens[0, ::2], tokens[1, 3] = 9, 9  # half hidden, one hidden, nothing hidden
    known, draws = tokens != 9, RowDraws(torch.tensor([1, 2, 3]), 24)
    state = tokens
    for step in range(6):
        logits = torch.randn(3, 24, 9, generator=g).to(dtype)
        state = schedule.step(logits, state, 9, step, draws).tokens
        assert torch.equal(state[known], tokens[known])
    assert not (state == 9).any()
