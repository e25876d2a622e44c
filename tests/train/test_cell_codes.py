"""Codes that do not depend on the background: the cells, the contrastive loss, the codebook, and the recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.train.image_tokenizer.config import CellCodes, ImageData, ImageTokenizerConfig
from unidiff.train.image_tokenizer.losses import CellTrainer, contrast_loss, place_codes
from unidiff.train.image_tokenizer.trainer import train_image_tokenizer
from unidiff.worlds.emoji.scenes import BACKGROUNDS, Scene, SceneObject, get_profile, render
from unidiff.worlds.emoji.table import sprite_cells


def model(codes: int = 2048, **changes) -> CellVQModel:
    torch.manual_seed(0)
    return CellVQModel(8, codes, 8, 64, 1, (16,), (1,), **changes)


def test_cells_are_those_of_rendered_sprites() -> None:
    cells, flat = sprite_cells("cpu", 8)
    assert cells.shape[1:] == (8, 3, 8, 8) and flat.shape == (8, 3, 8, 8)
    assert 64 * 15 < len(cells) <= 64 * (16 + 9 + 4)
    profile = get_profile("cpu")
    number = list(BACKGROUNDS).index("green")
    picture = torch.from_numpy(render(Scene((SceneObject(profile.names[5], 0, 0, 4),), "green"), profile))
    middle = picture[8:16, 16:24].permute(2, 0, 1).float() / 255  # inside the sprite, so among the cells
    assert (cells[:, number] - middle).abs().flatten(1).amax(1).min() == 0
    torch.testing.assert_close(flat[number], picture[-8:, -8:].permute(2, 0, 1).float() / 255)
    assert (cells - flat).abs().flatten(2).amax((1, 2)).min() > 24 / 255  # no cell shows background only
    quarters, small = sprite_cells("cpu", 4)
    assert quarters.shape[2:] == small.shape[1:] == (3, 4, 4) and len(cells) < len(quarters) < 4 * len(cells)
    with pytest.raises(ValueError, match="placed by 8 pixels, which factor 16 must divide"):
        sprite_cells("cpu", 16)


def test_contrast_loss_is_the_mean_cross_entropy() -> None:
    views, ground = F.normalize(torch.randn(5, 3, 4), dim=-1), F.normalize(torch.randn(2, 4), dim=-1)
    keys = torch.cat([F.normalize(views.sum(1), dim=-1), ground])
    terms = [-(keys @ views[n, v] / 0.1).log_softmax(0)[n] for n in range(5) for v in range(3)]
    terms += [-(keys @ ground[m] / 0.1).log_softmax(0)[5 + m] for m in range(2)]
    torch.testing.assert_close(contrast_loss(views, ground, 0.1), torch.stack(terms).mean())


def test_codebook_has_one_code_per_look() -> None:
    vq = model(32)
    cells, flat = torch.rand(10, 4, 3, 8, 8), torch.rand(3, 3, 8, 8)
    cells = cells[:, :1].expand(-1, 4, -1, -1, -1).clone()  # the same in all views
    cells[7] = cells[2]
    report = place_codes(vq, cells, flat)
    codes = vq.quantize(vq.latents(torch.cat([flat, cells[:, 0]]))).codes.flatten()
    assert report["cells_shared"] == 1.0
    assert report["cell_codes"] == int(codes.unique().numel()) <= 12
    assert codes[3 + 7] == codes[3 + 2]
    assert codes.max() < report["cell_codes"]
    assert not vq.codebook[report["cell_codes"] :].any()


def test_too_many_cells_for_the_codebook() -> None:
    with pytest.raises(ValueError, match=r"look different but there are 4 codes; raise model.codebook_size"):
        place_codes(model(4), torch.rand(30, 2, 3, 8, 8), torch.rand(2, 3, 8, 8))


@pytest.mark.training
def test_encoder_learns_to_ignore_the_background() -> None:
    cells, flat = sprite_cells("cpu", 8)
    some = cells[:: len(cells) // 60]
    untrained = place_codes(model(), some, flat)["cells_shared"]
    settings, generator = CellCodes(150, 60), torch.Generator().manual_seed(0)
    trainer = CellTrainer(model(), some, flat, settings, bf16=False, generator=generator)
    for step in range(settings.steps):
        trainer.step(step)
    trained = place_codes(trainer.model, some, flat)
    assert trained["cells_shared"] > untrained + 0.3


def test_decoder_context_looks_at_the_whole_picture() -> None:
    vq = model(decoder_context=True)
    vectors = torch.randn(1, 8, 9, 9)
    other = vectors.clone()
    other[..., 0, 0] += 1
    silent = vq.decode_vectors(vectors)
    assert torch.equal(silent[..., -8:, -8:], vq.decode_vectors(other)[..., -8:, -8:])
    context = next(layer for layer in vq.decoder if type(layer).__name__ == "PictureContext")
    torch.nn.init.normal_(context.conv2.weight)
    assert not torch.equal(vq.decode_vectors(vectors)[..., -8:, -8:], vq.decode_vectors(other)[..., -8:, -8:])


@pytest.mark.training
def test_recipe_learns_codes_then_decoder(tmp_path: Path) -> None:
    config = ImageTokenizerConfig(
        out=str(tmp_path / "a"), data=ImageData(world="emoji", validation_images=8),
        model=dict(encoder_width=32, encoder_depth=1, decoder_widths=[16], decoder_depths=[1]),
        cells=CellCodes(3, 64), steps=4, batch_size=4, warmup_steps=1, validate_every=2, log_every=2,
    )  # fmt: skip
    report = train_image_tokenizer(config)
    assert report["cell_codes"] > 8 and 0 <= report["cells_shared"] <= 1
    before = VQImageTokenizer.from_pretrained(tmp_path / "a" / "model").model
    again = replace(config, out=str(tmp_path / "b"), init_from=str(tmp_path / "a" / "model"), cells=CellCodes())
    train_image_tokenizer(replace(again, decoder_only=True))
    after = VQImageTokenizer.from_pretrained(tmp_path / "b" / "model").model
    assert torch.equal(before.codebook, after.codebook)
    with pytest.raises(ValueError, match=r"cells\.steps needs"):
        train_image_tokenizer(replace(config, decoder_only=True, init_from=str(tmp_path / "a" / "model")))
