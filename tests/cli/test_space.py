"""Hundreds of command lines with right and wrong values everywhere: the work, or one sentence; nothing else is touched.

Seeds are the numbers of the command lines, so a failure names the line that repeats it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_lines import Line, make_line
from PIL import Image
from tiny_pipeline import tiny_parts, tiny_pipeline

FAST, SLOW, PROCESSES = 50, 1400, 30
SECONDS = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "model")
    return {"MODEL": str(folder / "model"), "MODEL-TRANSFORMER": str(folder / "model" / "transformer")}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """The folders `t`, `i` and `x` that `pack` puts together."""
    folder = tmp_path_factory.mktemp("parts")
    for part, name in zip(tiny_parts()[:3], "tix", strict=True):
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, parts) -> Iterator[Path]:
    """The working folder: everything the lines name, and nothing else."""
    folder = tmp_path_factory.mktemp("place")
    with _inside(folder):
        fill(folder, parts)
        yield folder


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fill(folder: Path, parts: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    white = np.zeros((16, 24), np.uint8)
    white[:, :8] = 1
    for name in ("in.png", "in.webp", "in.bmp", "old.png"):
        picture.save(folder / name)
    picture.convert("L").save(folder / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    picture.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.save(folder / "anim.gif", save_all=True, append_images=[picture.rotate(180)])
    Image.new("RGB", (100, 90)).save(folder / "large.png")
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    for name, values in (("mask", white * 255), ("mask01", white), ("dim", white * 3)):
        Image.fromarray(values).save(folder / f"{name}.png")
    Image.fromarray(white * 255).convert("1").save(folder / "mask1.png")
    Image.fromarray(white * 255).convert("RGBA").save(folder / "maskrgba.png")
    Image.fromarray(white.astype(np.uint16) * 65535).save(folder / "mask16.png")
    (folder / "huge.png").write_bytes(_huge_png())
    (folder / "cut.png").write_bytes((folder / "in.png").read_bytes()[:200])
    (folder / "words.png").write_text("no picture")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n%%Pages: 1\n(x) run\n")
    for name in ("folder.png", "folder.gif", "empty", "notes", "broken"):
        (folder / name).mkdir()
    (folder / "notes" / "diary.txt").write_text("mine")
    (folder / "broken" / "model_index.json").write_text('{"_class_name": ["UniDiffPipeline"]')
    for name in ("locked.png", "locked.json"):
        (folder / name).write_text("mine")
        (folder / name).chmod(0o444)
    for link, target in (
        ("loop.png", "loop.png"),
        ("full.png", "/dev/full"),
        ("full.gif", "/dev/full"),
        ("link.png", "old.png"),
    ):
        (folder / link).symlink_to(target)
    (folder / "linked-in.png").symlink_to("in.png")
    for link, file in (("hard.png", "in.png"), ("hard-old.png", "old.png")):
        os.link(folder / file, folder / link)
    os.mkfifo(folder / "fifo.png")
    from unidiff.evaluation.report import Estimate, EvaluationReport

    for name, cases in (("report", [True, True, False]), ("other", [True, False, False])):
        report = EvaluationReport(about={"seed": 0, "n": 3})
        report.add("categories.single_object", Estimate.share(cases))
        report.save(folder / f"{name}.json", True)
    os.link(folder / "report.json", folder / "hard-report.json")
    (folder / "list.json").write_text("[]")
    for name in "tix":
        (folder / name).symlink_to(parts / name)


def _huge_png() -> bytes:
    """144 megapixels in a few bytes: only its header is true."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1501) * 12_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below a folder with its content or its target."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def filled(line: Line, models: dict[str, str]) -> list[str]:
    words = [models.get(word, word) for word in line.words]
    return words + (["--model", models["MODEL"]] if line.model and words else [])


def check(line: Line, status: int, out: str, error: str, before: dict[str, object], after: dict[str, object]) -> None:
    shown = f"{line.words} ({line.spoiled}): status {status}\n{error[-600:]}"
    assert "Traceback" not in error and "Traceback" not in out, shown
    assert status in (0, 1, 2), shown
    assert (status == 0) == (line.spoiled is None) or _excused(line, status, error), shown
    if status == 1 and line.words[0] != "verify":
        sentences = [text for text in error.splitlines() if text.startswith("unidiff: ")]
        assert sentences and all(len(text) < 1200 for text in sentences), shown
    if status == 2 and line.words not in ([], ["eval"]):
        assert "Usage:" in error or "Error" in error, shown
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if status != 0:
        assert not changed, f"{shown}\nchanged {changed}"
    inputs = {"in.png", "hard.png", "in.webp", "mask.png", "words.png", "report.json", "other.json", "notes/diary.txt"}
    assert not changed & inputs, f"{shown}\nchanged {changed & inputs}"
    assert not [name for name in after if name.endswith((".tmp", ".old"))], f"{shown}: leftovers"


def _excused(line: Line, status: int, error: str) -> bool:
    """Right values that do not go together, or a wrong one that this line has no use for."""
    if line.words in ([], ["eval"]):
        return status == 2
    several = line.spoiled == "-o" and status == 0  # numbers in the names make other files of them
    if several:
        return any(
            name in "".join(line.words) for name in ("full.png", "fifo.png", "loop.png", "locked.png", "folder.png")
        )
    together = (
        "known in full",
        "nothing is left",
        "changes nothing at",
        "does not suit",
        "needs",
        "from 1 to",
        "same file",
    )
    return status == 1 and line.spoiled is None and any(words in error for words in together)


def clean(place: Path, before: dict[str, object], parts: Path) -> None:
    """Back to how the folder was."""
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    fill(place, parts)


def walk(numbers: range, run: Any, models: dict[str, str], place: Path, parts: Path) -> tuple[int, int]:
    """Lines that worked, and lines that were refused."""
    worked, before = 0, snapshot(place)
    for number in numbers:
        line = make_line(number)
        with _limit(SECONDS):
            status, out, error = run(*filled(line, models))
        after = snapshot(place)
        check(line, status, out, error, before, after)
        worked += status == 0
        if after != before:
            clean(place, before, parts)
            before = snapshot(place)
    return worked, len(numbers) - worked


def test_lines_work_or_give_a_sentence(run, models, place, parts):
    worked, refused = walk(range(FAST), run, models, place, parts)
    assert worked > FAST / 8 and refused > FAST / 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(7))
def test_many_lines_work_or_give_a_sentence(run, models, place, parts, part):
    size = SLOW // 7
    start = FAST + part * size
    worked, refused = walk(range(start, start + size), run, models, place, parts)
    assert worked > size / 8 and refused > size / 4


@pytest.mark.slow
def test_lines_as_processes(models, place, parts):
    before = snapshot(place)
    for number in range(10_000, 10_000 + PROCESSES):
        line = make_line(number)
        words = [sys.executable, "-m", "unidiff", *filled(line, models)]
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=120, stdin=subprocess.DEVNULL
        )
        after = snapshot(place)
        check(line, done.returncode, done.stdout, done.stderr, before, after)
        if after != before:
            clean(place, before, parts)
            before = snapshot(place)
