"""Image tokenizers on another device: codes and pixels of every kind, their training, and the encoding of shards."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import any_name_means_it, plainly
from diffusers import VQModel
from killed_tokenizer import config
from PIL import Image
from safetensors.torch import load_file
from shard_samples import write_samples
from virtual_device import DEVICE, VirtualTensor, virtual_device

from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.families.family import FAMILIES
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.image_tokenizer import trainer as training
from unidiff.train.image_tokenizer.config import CellCodes, ImageTokenizerConfig, VQLossWeights
from unidiff.train.image_tokenizer.trainer import train_image_tokenizer


def cell() -> Any:
    return CellVQModel(4, 32, 4, 16, 1, (16, 8), (1, 1))


def vq_model(lookup: bool) -> Any:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=4, num_vq_embeddings=32, norm_num_groups=4,
        mid_block_add_attention=True, lookup_from_codebook=lookup,
    )  # fmt: skip


def released(family: str) -> Any:
    entry = FAMILIES[family]
    made = entry.make(entry.tiny.config)
    return made.model if isinstance(made, VQImageTokenizer) else made


KINDS: dict[str, Any] = {
    "cell": cell,
    "vqmodel": lambda: vq_model(False),
    "vqmodel with lookup": lambda: vq_model(True),
    "llamagen": lambda: released("llamagen"),
    "magvit": lambda: released("magvit"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_pixels_are_the_same(kind, dtype):
    torch.manual_seed(0)
    here = VQImageTokenizer(KINDS[kind]().to(dtype))
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with plainly():
        codes = here.encode(images)
        pixels = here.decode(codes)
    with virtual_device():
        there = VQImageTokenizer(copy.deepcopy(here.model)).to(DEVICE)
        for given in (images, images.to(DEVICE)):
            found = there.encode(given)
            assert found.device == DEVICE and torch.equal(found.cpu(), codes)
        for given in (codes, codes.to(DEVICE)):
            decoded = there.decode(given)
            assert decoded.device == DEVICE
            torch.testing.assert_close(decoded.cpu(), pixels, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
        with pytest.raises(ValueError, match="must be a positive multiple"):
            there.encode(images[..., :15].to(DEVICE))
        with pytest.raises(ValueError, match=r"values in \[0, "):
            there.decode(codes.to(DEVICE) + there.codebook_size)


def wide(out: Path, **changes: Any) -> ImageTokenizerConfig:
    values: dict[str, Any] = dict(bf16=False, steps=8, validate_every=4, checkpoint_every=5, learning_rate=1e-3)
    return config(out, **(values | changes))


RUNS: dict[str, dict[str, Any]] = {
    "cell": {},
    "cycle": {"loss": VQLossWeights(cycle=0.5), "revive_until": 1.0},
    "vqmodel": {
        "model": dict(kind="vqmodel", factor=4, codebook_size=32, code_dim=4, decoder_widths=[8, 8, 16]),
    },
    "codes of cells": {
        "cells": CellCodes(4, 32),
        "model": dict(encoder_width=16, encoder_depth=1, decoder_widths=[16], decoder_depths=[1]),
    },
    "bf16": {"bf16": True},
}


def numbers(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds", "kind")} for line in lines]


def check_runs(a: Path, b: Path) -> None:
    for first, second in zip(numbers(a), numbers(b), strict=True):
        assert first == pytest.approx(second, rel=2e-2, abs=2e-2)  # a code that is nearly another one may be that one
    weights = [load_file(next((out / "model").glob("*.safetensors"))) for out in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(float((w - weights[1][name]).abs().float().mean()) < 2e-3 for name, w in weights[0].items())
    same = [Image.open(out / "reconstructions.png").convert("RGB").resize((8, 8)) for out in (a, b)]
    assert same[0].size == same[1].size


@pytest.mark.training
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("vqmodel", "cycle") else name for name in RUNS]
)
def test_training_is_the_same(tmp_path, name):
    if name != "bf16":  # autocast does nothing there
        train_image_tokenizer(wide(tmp_path / "cpu", **RUNS[name]))
    with virtual_device(), any_name_means_it():
        report = train_image_tokenizer(wide(tmp_path / "there", **RUNS[name]))
    assert report["psnr"] > 0
    if name != "bf16":
        check_runs(tmp_path / "cpu", tmp_path / "there")


@pytest.mark.training
def test_a_run_goes_on_and_its_decoder_is_sharpened(tmp_path, monkeypatch):
    with virtual_device(), any_name_means_it(), ExitStack() as stack:
        train_image_tokenizer(wide(tmp_path / "whole"))
        real, count = training.vq_forward, iter(range(100))

        def failing(*args: Any) -> Any:
            if next(count) == 6:
                raise KeyboardInterrupt
            assert isinstance(args[1], VirtualTensor)
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "vq_forward", failing)
            train_image_tokenizer(wide(tmp_path / "cut"))
        train_image_tokenizer(wide(tmp_path / "cut"))
        sharp = wide(tmp_path / "sharp", init_from=str(tmp_path / "whole" / "model"), decoder_only=True)
        stack.enter_context(torch.random.fork_rng())
        train_image_tokenizer(sharp)
    whole, cut = (load_file(next((tmp_path / n / "model").glob("*.safetensors"))) for n in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    images = torch.rand(2, 3, 16, 16)
    one, two = (VQImageTokenizer.from_pretrained(tmp_path / n / "model").encode(images) for n in ("whole", "sharp"))
    assert torch.equal(one, two)


def test_shards_are_encoded_alike(tmp_path):
    write_samples(tmp_path / "raw", 12)
    text = TextTokenizer.train([f"caption {n} which?" for n in range(50)], 300)
    settings = EncodeSettings(image_size=16, text_length=24, batch_size=4, samples_per_shard=6, workers=1)
    torch.manual_seed(0)
    tokenizer = VQImageTokenizer(cell())
    encode_shards(str(tmp_path / "raw"), tokenizer, text, tmp_path / "cpu", settings)
    with virtual_device():
        encode_shards(str(tmp_path / "raw"), tokenizer.to(DEVICE), text, tmp_path / "there", settings)
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("cpu", "there")]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith(".tar"):
            assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
