"""Trackers by config: what they get, what a continued run sends, and what is said when one is missing."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.train.config import TrainConfig
from unidiff.train.run.logs import RunLog
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training


class FakeRun:
    def __init__(self, number: int, options: dict) -> None:
        self.options, self.lines, self.finished = options, [], False
        self.id, self.name = options.get("id") or f"id{number}", options["name"]

    def log(self, values, step):
        assert not self.finished
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def services(monkeypatch):
    """Modules with what is used of wandb and trackio; each has `runs`."""
    made = {}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.runs, module.Image = [], lambda pixels: ("picture", pixels)

        def init(module=module, **options):
            module.runs.append(FakeRun(len(module.runs), options))
            return module.runs[-1]

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        made[name] = module
    return made


def run(folder, *overrides):
    config = tiny_config(
        folder, *MIXED, "checkpoint.every=2", "logging.every=1", "logging.validate_every=2", *overrides
    )
    table, held_out = tiny_table(72).split(8)
    trainer = Trainer(
        config, table.seeded(config.seed), held_out, lambda model, step: torch.full((3, 4, 5), step).byte()
    )
    trainer.train()
    return trainer


def written(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    inner = [(x["step"], x["kind"], {k: v for k, v in x.items() if k not in ("step", "kind", "time")}) for x in lines]
    return [(step, {f"{kind}/{k}": v for k, v in values.items() if v is not None}) for step, kind, values in inner]


def test_services_get_every_line_and_picture_once(tmp_path, services):
    settings = ["logging.trackers=[wandb,trackio]", "logging.project=squares", "logging.sample_every=2"]
    trainer = run(tmp_path, "steps=4", *settings)
    for name, module in services.items():
        (seen,) = module.runs
        assert seen.finished and seen.options["project"] == "squares" and seen.options["resume"] == "never"
        assert seen.name == "-".join(tmp_path.parts[1:])
        assert seen.options["config"]["steps"] == 4 and seen.options["config"]["optimiser"]["lr"] == 1e-3
        assert ("dir" in seen.options) == (name == "wandb")
        numbers = [line for line in seen.lines if "samples" not in line[1]]
        assert numbers == written(tmp_path) and len(numbers) == 4 + 2
        assert "train/nll/text_to_image/image" in numbers[0][1] and "validation/joint_nelbo" in numbers[2][1]
        pictures = [(step, values["samples"]) for step, values in seen.lines if "samples" in values]
        assert [(step, kind, pixels.shape) for step, (kind, pixels) in pictures] == [
            (2, "picture", (4, 5, 3)),
            (4, "picture", (4, 5, 3)),
        ]
        assert pictures[1][1][1].dtype == "uint8" and int(pictures[1][1][1].max()) == 4

    # killed after step 4, before its checkpoint was complete: steps 3 and 4 come again
    (trainer.checkpoints / "latest").write_text("step-00000002\n")
    again = run(tmp_path, "steps=6", *settings)
    assert again.resumed
    for name, module in services.items():
        first, second = module.runs
        assert second.options["resume"] == "allow" and second.name == first.name
        assert second.options.get("id") == (first.id if name == "wandb" else None)
        assert [step for step, _ in second.lines] == [5, 6, 6, 6]
        numbers = [line for line in (*first.lines, *second.lines) if "samples" not in line[1]]
        assert [step for step, _ in numbers] == [step for step, _ in written(tmp_path)]


def test_numbers_that_are_not_finite_are_not_sent(tmp_path, services):
    log = RunLog(tmp_path, 0, ["wandb"])
    log.write(1, "train", {"loss": float("nan"), "grad_norm": 2.0})
    log.close()
    assert services["wandb"].runs[0].lines == [(1, {"train/grad_norm": 2.0})]


def test_tensorboard_is_the_default_and_a_continued_run_replaces_later_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert TrainConfig().logging.trackers == ["tensorboard"]
    trackers = "logging.trackers=[tensorboard]"
    trainer = run(tmp_path, "steps=4", trackers, "logging.sample_every=4")
    (trainer.checkpoints / "latest").write_text("step-00000002\n")
    run(tmp_path, "steps=5", trackers)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    losses = [values["train/loss"] for _, values in written(tmp_path) if "train/loss" in values]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)


def test_packages_are_imported_only_when_named(tmp_path, monkeypatch):
    names = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
    for module in names.values():
        monkeypatch.setitem(sys.modules, module, None)
    RunLog(tmp_path, 0).close()
    RunLog(tmp_path, 0, list(names), silent=True).close()
    for name in names:
        message = rf"is not installed; run pip install 'unidiff\[\w+\]' or leave {name} out of the trackers"
        with pytest.raises(ValueError, match=message):
            RunLog(tmp_path, 0, [name])


def test_a_service_that_does_not_start_is_named(tmp_path, services):
    def refuse(**options):
        raise RuntimeError("api_key not\nconfigured")

    services["wandb"].init = refuse
    with pytest.raises(ValueError, match=r"wandb did not start \(api_key not configured\); log in there"):
        RunLog(tmp_path, 0, ["wandb"])


def test_other_trackers_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"logging\.trackers\[0\] is 'mlflow'; expected one of 'tensorboard', 'wandb'"):
        tiny_config(tmp_path, "logging.trackers=[mlflow]")
