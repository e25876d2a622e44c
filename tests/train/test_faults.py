"""Faults from outside: disks that take no more, other runs in the folder, files of others, logs that were cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked_runs import RECIPE, check_same_runs, forked, recipe_main, start, wait_for_step
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from train_fixtures import MIXED, TINY, tiny_config, tiny_table

from unidiff.files import locked
from unidiff.train.run.checkpoint import step_names
from unidiff.train.run.logs import RunLog
from unidiff.train.run.resume import MARK
from unidiff.train.trainer import Trainer, TrainingAborted

pytestmark = pytest.mark.training
TRACED = "logging.trackers=[tensorboard]"


@pytest.fixture
def table(tmp_path) -> Path:
    tiny_table(72).save(tmp_path / "table.safetensors")
    return tmp_path / "table.safetensors"


@pytest.fixture
def pretrain(tmp_path, table, capsys):
    """The recipe in this process: `pretrain(overrides...) -> (status, stderr)`."""
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    main = recipe_main()

    def run(*overrides: object) -> tuple[int, str]:
        status = main([str(tmp_path / "config.yaml"), *TINY, f"data.train={table}", *map(str, overrides)])
        return status, capsys.readouterr().err.strip()

    return run


def check_full_disk(tmp_path: Path, table: Path, limits: list[int], *overrides: str, ranks: int = 1) -> None:
    """Runs that fail on files of more than `limits` bytes, and go on without; against one that never failed."""
    common = [*TINY, *MIXED, f"data.train={table}", "accumulate=2", "steps=12", "checkpoint.every=3", "logging.every=1"]
    common += ["logging.validate_every=4", "checkpoint.best=joint_nelbo", TRACED, *overrides]
    whole, cut = ({"arguments": [*common, f"output={tmp_path / name}"], "ranks": ranks} for name in ("whole", "cut"))
    stopped = {**cut, "end": "stop 4"}
    results = forked(tmp_path / "driver", [whole, stopped, *({**cut, "limit": limit} for limit in limits), cut])
    for limit, result in zip(limits, results[2:-1], strict=True):
        assert set(result["codes"]) == {2}, (limit, result)
        texts = [text for text in result["errors"] if "another process of this run has ended" not in text]
        said = [line for text in texts for line in text.splitlines() if not line.startswith(str(tmp_path))]
        assert said and all(line.startswith("error: ") and str(tmp_path / "cut") in line for line in said), (
            limit,
            said,
        )
    check_same_runs(tmp_path, 12)


def test_a_disk_that_takes_no_more_costs_nothing_but_time(tmp_path, table):
    check_full_disk(tmp_path, table, [100, 1500, 5000, 30_000, 60_000])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_disk_that_takes_no_more_stops_all_ranks(tmp_path, table, mode):
    check_full_disk(tmp_path, table, [100, 5000, 30_000, 60_000], f"parallel.mode={mode}", ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_disks_of_any_size(tmp_path, table, seed):
    draw = torch.Generator().manual_seed(seed)
    limits = sorted(int(10 ** (1.5 + 3.3 * torch.rand(1, generator=draw).item())) for _ in range(10))
    check_full_disk(tmp_path, table, limits)


def test_a_second_run_in_the_folder_is_one_sentence_and_changes_nothing(tmp_path, pretrain):
    out = tmp_path / "run"
    assert pretrain(f"output={out}", "logging.every=1")[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with locked(out, "training"):
        status, said = pretrain(f"output={out}", "steps=9")
    assert status == 2 and said.startswith("error: ") and "\n" not in said
    assert f"{str(out)!r} is in use by process {os.getpid()} on " in said
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with locked(tmp_path / "fresh", "training"):
        assert pretrain(f"output={tmp_path / 'fresh'}")[0] == 2
        assert [p.name for p in (tmp_path / "fresh").iterdir()] == [".lock"]
    trainer = Trainer(tiny_config(tmp_path / "fresh", "steps=2"), tiny_table())
    with locked(tmp_path / "fresh", "training"), pytest.raises(ValueError, match="is in use by process"):
        trainer.train()
    assert trainer.train() == {}


@pytest.mark.slow
def test_two_processes_one_of_which_is_refused(tmp_path, table):
    first = start(tmp_path / "run", table, "steps=100000", "logging.every=1", "checkpoint.every=5")
    wait_for_step(tmp_path / "run", 3, first)
    for _ in range(2):
        second = start(tmp_path / "run", table, "steps=100000", "logging.every=1")
        _, said = second.communicate(timeout=120)
        assert second.returncode == 2 and f"in use by process {first.pid} on" in said and said.count("\n") == 1
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("rank_count", [pytest.param(2, marks=pytest.mark.slow)])
def test_all_ranks_of_a_second_run_end(tmp_path, table, rank_count):
    run = {"arguments": [*TINY, f"data.train={table}", "steps=2", f"output={tmp_path / 'run'}"], "ranks": rank_count}
    with locked(tmp_path / "run", "training"):
        result = forked(tmp_path / "driver", [{**run, "limit": 10**9}])[0]
    assert result["codes"] == [2, 2] and all("is in use by process" in text for text in result["errors"])


def test_a_folder_in_which_a_run_would_spoil_something_is_refused(tmp_path, pretrain):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("# mine\nsteps: 3\n")
    for name in ("pipe", "sd"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
    (tmp_path / "run" / "model" / "unet").mkdir(parents=True)
    (tmp_path / "notes" / "model-best").mkdir(parents=True)
    (tmp_path / "notes" / "model-best" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for output, said in (
        ("own", "config.yaml' is of no run"),
        ("pipe", "is in the pipeline folder"),
        ("sd/unet/run", "is in the pipeline folder"),
        ("run", "holds no model that unidiff wrote; unet/ would be lost"),
        ("notes", "notes.txt would be lost"),
        ("file", "is a file"),
    ):
        status, message = pretrain(f"output={tmp_path / output}")
        assert status == 2 and said in message and str(tmp_path / output.split("/")[0]) in message, message
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "own" / "config.yaml").read_text().startswith("# mine")


def test_starting_weights_are_not_replaced_by_what_grew_from_them(tmp_path, pretrain):
    assert pretrain(f"output={tmp_path / 'run'}")[0] == 0
    weights = f"checkpoint.init_from={tmp_path / 'run' / 'model'}"
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for output in ("run", "run/model", "run/model/next"):
        status, said = pretrain(f"output={tmp_path / output}", weights)
        assert status == 2 and "starting weights" in said, said
    assert pretrain(f"output={tmp_path / 'next'}", weights)[0] == 0


def test_exports_are_written_through_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "disk", target_is_directory=True)
    Trainer(tiny_config(tmp_path / "run", "steps=1"), tiny_table()).train()
    assert (tmp_path / "run" / "model").is_symlink() and (tmp_path / "disk" / "config.json").is_file()


def test_a_file_that_was_put_into_the_export_meanwhile_stays(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, "steps=2", "checkpoint.every=1"), tiny_table())
    save = trainer.save

    def save_and_note() -> None:
        save()
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "notes.txt").write_text("keep me")

    trainer.save = save_and_note
    with pytest.raises(ValueError, match=r"holds no model that unidiff wrote; notes\.txt would be lost"):
        trainer.train()
    assert (tmp_path / "model" / "notes.txt").read_text() == "keep me"
    assert step_names(tmp_path / "checkpoints") == ["step-00000001"]


def test_copies_beside_checkpoints_are_not_ours_to_delete(tmp_path):
    folder = tmp_path / "checkpoints"
    kept = ["step-00000001.good", "step-final", "my-step-00000001", "step-1"]
    for name in kept:
        (folder / name).mkdir(parents=True)
    Trainer(tiny_config(tmp_path, "steps=6", "checkpoint.every=1", "checkpoint.keep=1"), tiny_table()).train()
    assert sorted(p.name for p in folder.iterdir()) == sorted([*kept, "latest", "step-00000006"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_taken_nor_given(tmp_path, value):
    config = tiny_config(tmp_path / "run", "steps=2", "checkpoint.export_dtype=float32")
    trainer = Trainer(config, tiny_table())
    trainer.train()
    (path,) = (tmp_path / "run" / "model").glob("*.safetensors")
    tensors = load_file(path)
    name = "blocks.1.attention.qkv.weight"
    tensors[name][3, 4] = value
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "weights.safetensors")
    start = f"checkpoint.init_from={tmp_path / 'bad'}"
    said = r"weights\.safetensors: 1 weights hold NaN or infinity \(blocks\.1\.attention\.qkv\.weight\)"
    with pytest.raises(ValueError, match=said):
        Trainer(tiny_config(tmp_path / "next", start), tiny_table())
    with torch.no_grad():
        trainer.model.get_parameter(name)[0, 0] = value
        trainer.state.ema.average[name][0, 0] = value
    with pytest.raises(TrainingAborted, match="no longer finite at step 2"):
        trainer.save()
    with pytest.raises(ValueError, match=f"averaged weights {name} are not finite"):
        trainer.export(tmp_path / "run" / "model")
    assert all(torch.isfinite(v).all() for v in load_file(path).values())


@pytest.mark.parametrize("kind", ["complex", "bool", "int8"])
def test_starting_weights_are_floating_point_numbers(tmp_path, kind):
    trainer = Trainer(tiny_config(tmp_path / "run"), tiny_table())
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    kinds = {"complex": torch.complex64, "bool": torch.bool, "int8": torch.int8}
    weights["output_weight"] = weights["output_weight"].to(kinds[kind])
    (tmp_path / "bad").mkdir()
    save_file(weights, tmp_path / "bad" / "weights.safetensors")
    with pytest.raises(ValueError, match=r"output_weight of .*weights\.safetensors' is stored as"):
        Trainer(tiny_config(tmp_path / "next", f"checkpoint.init_from={tmp_path / 'bad'}"), tiny_table())


def test_an_export_in_float16_does_not_overflow(tmp_path):
    config = tiny_config(tmp_path, "steps=1", "checkpoint.export_dtype=float16")
    trainer = Trainer(config, tiny_table())
    with torch.no_grad():
        trainer.state.ema.average["output_weight"].fill_(1e6)
    with pytest.raises(
        ValueError, match=r"are not finite in float16, so nothing is exported; set checkpoint\.export_dtype"
    ):
        trainer.export(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.glob(".model*"))


@given(st.data())
def test_a_log_that_was_cut_loses_no_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    count, start = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 7))
    foreign = data.draw(
        st.sampled_from([b"", b"[1, 2]\n", b"3\n", b"\xff\xfe\n", b"\0\0\0\n", b'{"step": "x"}\n', b"null\n"])
    )
    log = RunLog(folder, 0)
    for step in range(1, count + 1):
        log.write(step, "train", {"loss": float("nan"), "other": step / 7})
    log.close()
    content = log.path.read_bytes()
    cut = round(data.draw(st.floats(0, 1)) * len(content))  # times differ in length from run to run
    log.path.write_bytes(foreign + content[:cut])
    whole = [line for line in content[:cut].splitlines() if line in content.splitlines()]
    log = RunLog(folder, start)
    log.write(start + 1, "train", {"loss": 1.0})
    log.close()
    lines = log.path.read_bytes().removeprefix(foreign).splitlines()
    assert log.path.read_bytes().startswith(foreign)
    assert lines[:-1] == [line for line in whole if json.loads(line)["step"] <= start]
    assert json.loads(lines[-1])["step"] == start + 1


def test_settings_of_the_last_start_can_be_read_again(tmp_path, pretrain):
    from unidiff.train.config import read_config

    assert pretrain(f"output={tmp_path / 'run'}", "seed=9")[0] == 0
    path = tmp_path / "run" / "config.yaml"
    assert path.read_text().startswith(MARK) and read_config(path).seed == 9


def test_torchrun_numbers_that_are_none_are_sentences(monkeypatch, pretrain, tmp_path):
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for changed in ({"RANK": "first"}, {"RANK": "4"}, {"MASTER_PORT": "0"}, {"WORLD_SIZE": "-1"}, {"LOCAL_RANK": ""}):
        for name, value in (names | changed).items():
            monkeypatch.setenv(name, value)
        status, said = pretrain(f"output={tmp_path / 'run'}")
        assert status == 2 and said.startswith("error: ") and next(iter(changed)) in said
    assert RECIPE.is_file() and not (tmp_path / "run").exists()


RUN_FILES = ["skipped.json", "metrics.jsonl", "config.yaml", ".lock", "checkpoints/latest", "checkpoints/best"]
RUN_FILES += [f"model/{name}" for name in ("config.json", "vocabulary.json", "trained_on.json")]
RUN_FILES += [f"checkpoints/step-00000002/{name}" for name in ("state.json", "SHA256SUMS", "ema.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUN_FILES, "checkpoints", "model", "model-best", "checkpoints/step-00000002"])
def test_whatever_lies_in_a_run_is_a_sentence_or_goes_on(tmp_path, pretrain, name):
    assert pretrain(f"output={tmp_path / 'run'}")[0] == 0
    contents = [b"", b"{}", b"[1]", b"null", b"\xff\xfe\0", b'{"step": []}', b"[" * 9999, ...]
    for content in contents if name in RUN_FILES else [b"", ...]:
        folder = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.mkdir() if content is ... else path.write_bytes(content)
        status, said = pretrain(f"output={folder}", "steps=4")
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (status, len(errors)) in ((0, 0), (2, 1)) and "Traceback" not in said, (content, said)
        assert status == 0 or str(folder) in errors[0], said
        shutil.rmtree(folder)


def test_the_last_line_of_a_persons_own_notes_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for notes in ("first\nsecond", "no end of line", '["a list"]', '{"my": 1}'):
        for cut in ("", "\n" + '{"step": 3, "kind": "train", "loss"', "\n" + '{"st'):
            path.write_text(notes + cut)
            RunLog(tmp_path, 0).close()
            assert path.read_text() == notes + "\n"
