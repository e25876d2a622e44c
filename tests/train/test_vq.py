"""Training the image tokenizer: the loss falls, codes are used, dead codes revive, and the recipe reports bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.train.image_tokenizer.config import (
    ImageData,
    ImageTokenizerConfig,
    VQLossWeights,
    network_settings,
    new_network,
)
from unidiff.train.image_tokenizer.data import world_images
from unidiff.train.image_tokenizer.losses import (
    CodebookAverage,
    cycle_loss,
    psnr,
    reconstruction_loss,
    ssim,
    vq_forward,
)
from unidiff.train.image_tokenizer.trainer import SpikeGuard, train_image_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "tokenizers" / "train_image_tokenizer.py"
SMALL = dict(codebook_size=64, encoder_width=32, encoder_depth=1, decoder_widths=[32, 16], decoder_depths=[1, 1])


def settings(out: Path, **changes) -> ImageTokenizerConfig:
    values = dict(
        out=str(out), data=ImageData(world="emoji", validation_images=16), model=SMALL, steps=60, batch_size=8,
        warmup_steps=5, validate_every=30, log_every=20,
    )  # fmt: skip
    return ImageTokenizerConfig(**{**values, **changes})


@pytest.mark.training
def test_training_improves_and_decoder_only_keeps_codes(tmp_path: Path) -> None:
    report = train_image_tokenizer(settings(tmp_path / "a"))
    untrained = VQImageTokenizer(new_network(network_settings(SMALL)))
    images = world_images(ImageData(world="emoji"), 5, 0, 8)
    before = float((untrained.decode(untrained.encode(images)) - images).square().mean())
    assert report["psnr"] > psnr(before) + 3
    assert report["codes_used"] >= 10
    assert (tmp_path / "a" / "reconstructions.png").is_file()
    trained = VQImageTokenizer.from_pretrained(tmp_path / "a" / "model")
    train_image_tokenizer(
        settings(
            tmp_path / "b", init_from=str(tmp_path / "a" / "model"), decoder_only=True, steps=20, validate_every=20
        )
    )
    sharper = VQImageTokenizer.from_pretrained(tmp_path / "b" / "model")
    assert torch.equal(sharper.encode(images), trained.encode(images))
    changed = [
        not torch.equal(a, b) for a, b in zip(sharper.model.decoder.parameters(), trained.model.decoder.parameters())
    ]
    assert any(changed)


def test_diffusers_vqmodel_takes_gradients_everywhere() -> None:
    torch.manual_seed(0)
    model = new_network(dict(kind="vqmodel", factor=4, codebook_size=32, code_dim=4, decoder_widths=[8, 8, 16]))
    step = vq_forward(model, torch.rand(2, 3, 16, 16), VQLossWeights(), bf16=False)
    step.loss.backward()
    assert step.latents is None and step.codes.shape == (2, 4, 4)
    # diffusers creates a decoder-side convolution that this configuration does not use; everything else learns
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not [n for n in missing if n.startswith(("encoder", "decoder", "quant"))]


def test_dead_codes_revive_and_codes_follow_their_latents() -> None:
    torch.manual_seed(0)
    model = CellVQModel(4, 16, 4, 8, 1, (8,), (1,))
    average, generator = CodebookAverage(model, decay=0.5), torch.Generator().manual_seed(0)
    latents = torch.nn.functional.normalize(torch.randn(1, 4, 16, 16, generator=generator), dim=1)
    fits = []
    for step in range(30):
        quantized = model.quantize(latents)
        fits.append(float((quantized.vectors * latents).sum(1).mean()))
        average.update(quantized.codes, latents, generator, revive=step < 20)
    assert fits[-1] > fits[0]
    assert model.quantize(latents).codes.unique().numel() >= 14
    assert torch.allclose(model.codebook.norm(dim=-1), torch.ones(16), atol=1e-5)


def test_loss_weighs_edges_and_is_zero_at_the_target() -> None:
    target = torch.zeros(1, 3, 16, 16)
    target[..., 8:] = 1.0
    assert float(reconstruction_loss(target, target, VQLossWeights())) == 0
    near, far = target.clone(), target.clone()
    near[..., 4:12, 7:9] += 0.3
    far[..., 4:12, 1:3] += 0.3
    only_l1 = VQLossWeights(l2=0, gradient=0)
    assert float(reconstruction_loss(near, target, only_l1)) > 2 * float(reconstruction_loss(far, target, only_l1))


def test_cycle_loss_is_small_where_a_picture_keeps_its_codes_and_reaches_the_decoder() -> None:
    torch.manual_seed(0)
    model = CellVQModel(4, 16, 4, 8, 1, (8,), (1,))
    images = torch.rand(2, 3, 16, 16)
    codes = model.quantize(model.latents(images)).codes
    with torch.no_grad():
        assert float(cycle_loss(model, images, codes)) < float(cycle_loss(model, images, codes.flip(0)))
    with_cycle = vq_forward(model, images, VQLossWeights(l1=0, l2=0, gradient=0, commitment=0, cycle=1), bf16=False)
    with_cycle.loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.decoder[-1:].parameters())


def test_spike_guard_refuses_jumps_and_gives_up() -> None:
    guard = SpikeGuard(allowed=2)
    assert guard.accepts(0.01, 0) and guard.accepts(0.05, 1)
    assert not guard.accepts(1.0, 2) and not guard.accepts(float("nan"), 3)
    assert guard.skipped == 2 and guard.level < 0.02
    with pytest.raises(ValueError, match="lower learning_rate"):
        guard.accepts(float("inf"), 4)


def test_ssim_bounds() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(ssim(images, images)) == pytest.approx(1.0, abs=1e-5)
    assert float(ssim(images, 1 - images)) < 0.2


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        train_image_tokenizer(settings(tmp_path, data=ImageData()))
    with pytest.raises(ValueError, match="decoder_only needs"):
        train_image_tokenizer(settings(tmp_path, decoder_only=True))
    with pytest.raises(ValueError, match="cycle"):
        vqmodel = dict(kind="vqmodel", factor=4, decoder_widths=[8, 8, 16])
        train_image_tokenizer(settings(tmp_path, model=vqmodel, loss=VQLossWeights(cycle=1)))
    with pytest.raises(ValueError, match="expected one of cell, vqmodel"):
        settings(tmp_path, model=dict(kind="gan"))


def test_recipe_reports_bad_input(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(json.dumps({"stepz": 3}))
    result = subprocess.run([sys.executable, RECIPE, config], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "stepz" in result.stderr and "Traceback" not in result.stderr
