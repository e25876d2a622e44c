"""Many calls from a file: the same rows in any batch, on any number of processes, and after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.errors import DamagedFile
from unidiff.pipelines.batch import MANIFEST, begin_manifest, read_rows, run_rows
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
    for changed, said in (
        ({"seed": 1}, "seed = 0, here 1"),
        ({"steps": 2}, "steps = not given, here 2"),
        ({"about": {"model": "other", "dtype": "x"}}, 'dtype = not given, here "x"; model = not given, here "other"'),
    ):
        with pytest.raises(ValueError) as caught:
            run_rows(pipe, rows, tmp_path / "a", place, **changed)
        assert f"a' has {said}; use the same to continue it, or another folder (--out)" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"has prompts_hash = \"[0-9a-f]{12}\.\.\.\", here \"[0-9a-f]{12}\.\.\.\"; use"
    ):
        run_rows(pipe, [{"prompt": "two cats"}], tmp_path / "a", place)
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


def test_whatever_differs_from_the_run_in_a_folder_is_named(tmp_path):
    asked = {"seed": 1, "about": {"model": "a", "settings": {"text": {"steps": 8}}}, "options": {"cache": "dual"}}
    begin_manifest(tmp_path / "o", asked, "a test", "cpu")
    assert begin_manifest(tmp_path / "o", json.loads(json.dumps(asked)), "a test", "cpu") == []
    before = (tmp_path / "o" / MANIFEST).read_bytes()
    for names, value in (
        (("seed",), 2),
        (("about", "model"), "b"),
        (("about", "settings", "text", "steps"), 16),
        (("options", "cache"), None),
        (("options", "more"), 3.5),
    ):
        other = json.loads(json.dumps(asked))
        place = other
        for name in names[:-1]:
            place = place[name]
        old = json.dumps(place[names[-1]]) if names[-1] in place else "not given"
        place[names[-1]] = value
        said = f"{'.'.join(names[1:] or names)} = {old}, here {json.dumps(value)}; use the same"
        with pytest.raises(ValueError) as caught:
            begin_manifest(tmp_path / "o", other, "a test", "cpu")
        assert f"'{tmp_path / 'o'}' has {said}" in str(caught.value)
        del place[names[-1]]
        if old != "not given":
            with pytest.raises(ValueError, match="here not given; use the same"):
                begin_manifest(tmp_path / "o", other, "a test", "cpu")
    assert (tmp_path / "o" / MANIFEST).read_bytes() == before and len(list((tmp_path / "o").iterdir())) == 1
    for damage in (b"", b"[]\n", b"{}\n", b"\xff\n"):
        (tmp_path / "o" / MANIFEST).write_bytes(damage)
        with pytest.raises(DamagedFile, match="cannot be read as the manifest of a batch"):
            begin_manifest(tmp_path / "o", asked, "a test", "cpu")


def test_what_a_person_should_know_of_rows_is_said_and_kept(place, tmp_path):
    pipe, said = tiny_pipeline(), []
    pipe.texts.known_words = ["a", "dog", "two", "cats", "an", "owl", "what", "is", "it"]
    rows = [
        {"prompt": "a dog"},
        {"prompt": "a yak"},
        {"image": "p.png", "question": "what lynx?"},
        {"text": "an owl <mask>"},
        {"prompt": "an owl <mask> yak"},
        {"prompt": "a <mask"},
    ]
    for size in (1, 8):
        run_rows(pipe, rows, tmp_path / str(size), place, batch_size=size, say=said.append)
    lines = [(tmp_path / size / MANIFEST).read_text().splitlines()[1:] for size in "18"]
    assert sorted(lines[0]) == sorted(lines[1])
    notes = {entry["number"]: entry.get("notes") for entry in map(json.loads, lines[0])}
    assert [bool(notes[n]) for n in range(len(rows))] == [False, True, True, False, True, False]
    assert len(notes[1]) == 1 and "does not know the word 'yak'" in notes[1][0] and notes[1] == notes[4]
    assert len(said) == 2 and "\n" not in said[0]
    assert said[0].startswith("3 of 6 rows") and "does not know the words 'yak', 'lynx'" in said[0]
    quiet = []
    run_rows(pipe, rows[:1], tmp_path / "c", place, say=quiet.append)
    assert not quiet
    untrained = {"prompt": "a dog", "task": "text_to_image"}
    few = tiny_pipeline()
    few.layout = replace(few.layout, settings=replace(few.settings, tasks=("caption",)))
    run_rows(few, [untrained], tmp_path / "d", place, say=quiet.append)
    assert len(quiet) == 1 and "was not trained for text_to_image" in quiet[0]
    assert "was not trained" in json.loads((tmp_path / "d" / MANIFEST).read_text().splitlines()[1])["notes"][0]


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
