"""Checkpoints on disk: damage is noticed, wherever it is; what to do then is said; what was whole is used again."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.train.config import ParallelConfig
from unidiff.train.run.checkpoint import SUMS, choose, damage, pointed_name, step_names, write_sums
from unidiff.train.run.distributed import Launch, Parallel
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
SETTINGS = [*MIXED, "steps=6", "checkpoint.every=2", "precision=fp32", "checkpoint.keep=9"]


def run(folder: Path, *overrides: str, parallel: Parallel | None = None) -> Trainer:
    trainer = Trainer(tiny_config(folder, *SETTINGS, *overrides), tiny_table(), parallel=parallel)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    """A finished run of one process, and one of a process group with shards: checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "plain")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = Parallel(torch.device("cpu"), ParallelConfig(mode="fsdp"), Launch(0, 1, 0, "127.0.0.1", port))
    run(folder / "sharded", "parallel.mode=fsdp", parallel=group)
    group.close()
    return {kind: folder / kind for kind in ("plain", "sharded")}


@pytest.fixture
def cut(tmp_path, finished):
    """`cut(kind)`: a copy of a finished run."""
    return lambda kind="plain": Path(shutil.copytree(finished[kind], tmp_path / kind))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


@settings(max_examples=150)
@given(st.data())
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_a_bit_flipped_anywhere_is_noticed_and_the_file_is_named(finished, kind, data):
    target = finished[kind] / "checkpoints" / "step-00000006"
    assert damage(target) == ""
    files = sorted(p for p in target.rglob("*") if p.is_file())
    assert {p.suffix for p in files} == {"", ".json", ".safetensors"}
    path = data.draw(st.sampled_from(files))
    place = int(data.draw(st.floats(0, 1, exclude_max=True)) * 8 * path.stat().st_size)
    before = path.read_bytes()
    try:
        flip(path, place)
        said = damage(target)
        assert str(target) in said and "\n" not in said and (path.name in said or path.name == SUMS)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_every_file_that_is_cut_gone_or_too_much_is_noticed(cut, kind):
    target = cut(kind) / "checkpoints" / "step-00000006"
    for path in sorted(p for p in target.rglob("*") if p.is_file()):
        before = path.read_bytes()
        for content in (before[:-1], before[: len(before) // 2], b"", before + b"\n", b"\0" * len(before)):
            path.write_bytes(content)
            assert path.name in damage(target), path
        path.unlink()
        assert path.name in damage(target)
        path.mkdir()
        assert damage(target)
        path.rmdir()
        path.write_bytes(before)
    extra = target / ("shards" if kind == "sharded" else ".") / "shard-00009-model.safetensors"
    extra.write_bytes(b"")
    assert extra.name in damage(target)
    extra.unlink()
    (target / "notes.txt").write_text("a person's own file is no damage")
    assert damage(target) == ""
    assert (target / "nowhere").exists() is False and "is not there" in damage(target / "nowhere")


def test_the_checksums_are_those_of_sha256sum(finished):
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    for kind in finished.values():
        target = kind / "checkpoints" / "step-00000006"
        assert subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=target, capture_output=True).returncode == 0


@pytest.mark.parametrize("kind", ["plain", "sharded"])
@pytest.mark.parametrize("name", ["state.json", "safetensors", SUMS])
def test_a_damaged_newest_one_is_refused_and_the_one_before_offered_and_taken(cut, caplog, kind, name):
    folder = cut(kind)
    shutil.copytree(folder / "model", folder.parent / "expected")
    newest = folder / "checkpoints" / "step-00000006"
    flip(next(p for p in sorted(newest.rglob("*")) if p.name.endswith(name)), 500)
    expected = r"step-00000006 is damaged: .*; step-00000004 is whole: go on from there with checkpoint\.fallback=true"
    with pytest.raises(ValueError, match=expected):
        run(folder)
    assert step_names(folder / "checkpoints") == ["step-00000002", "step-00000004", "step-00000006"]
    trainer = run(folder, "checkpoint.fallback=true")
    assert trainer.resumed and "going on from step-00000004" in caplog.text
    assert damage(newest) == "" and pointed_name(folder / "checkpoints") == newest.name  # written anew
    if kind == "plain":  # the sharded run was continued by a process alone, whose sums are rounded otherwise
        for path in (folder / "model").iterdir():
            assert path.read_bytes() == (folder.parent / "expected" / path.name).read_bytes(), path.name


def test_where_nothing_is_whole_that_is_said(cut):
    folder = cut()
    for name in step_names(folder / "checkpoints"):
        flip(folder / "checkpoints" / name / "ema.safetensors", 999)
    for setting in ("checkpoint.fallback=true", "checkpoint.fallback=false"):
        with pytest.raises(ValueError, match="no other checkpoint there is whole"):
            run(folder, setting)


@pytest.mark.parametrize("content", [b"step-00000005\n", b"", b"\xff\xfe", b"../../etc", b"step-00000006 \n", b"{}"])
def test_a_pointer_to_nowhere_is_a_sentence_with_a_way_out(cut, content):
    folder = cut()
    (folder / "checkpoints" / "latest").write_bytes(content)
    with pytest.raises(ValueError, match=r"latest|step-00000005 is not there.*checkpoint\.fallback=true") as error:
        run(folder)
    assert "\n" not in str(error.value) and "step-00000006 is whole" in str(error.value)
    assert run(folder, "checkpoint.fallback=true").state.step == 6
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000006\n"


def test_a_missing_pointer_does_not_start_the_run_again(cut, caplog):
    folder = cut()
    (folder / "checkpoints" / "latest").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        run(folder, "checkpoint.resume=false")
    trainer = run(folder)
    assert trainer.resumed and trainer.state.step == 6
    assert "latest is missing; step-00000006 is the newest checkpoint there" in caplog.text
    assert pointed_name(folder / "checkpoints") == "step-00000006"


def test_going_back_by_hand_is_possible_and_said(cut, caplog):
    folder = cut()
    (folder / "checkpoints" / "latest").write_text("step-00000002\n")
    trainer = Trainer(tiny_config(folder, *SETTINGS), tiny_table())
    assert trainer.state.step == 2
    trainer.train()
    assert "names step-00000002; step-00000006, which lies there too, is not used" in caplog.text


def sum_anew(target: Path) -> None:
    (target / SUMS).unlink()
    write_sums(target)


WRONG = [None, True, -1, 1.5, float("nan"), float("inf"), 2**63, "x", [], {}, [1], {"a": 1}]


@pytest.mark.parametrize("name", ["step", "samples", "ema_updates", "bad_steps", "skipped", "level", "config", "facts"])
def test_every_wrong_value_of_the_state_is_a_sentence(cut, name):
    """With checksums of the wrong state, which else are what is noticed."""
    folder = cut()
    path = folder / "checkpoints" / "step-00000006" / "state.json"
    state = json.loads(path.read_text())
    for value in [*WRONG, ...]:
        changed = {key: old for key, old in state.items() if key != name or value is not ...}
        if value is not ...:
            changed[name] = value
        path.write_text(json.dumps(changed))
        sum_anew(path.parent)
        try:
            Trainer(tiny_config(folder, *SETTINGS), tiny_table())
        except ValueError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error), (value, error)
        else:
            assert name == "level" and value == 1.5, value
    for content in ("{}", "[]", "null", "3", "", '{"step":', "[" * 5000, "\ufeff{}"):
        path.write_text(content)
        sum_anew(path.parent)
        with pytest.raises(ValueError, match=r"state\.json"):
            Trainer(tiny_config(folder, *SETTINGS), tiny_table())


@pytest.mark.parametrize("name", ["score", "scored"])
def test_a_score_that_is_none_is_a_sentence(cut, name):
    folder = cut()
    (folder / "checkpoints" / "best").write_text("step-00000002\n")
    path = folder / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    for value in ("x", [], {}, True):
        if isinstance(value, str) and name == "scored":
            continue
        path.write_text(json.dumps({**state, name: value}))
        with pytest.raises(ValueError, match=r"state\.json' is damaged: score"):
            Trainer(tiny_config(folder, *SETTINGS), tiny_table())
    path.write_text("{")
    with pytest.raises(ValueError, match=r"state\.json' cannot be read"):
        Trainer(tiny_config(folder, *SETTINGS), tiny_table())


def test_scores_of_another_number_or_of_other_rows_are_not_compared(tmp_path):
    table, held_out = tiny_table(72).split(8)
    other = tiny_table(64, seed=5).split(8)[1]

    def trained(best: str, rows, steps: int) -> Trainer:
        config = tiny_config(tmp_path, *MIXED, f"steps={steps}", "logging.validate_every=2", f"checkpoint.best={best}")
        trainer = Trainer(config, table.seeded(0), rows)
        trainer.train()
        return trainer

    first = trained("joint_nelbo", held_out, 2)
    assert Trainer(first.config, table.seeded(0), held_out).best == first.best < float("inf")
    for best, rows in (("text_to_image_nelbo", held_out), ("joint_nelbo", other)):
        config = tiny_config(tmp_path, *MIXED, "steps=2", f"checkpoint.best={best}")
        assert Trainer(config, table.seeded(0), rows).best == float("inf")
    names = first.validate()
    for name in names:
        tiny = tiny_config(tmp_path / "new", f"checkpoint.best={name}")
        Trainer(tiny, table.seeded(0), held_out)
    for name, rows in (("nelbo", held_out), ("joint_nelbo", None), ("text_to_image_nelbo_words", held_out)):
        with pytest.raises(ValueError, match="is not in the validation report"):
            Trainer(tiny_config(tmp_path / "new", f"checkpoint.best={name}"), table.seeded(0), rows)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert choose(tmp_path, False) is None and choose(tmp_path / "none", True) is None
