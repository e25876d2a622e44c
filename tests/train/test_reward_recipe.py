"""The reward-tuning recipe as a command, with a reward of one's own and with the oracle's prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_pipeline import GRID, TEXT_LENGTH, tiny_pipeline

from unidiff.pipeline import UniDiffPipeline

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "2", "--prompts-per-step", "2", "--group", "3", "--lr", "1e-3"]


def recipe():
    spec = importlib.util.spec_from_file_location("reward_recipe", ROOT / "training" / "reward_tuning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: object) -> int:
    return recipe().main([str(a) for a in arguments])


def test_a_pipeline_is_tuned_with_a_function_from_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a dog\n\ntwo cats\nan owl\n")
    (tmp_path / "brightness_reward.py").write_text(
        "seen = []\n"
        "def bright(prompts, pictures):\n"
        "    seen.append((list(prompts), tuple(pictures.shape)))\n"
        "    return pictures.flatten(1).mean(1)\n"
    )
    reward = ["--prompts", "prompts.txt", "--reward", "brightness_reward:bright"]
    assert run("base", "tuned", *reward, *QUICK) == 0
    import brightness_reward

    prompts, shape = brightness_reward.seen[0]
    assert prompts == ["a dog"] * 3 + ["two cats"] * 3 and shape == (6, 3, 16, 24)
    assert brightness_reward.seen[1][0][0] == "an owl"
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["reward"] < 1 for line in lines)
    before, after = (UniDiffPipeline.from_pretrained(tmp_path / name) for name in ("base", "tuned/pipeline"))
    moved = [
        n for n, p in after.transformer.named_parameters() if not torch.equal(p, before.transformer.get_parameter(n))
    ]
    assert moved and after.settings == before.settings


def test_prompt_rows_are_the_pipelines_own():
    pipe = tiny_pipeline()
    batch, condition = recipe().prompt_rows(pipe, ["a dog", "two cats"])
    assert batch.shape == (2, TEXT_LENGTH + GRID[0] * GRID[1])
    assert bool(batch.given[:, :TEXT_LENGTH].all()) and not bool(batch.given[:, TEXT_LENGTH:].any())
    assert condition is None or not bool(condition[:, 0].any())


def test_refusals(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    assert run("nowhere", "out", "--reward", "oracle") == 2 and "does not exist" in capsys.readouterr().err
    assert run("base", "out", "--reward", "m:f") == 2 and "--prompts is missing" in capsys.readouterr().err
    assert run("base", "out", "--prompts", "prompts.txt", "--reward", "f") == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err
