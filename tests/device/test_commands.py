"""Commands and recipes that name a device."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_cases import any_name_means_it, plainly, same_pictures
from PIL import Image
from released_parts import write_tiny
from shard_samples import write_samples
from tiny_pipeline import tiny_parts, tiny_pipeline
from train_fixtures import MIXED, TINY, tiny_table
from virtual_device import virtual_device

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
REWARD = "def bright(prompts, pictures):\n    return pictures.flatten(1).mean(1)\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("commands") / "model"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    Image.new("L", (24, 16), 255).save(tmp_path / "mask.png")
    return str(tmp_path / "in.png")


def test_commands_give_the_same(run, model, picture, tmp_path):
    lines: list[list[Any]] = [
        ["generate", "a dog", "two cats", "-o", "OUT.png", "--steps", 2, "--cache", "dual", "--candidates", 2],
        ["caption", picture],
        ["answer", picture, "what is it?"],
        ["inpaint", picture, "--mask", tmp_path / "mask.png", "-o", "OUT.png", "--steps", 2],
    ]
    for line in lines:
        told, drawn = [], []
        for place in ("cpu", "cuda"):
            out = tmp_path / f"{line[0]}-{place}.png"
            words = [out if word == "OUT.png" else word for word in line]
            words += ["--model", model, "--device", place]
            if place == "cpu":
                with plainly():
                    status, said, _ = run(*words)
            else:
                with virtual_device() as ledger, any_name_means_it():
                    status, said, _ = run(*words)
                assert ledger.reads and ledger.uploads
            assert status == 0
            told.append(said.replace(str(out), "").replace(place, ""))
            drawn.append([Image.open(path) for path in sorted(tmp_path.glob(f"{line[0]}-{place}*.png"))])
        assert told[0] == told[1]
        for a, b in zip(*drawn, strict=True):
            same_pictures([a], [b])


def test_a_checkpoint_is_verified(run, tmp_path):
    write_tiny(tmp_path / "weights", "llada")
    with virtual_device(), any_name_means_it():
        status, said, _ = run("verify", tmp_path / "weights", "--device", "cuda")
    assert "ok   weights" in said and "a tiny model answers as recorded" in said and status in (0, 1)


def recipe(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.training
def test_recipes_of_training(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_table(72).save(tmp_path / "table.safetensors")
    (tmp_path / "empty.yaml").write_text("seed: 3\n")
    settings = [
        *TINY,
        *MIXED,
        "data.train=table.safetensors",
        "output=run",
        "steps=2",
        "checkpoint.export_dtype=float32",
    ]
    with virtual_device() as ledger, any_name_means_it():
        assert recipe("training/pretrain.py").main(["empty.yaml", *settings]) == 0
    assert ledger.uploads and MaskedTransformer.from_pretrained(tmp_path / "run" / "model")

    (tmp_path / "prompts.txt").write_text("a dog\ntwo cats\n")
    (tmp_path / "device_reward.py").write_text(REWARD)
    words = [model, "tuned", "--prompts", "prompts.txt", "--reward", "device_reward:bright", "--steps", "2"]
    words += ["--prompts-per-step", "2", "--group", "2", "--lr", "1e-3", "--device", "cuda"]
    with virtual_device() as ledger, any_name_means_it():
        assert recipe("training/reward_tuning.py").main(words) == 0
    assert ledger.uploads and UniDiffPipeline.from_pretrained(tmp_path / "tuned" / "pipeline").settings
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_the_recipe_that_encodes_shards(tmp_path):
    write_samples(tmp_path / "raw", 4)
    VQImageTokenizer(tiny_parts()[1]).save_pretrained(tmp_path / "image")
    TextTokenizer.train([f"caption {n} which?" for n in range(50)], 300).save_pretrained(tmp_path / "text")
    words = [str(tmp_path / "out"), "--shards", str(tmp_path / "raw"), "--image-tokenizer", str(tmp_path / "image")]
    words += [
        "--text-tokenizer",
        str(tmp_path / "text"),
        "--image-size",
        "16",
        "--text-length",
        "24",
        "--device",
        "cuda",
    ]
    with virtual_device() as ledger, any_name_means_it():
        assert recipe("tokenizers/encode_shards.py").main(words) == 0
    assert ledger.uploads and (tmp_path / "out").is_dir()
