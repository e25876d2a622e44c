"""Many calls from a file: the same rows in any batch, on any number of processes, and after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.pipelines.batch import MANIFEST, read_rows, run_rows
from unidiff.pipelines.decode import row_seeds

LINES = [
    {"prompt": "a dog"},
    {"prompt": "two cats"},
    {"image": "p.png"},
    {"image": "p.png", "question": "what is it?"},
    {"image": "none.png"},
    {"image": "p.png"},
    {"text": "a <mask>"},
    {"prompt": "an owl"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    tiny_pipeline().save_pretrained(folder / "model")
    tiny_pipeline()("a dog", generator=1).images[0].save(folder / "p.png")
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    (folder / "words.txt").write_text("a dog\n\n  two cats \n")
    return folder


def entries(out: Path) -> dict[int, dict]:
    head, *rest = map(json.loads, (out / MANIFEST).read_text().splitlines())
    assert head["rows"] == len(LINES)
    done = [entry["number"] for entry in rest if "error" not in entry]
    assert len(done) == len(set(done)) and {entry["number"] for entry in rest} == set(range(len(LINES)))
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert len(pictures) == sum("image" in entry for entry in rest)
    return {entry["number"]: {**entry, "picture": pictures.get(entry.get("image"))} for entry in rest}


def test_rows_are_the_same_in_any_batch_and_after_a_stop(place, tmp_path):
    pipe, rows = tiny_pipeline(), read_rows(place / "lines.jsonl")
    assert rows == LINES and read_rows(place / "words.txt") == [{"prompt": "a dog"}, {"prompt": "two cats"}]
    assert run_rows(pipe, rows, tmp_path / "a", place, seed=5) == 1
    whole = entries(tmp_path / "a")
    seeds = row_seeds(5, len(rows)).tolist()
    assert [whole[n]["seed"] for n in range(len(rows))] == seeds
    alone = pipe("two cats", generator=[seeds[1]])
    assert whole[1]["words"] == alone.texts[0] and whole[1]["picture"][:4] == b"\x89PNG"
    assert "none.png" in whole[4]["error"] and {n for n, e in whole.items() if "image" in e} == {0, 1, 6, 7}

    class Stop(Exception):
        pass

    def stop(more: int, total: int | None) -> None:
        if more == 1:
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            run_rows(pipe, rows, tmp_path / "b", place, seed=5, batch_size=1, tick=stop)
    with open(tmp_path / "b" / MANIFEST, "a") as file:
        file.write('{"number": 3, "wor')  # killed while it wrote
    assert run_rows(pipe, rows, tmp_path / "b", place, seed=5, batch_size=3) == 1
    lines = (tmp_path / "b" / MANIFEST).read_text().splitlines()
    (tmp_path / "b" / MANIFEST).write_text("\n".join(line for line in lines if line.endswith("}")) + "\n")
    assert entries(tmp_path / "b") == whole
    for rank in range(3):
        run_rows(pipe, rows, tmp_path / "c", place, seed=5, rank=rank, size=3)
    assert entries(tmp_path / "c") == whole
    before = (tmp_path / "c" / MANIFEST).read_text()
    assert run_rows(pipe, rows, tmp_path / "c", place, seed=5) == 1  # what was refused is tried again
    assert (tmp_path / "c" / MANIFEST).read_text().removeprefix(before).count("\n") == 1


def test_other_folders_and_files_are_refused(place, tmp_path):
    pipe, rows = tiny_pipeline(), [{"prompt": "a dog"}]
    run_rows(pipe, rows, tmp_path / "a", place)
    for changed in ({"seed": 1}, {"steps": 2}, {"about": {"model": "other"}}):
        with pytest.raises(ValueError, match="other prompts, options or weights"):
            run_rows(pipe, rows, tmp_path / "a", place, **changed)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_text("mine")
    with pytest.raises(ValueError, match="name a new one"):
        run_rows(pipe, rows, tmp_path / "photos", place)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["000000.png"]
    for line, said in (
        ("{", "line 1"),
        ("[]", "line 1"),
        ('{"prompt": 3}', "line 1"),
        ('{"prompts": "a"}', "'prompts'"),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(ValueError, match=said) as caught:
            read_rows(tmp_path / "bad.jsonl")
        assert "\n" not in str(caught.value)


def test_the_command_shares_a_file_among_processes(place, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "unidiff"]
    command += ["generate", "--prompts", str(place / "lines.jsonl"), "--out", str(tmp_path / "out"), "--seed", "5"]
    command += ["--model", str(place / "model"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert "manifest.jsonl: 4 rows" in done.stdout and "4 rows, 1 refused" in done.stdout, done.stderr
    run_rows(tiny_pipeline(), LINES, tmp_path / "alone", place, seed=5)
    assert entries(tmp_path / "out") == entries(tmp_path / "alone")
    assert tiny_pipeline().image_size == SIZE


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no prompts; write one in each line"):
        read_rows(tmp_path / "empty.txt")


def test_the_manifest_says_which_options_and_versions(place, tmp_path, monkeypatch):
    pipe, rows = tiny_pipeline(), [{"prompt": "a dog"}]
    run_rows(pipe, rows, tmp_path / "a", place, seed=5, steps=2)
    head, row = map(json.loads, (tmp_path / "a" / MANIFEST).read_text().splitlines())
    assert (
        head["options"] == {"steps": 2} and head["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )
    assert head["versions"]["device"] == "cpu" and row["seed"] == row_seeds(5, 1).tolist()[0]
    monkeypatch.setattr("unidiff.pipelines.batch.versions", lambda device: {"torch": "other"})
    for _ in range(2):
        run_rows(pipe, rows, tmp_path / "a", place, seed=5, steps=2)
    *_, last = map(json.loads, (tmp_path / "a" / MANIFEST).read_text().splitlines())
    lines = (tmp_path / "a" / MANIFEST).read_text().splitlines()
    assert last == {"versions": {"torch": "other"}} and len(lines) == 3  # it went on, and says with what, once
