"""The reward-tuning recipe as a command, with a reward of one's own and with the oracle's prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emoji_fakes import vocabulary_words
from tiny_pipeline import GRID, TEXT_LENGTH, tiny_pipeline

from unidiff.pipeline import UniDiffPipeline
from unidiff.train.reward_run import prompt_rows
from unidiff.train.run.checkpoint import load_checkpoint
from unidiff.worlds.emoji.evaluation import run_emoji_eval
from unidiff.worlds.emoji.scenes import get_profile

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
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
    sent: dict = {}
    tracked = SimpleNamespace(name="tuned", log=lambda values, step: sent.update({step: values}), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **options: tracked))
    assert run("base", "tuned", *reward, *QUICK, "--track", "trackio") == 0
    import brightness_reward

    prompts, shape = brightness_reward.seen[0]
    assert prompts == ["a dog"] * 3 + ["two cats"] * 3 and shape == (6, 3, 16, 24)
    assert brightness_reward.seen[1][0][0] == "an owl"
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["reward"] < 1 for line in lines)
    assert [values["reward/reward"] for values in sent.values()] == [line["reward"] for line in lines]
    before, after = (UniDiffPipeline.from_pretrained(tmp_path / name) for name in ("base", "tuned/pipeline"))
    moved = [
        n for n, p in after.transformer.named_parameters() if not torch.equal(p, before.transformer.get_parameter(n))
    ]
    assert moved and after.settings == before.settings

    assert run("base", "tuned", *reward, *QUICK, "--keep", "0.25") == 0  # nothing is left to do but to save again
    kept = UniDiffPipeline.from_pretrained(tmp_path / "tuned" / "pipeline").transformer
    for name, weight in kept.named_parameters():
        old, new = (pipe.transformer.get_parameter(name) for pipe in (before, after))
        torch.testing.assert_close(weight, 0.75 * old + 0.25 * new)


KILLER = """
import os, signal
from pathlib import Path
def bright(prompts, pictures):
    with open("calls.txt", "a") as calls:
        calls.write("x")
    if Path("kill").exists() and len(Path("calls.txt").read_text()) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return pictures.flatten(1).mean(1)
"""


@needs_peft
def test_tuning_writes_an_adapter_of_the_share_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    (tmp_path / "bright_reward.py").write_text("def bright(prompts, pictures): return pictures.flatten(1).mean(1)\n")
    reward = ["--prompts", "prompts.txt", "--reward", "bright_reward:bright", "--lora", "2", "--keep", "0.5"]
    assert run("base", "tuned", *reward, *QUICK) == 0
    pipe, merged = (UniDiffPipeline.from_pretrained(tmp_path / name) for name in ("base", "tuned/pipeline"))
    start = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "tuned" / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    tuned = merged.transformer.state_dict()
    assert any(not torch.equal(value, tuned[name]) for name, value in start.items())
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value, tuned[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [0, pytest.param(2, marks=needs_peft)])
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, capsys, lora):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a dog\ntwo cats\nan owl\n")
    (tmp_path / "killer_reward.py").write_text(KILLER)
    command = ["--prompts", "prompts.txt", "--reward", "killer_reward:bright", "--checkpoint-every", "2", *QUICK]
    command += ["--steps", "7", "--lora", lora]
    assert run("base", "whole", *command) == 0
    (tmp_path / "calls.txt").unlink()
    (tmp_path / "kill").touch()
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, str(ROOT / "training" / "reward_tuning.py"), "base", "cut", *map(str, command)]
    assert subprocess.run(words, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert (
        load_checkpoint(tmp_path / "cut" / "checkpoints", "about", False, "--fallback").state["step"] == 4
    )  # step 5 was lost, step 6 had no end
    assert not (tmp_path / "cut" / "pipeline").exists()
    capsys.readouterr()
    assert run("base", "cut", *command) == 0 and "resumed at step 4" in capsys.readouterr().out
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    lines = [[{k: v for k, v in json.loads(line).items() if k != "time"} for line in log] for log in logs]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [*range(1, 8)]
    whole, cut = (
        UniDiffPipeline.from_pretrained(tmp_path / name / "pipeline").transformer for name in ("whole", "cut")
    )
    first = UniDiffPipeline.from_pretrained(tmp_path / "base").transformer
    assert all(torch.equal(p, cut.get_parameter(n)) for n, p in whole.named_parameters())
    assert any(not torch.equal(p, first.get_parameter(n)) for n, p in cut.named_parameters())
    assert run("base", "cut", *command, "--lr", "1e-4") == 2
    assert 'has lr = "0.001", here "0.0001"' in capsys.readouterr().err


def test_tuned_with_the_oracle_and_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = vocabulary_words(get_profile("cpu")) * 2
    tiny_pipeline(text_length=40, grid=(8, 8), corpus=words).save_pretrained(tmp_path / "base")
    assert (
        run("base", "tuned", "--reward", "oracle", *QUICK, "--steps", "1", "--kinds", "0", "0", "1", "0", "--bf16") == 0
    )
    ways = ["--states", "decoded", "--masks", "1", "--rows", "4", "--cache", "auto", "--passes", "24"]
    ways += ["--guidance-scale", "1"]
    assert run("base", "again", "--reward", "oracle", *QUICK, "--steps", "1", *ways) == 0
    again = UniDiffPipeline.from_pretrained(tmp_path / "again" / "pipeline")  # draws as it was tuned
    drawing = again.settings.sampler("text_to_image")
    assert drawing.image.steps == 24 and drawing.guidance.scale == 1
    assert again.text_to_image("a dog", output_type="codes", generator=0).stats.evaluations == 24
    pipe = UniDiffPipeline.from_pretrained(tmp_path / "tuned" / "pipeline")
    report = run_emoji_eval(pipe, n=1, tasks=("text_to_image",), steps=2)
    assert any(name.startswith("text_to_image") for name in report.values)


def test_prompt_rows_are_the_pipelines_own():
    pipe = tiny_pipeline()
    batch, condition = prompt_rows(pipe, ["a dog", "two cats"])
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
    kinds = ("--kinds", "1", "0", "0", "0")
    assert run("base", "out", "--prompts", "prompts.txt", "--reward", "m:f", *kinds) == 2
    assert "--kinds [1.0, 0.0, 0.0, 0.0] goes with --reward oracle" in capsys.readouterr().err
    (tmp_path / "flat_reward.py").write_text("def flat(prompts, pictures):\n    return pictures.flatten(1).mean(1)\n")
    own = ("--prompts", "prompts.txt", "--reward", "flat_reward:flat")
    assert run("base", "out", *own, "--cache", "some") == 2
    assert "cache policy is 'some'; expected one of" in capsys.readouterr().err
    assert run("base", "out", *own, "--states", "all") == 2
    assert "states is 'all'; expected one of 'random', 'decoded'" in capsys.readouterr().err
    assert run("base", "out", *own, "--keep", "0") == 2
    assert "keep is 0.0; expected a finite number from 1e-09 to 1" in capsys.readouterr().err
    assert run("base", "out", *own, "--guidance-scale", "-1") == 2
    assert "guidance scale is -1.0" in capsys.readouterr().err
    assert run("base", "out", *own, "--rows", "0") == 2
    assert "rows is 0; expected a whole number from 1" in capsys.readouterr().err
    assert run("base", "out", "--reward", "oracle", "--passes", "0") == 2
    assert "passes is 0; expected a whole number from 1" in capsys.readouterr().err
    assert run("base", "out", "--reward", "oracle", "--kinds", "0", "0", "0", "0") == 2
    assert "--kinds is [0.0, 0.0, 0.0, 0.0]; expected four shares" in capsys.readouterr().err


def test_what_would_be_lost_or_is_another_run_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\ufeffa dog\n", encoding="utf-8")
    (tmp_path / "odd_reward.py").write_text(
        "def flat(prompts, pictures):\n    return pictures.flatten(1).mean(1)\n"
        "def fails(prompts, pictures):\n    return {}['missing']\n"
        "def words(prompts, pictures):\n    return prompts\n"
        "def nan(prompts, pictures):\n    return pictures.flatten(1).mean(1) * float('nan')\n"
        "number = 3\n"
    )
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "file").write_text("")
    own = ("--prompts", "prompts.txt", "--reward", "odd_reward:flat")
    for words, said in (
        (("base", "base", *own), "lie inside each other"),
        (("base", "base/tuned", *own), "lie inside each other"),
        (("base", ".", *own), "lie inside each other"),
        (("base", "file", *own), "is a file or a device"),
        (("base", "/dev/full", *own), "is a file or a device"),
        (("base", "out", "--prompts", "prompts.txt", "--reward", "odd_reward:fails"), "line 4 (KeyError: 'missing')"),
        (
            ("base", "out", "--prompts", "prompts.txt", "--reward", "odd_reward:words"),
            "the reward 'odd_reward:words' failed",
        ),
        (("base", "out", "--prompts", "prompts.txt", "--reward", "odd_reward:nan"), "finite numbers"),
        (("base", "out", "--prompts", "prompts.txt", "--reward", "odd_reward:number"), "is no function but int"),
        (
            ("base", "out", "--prompts", "prompts.txt", "--reward", "odd_reward:gone"),
            "cannot be imported (AttributeError",
        ),
        (("base", "out", "--prompts", "prompts.txt", "--reward", "broken_reward:f"), "ZeroDivisionError"),
        (("base", "out", "--prompts", "latin.txt", "--reward", "odd_reward:flat"), "latin.txt"),
        (("base", "out", "--prompts", "empty.txt", "--reward", "odd_reward:flat"), "holds no prompts"),
        (("base", "out", "--prompts", ".", "--reward", "odd_reward:flat"), "a folder"),
        (("base", "out", *own, "--lr", "nan"), "lr is nan"),
        (("base", "out", *own, "--keep", "nan"), "keep is nan"),
        (("base", "out", *own, "--seed", str(2**70)), "seed is"),
        (("base", "out", "--reward", "oracle", "--kinds", "nan", "1", "1", "1"), "--kinds is [nan"),
        (("base", "out", "--reward", "oracle", "--prompts", "prompts.txt"), "does not go with --reward oracle"),
    ):
        assert run(*words, *QUICK[:4], "--group", "2") == 2, words
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error, (words, error)
        assert not (tmp_path / "out" / "pipeline").exists()
    assert run("base", "out", *own, *QUICK, "--steps", "1") == 0
    from unidiff.files import locked

    with locked(tmp_path / "out", "test"):
        assert run("base", "out", *own, *QUICK) == 2 and "is in use by process" in capsys.readouterr().err
    other = tiny_pipeline()
    with torch.no_grad():
        other.transformer.embed_tokens.weight.mul_(2)
    other.save_pretrained(tmp_path / "base")  # another model under the same name
    assert run("base", "out", *own, *QUICK) == 2 and "has the content of MODEL" in capsys.readouterr().err
    tiny_pipeline().save_pretrained(tmp_path / "moved")
    (tmp_path / "more.txt").write_text("a cat\n")
    assert run("moved", "out", "--prompts", "more.txt", *own[2:], *QUICK) == 2
    assert "has the content of --prompts" in capsys.readouterr().err
    assert run("moved", "out", *own, *QUICK, "--steps", "2") == 0  # a folder may be moved
    broken = tiny_pipeline()
    with torch.no_grad():
        broken.transformer.embed_tokens.weight[0, 0] = float("nan")
    folder = tmp_path / "moved" / "transformer"
    from safetensors.torch import save_file

    save_file(dict(broken.transformer.state_dict()), next(folder.glob("*.safetensors")), {"format": "pt"})
    assert run("moved", "new", *own, *QUICK) == 2 and "NaN" in capsys.readouterr().err
