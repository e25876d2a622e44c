"""The image tokenizer's run goes on where it stopped, keeps the best, and never trains on what it is measured on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from killed_tokenizer import config, with_cells
from PIL import Image
from safetensors.torch import load_file, save_file

from unidiff.files import locked
from unidiff.train.image_tokenizer import trainer as vq_trainer
from unidiff.train.image_tokenizer.config import ImageData
from unidiff.train.image_tokenizer.data import digest, open_pictures
from unidiff.train.image_tokenizer.trainer import train_image_tokenizer
from unidiff.train.run import logs

KILLED = Path(__file__).resolve().parents[1] / "killed_tokenizer.py"


def shard(path: Path, count: int, copies: int = 1) -> Path:
    """`count` different pictures of 32 x 32 pixels, each `copies` times under other names."""
    with tarfile.open(path, "w") as tar:
        for number in range(count * copies):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(number % count))
            held = io.BytesIO()
            Image.fromarray(pixels.byte().numpy()).save(held, "PNG")
            info = tarfile.TarInfo(f"{number:04d}.png")
            info.size = held.tell()
            tar.addfile(info, io.BytesIO(held.getvalue()))
    return path


def tensors(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    name = (out / "checkpoints" / "latest").read_text().strip()
    return {
        p.name: load_file(p)
        for folder in (out / "model", out / "checkpoints" / name)
        for p in folder.glob("*.safetensors")
    }


def check_equal(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.keys() == second[name].keys()
        assert all(torch.equal(value, second[name][key]) for key, value in values.items()), name
    logs = []
    for out in (a, b):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in lines])
    assert logs[0] == logs[1]
    reports = [json.loads((out / "report.json").read_text()) | {"seconds": 0} for out in (a, b)]
    assert reports[0] == reports[1]
    assert (a / "reconstructions.png").read_bytes() == (b / "reconstructions.png").read_bytes()
    assert not [p for p in b.rglob(".*")]


class Crash(BaseException):
    """A power cut, as far as the run can tell."""


def crash_at(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    module = logs if name == "save_checkpoint" else vq_trainer
    real, count = getattr(module, name), iter(range(10**6))

    def failing(*args, **kwargs):
        if next(count) == calls:
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.training
@pytest.mark.parametrize("kind", ["scenes", "cells", "shards"])
def test_a_run_that_crashed_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, kind):
    def make(out: Path):
        if kind == "cells":
            return with_cells(out)
        small = config(out, steps=13)
        if kind == "scenes":
            return small
        return replace(small, data=ImageData(shards=[str(tmp_path / "p.tar")], image_size=32))

    shard(tmp_path / "p.tar", 20, 2)
    train_image_tokenizer(make(tmp_path / "whole"))
    calls = {"vq_forward": 7, "measure": 1, "save_checkpoint": 2, "reconstruction_sheet": 1}
    for name, number in calls.items():
        with monkeypatch.context() as patch:
            crash_at(patch, name, number if not (tmp_path / "cut").exists() else 1)
            try:
                train_image_tokenizer(make(tmp_path / "cut"))
            except Crash:
                continue
    report = train_image_tokenizer(make(tmp_path / "cut"))
    check_equal(tmp_path / "whole", tmp_path / "cut")
    assert report["step"] <= make(tmp_path).steps


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.parametrize("name", ["scenes", "cells"])
def test_fifteen_kills_equal_the_uninterrupted_run_bit_for_bit(tmp_path, name):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KILLED.parent)}
    for folder, kills in (("whole", 0), ("cut", 15)):
        words = [sys.executable, str(KILLED), str(tmp_path / f"{folder}-{name}"), str(kills), "7"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    check_equal(tmp_path / f"whole-{name}", tmp_path / f"cut-{name}")


@pytest.mark.training
def test_a_signal_ends_the_step_and_the_same_call_goes_on(tmp_path, monkeypatch, capsys):
    train_image_tokenizer(config(tmp_path / "whole", steps=9))
    real, count = vq_trainer.vq_forward, iter(range(100))

    def interrupted(*args, **kwargs):
        if next(count) in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM if not (tmp_path / "cut" / "checkpoints").exists() else signal.SIGINT)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(vq_trainer, "vq_forward", interrupted)
        assert train_image_tokenizer(config(tmp_path / "cut", steps=9)) == {"stopped": 3}
        assert "stopped at step 3; run the same command" in capsys.readouterr().out
        train_image_tokenizer(config(tmp_path / "cut", steps=9))
    assert "resumed at step 3" in capsys.readouterr().out
    train_image_tokenizer(config(tmp_path / "cut", steps=9))
    check_equal(tmp_path / "whole", tmp_path / "cut")
    capsys.readouterr()
    report = train_image_tokenizer(config(tmp_path / "cut", steps=9))  # nothing is left to do, and nothing is changed
    assert report == json.loads((tmp_path / "cut" / "report.json").read_text())
    check_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.training
def test_the_best_is_kept_and_only_the_same_run_continues(tmp_path, monkeypatch, capsys):
    out, scores = tmp_path / "run", iter([10.0, 30.0, 20.0, 5.0, 6.0])

    def measured(model, validation):
        return {"psnr": next(scores)}

    monkeypatch.setattr(vq_trainer, "measure", measured)
    report = train_image_tokenizer(config(out, steps=6, validate_every=2))
    assert (report["psnr"], report["step"]) == (30.0, 4)
    kept = load_file(out / "model" / "diffusion_pytorch_model.safetensors")
    longer = train_image_tokenizer(config(out, steps=8, validate_every=2))
    assert (
        longer == report and "steps was 6, here 8: the rate of the cosine schedule goes from" in capsys.readouterr().out
    )
    again = load_file(out / "model" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    for changes, words in (
        ({"batch_size": 5}, "batch_size = 4, here 5"),
        ({"learning_rate": 1e-3}, "learning_rate = 0.002, here 0.001"),
        ({"seed": 1}, "seed = 0, here 1"),
        ({"data": ImageData(world="emoji", validation_images=9)}, "validation_images = 8, here 9"),
        ({"data": ImageData(world="emoji", profile="gpu", validation_images=8)}, '"cpu", here "gpu"'),
        ({"init_from": str(out / "model")}, "init_from = null, here"),
    ):
        with pytest.raises(ValueError, match="to continue it, or another out=") as error:
            train_image_tokenizer(config(out, steps=8, **changes))
        assert words in str(error.value)
    with locked(out, "test"), pytest.raises(ValueError, match="is in use by process"):
        train_image_tokenizer(config(out, steps=8))
    (out / "report.json").unlink()
    with pytest.raises(ValueError, match="lacks the model or report"):
        train_image_tokenizer(config(out, steps=8))


@pytest.mark.training
def test_other_shards_under_the_same_name_are_another_run(tmp_path):
    data = ImageData(shards=[str(shard(tmp_path / "p.tar", 30))], image_size=32)
    train_image_tokenizer(config(tmp_path / "run", steps=2, data=data))
    shard(tmp_path / "p.tar", 31)
    with pytest.raises(ValueError, match=r"the content of data\.shards ="):
        train_image_tokenizer(config(tmp_path / "run", steps=4, data=data))


def test_a_model_without_its_checkpoints_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds"):
        train_image_tokenizer(config(tmp_path, steps=1))
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    train_image_tokenizer(config(tmp_path / "run", steps=1))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    weights = (tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a model and no checkpoint"):
        train_image_tokenizer(config(tmp_path / "run", steps=2))
    assert (tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file or a device"):
        train_image_tokenizer(config(tmp_path / "file"))


@pytest.mark.training
def test_damaged_checkpoints_and_weights_that_are_no_numbers(tmp_path):
    out = tmp_path / "run"
    train_image_tokenizer(config(out, steps=8))
    path = max((out / "checkpoints").glob("step-*")) / "optimiser.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*step-00000004 is whole: go on from there with fallback=true"):
        train_image_tokenizer(config(out, steps=9))
    train_image_tokenizer(config(out, steps=9, fallback=True))
    weights = out / "model" / "diffusion_pytorch_model.safetensors"
    broken = load_file(weights)
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="NaN"):
        train_image_tokenizer(config(tmp_path / "next", init_from=str(out / "model")))
    assert not (tmp_path / "next").exists()


@pytest.mark.training
def test_gradients_that_are_no_numbers_are_left_out_and_never_exported(tmp_path, monkeypatch):
    def clipped(parameters, most):
        return torch.tensor(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    with pytest.raises(ValueError, match="steps diverged"):
        train_image_tokenizer(config(tmp_path / "run", steps=200))
    for path in (tmp_path / "run" / "model").glob("*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(path).values())


@pytest.mark.parametrize(
    ("count", "copies", "asked", "held"), [(80, 1, 0, 10), (20, 1, 5, 5), (20, 3, 19, 19), (2, 4, 0, 1)]
)
def test_held_out_pictures_are_never_in_the_stream(tmp_path, count, copies, asked, held):
    data = ImageData(shards=[str(shard(tmp_path / "p.tar", count, copies))], image_size=16, validation_images=asked)
    pictures = open_pictures(data, 3, 8)
    kept = {digest(p) for p in pictures.held_out}
    assert len(pictures.held_out) == len(kept) == held
    seen = {digest(p) for p in islice(pictures.stream(), 3 * count * copies)}
    assert not seen & kept and len(seen) == count - held


def test_held_out_scenes_are_never_in_the_stream():
    data = ImageData(world="emoji", kinds=(1.0, 0.0, 0.0, 0.0), validation_images=200)
    pictures = open_pictures(data, 0, 8)
    kept = {digest(p) for p in pictures.held_out}
    stream = pictures.stream()
    assert not {digest(p) for p in islice(stream, 600)} & kept
    assert pictures.source.state_dict()["scene"] >= 600


@pytest.mark.parametrize(
    ("count", "asked", "words"),
    [(20, 256, "20 different pictures; data.validation_images=256"), (20, 20, "at most 19"), (1, 0, "at least 2 are needed"),
     (0, 0, "0 pictures")],
)  # fmt: skip
def test_too_few_pictures_are_a_sentence_with_numbers(tmp_path, count, asked, words):
    data = ImageData(shards=[str(shard(tmp_path / "p.tar", count))], image_size=16, validation_images=asked)
    with pytest.raises(ValueError, match=words):
        open_pictures(data, 0, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"steps": 0}, "steps is 0"), ({"steps": 1.5}, "whole number"), ({"learning_rate": float("nan")}, "finite"), ({"out": " "}, "empty"),
     ({"learning_rate": 0}, "learning_rate is 0"), ({"batch_size": 10**9}, "are too many"), ({"device": "mps"}, "mps"), ({"device": "tpu"}, "tpu"),
     ({"threads": -1}, "threads is -1"), ({"revive_until": 2}, "revive_until"), ({"bf16": 1}, "true or false"),
     ({"data": ImageData(shards=["/nowhere/{0..3}.tar"])}, "nowhere")],
)  # fmt: skip
def test_settings_are_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train_image_tokenizer(replace(config(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.training
def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    slow = config(tmp_path / "run", steps=4, validate_every=1, checkpoint_every=100)
    train_image_tokenizer(replace(slow, out=str(tmp_path / "whole")))

    draw = vq_trainer.reconstruction_sheet

    def killed(*arguments, **options):
        if (tmp_path / "run" / "model").is_dir():  # the rest is not there
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(vq_trainer, "reconstruction_sheet", killed)
        with pytest.raises(KeyboardInterrupt):
            train_image_tokenizer(slow)
    assert (tmp_path / "run" / "model").is_dir()
    train_image_tokenizer(slow)
    check_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["report.json", "reconstructions.png"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name} and no checkpoint to go on from; name another out="):
        train_image_tokenizer(config(tmp_path, steps=1))
    assert (tmp_path / name).read_text() == "mine"


def test_no_run_begins_inside_of_a_pipeline_or_on_a_file(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is in the pipeline folder"):
        train_image_tokenizer(config(tmp_path / "run", steps=1))
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match="is a file where the run puts its checkpoints"):
        train_image_tokenizer(config(tmp_path, steps=1))
