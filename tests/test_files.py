"""Files and folders appear complete or not at all."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from unidiff.errors import explain
from unidiff.files import check_writable, filling_folder, locked, replacing, replacing_folder


def test_a_file_is_replaced_as_a_whole_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stray, other = tmp_path / f".a.txt.{ended.pid}.tmp", tmp_path / f".a.txt.{os.getppid()}.tmp"
    for path in (stray, other):
        path.write_text("half")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.txt", other.name])


def test_a_folder_is_replaced_as_a_whole_or_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for word in ("one", "two"):
        with replacing_folder(target) as temporary:
            (temporary / word).write_text(word)
    (tmp_path / ".model.123.tmp").mkdir()  # left by a killed process
    with pytest.raises(RuntimeError), replacing_folder(target) as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["two"]
    with replacing_folder(target) as temporary:
        (temporary / "three").write_text("3")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "a device or a pipe"),
        (tmp_path / "link", "a device or a pipe"),
        (Path("/dev/full"), "a device or a pipe"),
        (tmp_path / "file" / "a.json", "lies under"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            check_writable(path)
        with pytest.raises((ValueError, OSError)), replacing(path) as temporary:
            temporary.write_text("y")
    check_writable(None)
    check_writable(tmp_path / "new" / "a.json")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*")) and not Path("/dev/full").is_file()
    with pytest.raises(OSError, match="too long"):
        check_writable(tmp_path / ("n" * 300))


def test_links_are_written_through(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for name, there in (("file", True), ("later", False)):
        target = disk / f"{name}.txt"
        if there:
            target.write_text("old")
        (tmp_path / name).symlink_to(f"disk/{name}.txt")  # relative
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("new")
        assert (tmp_path / name).is_symlink() and target.read_text() == "new" and not target.is_symlink()
    for name, there in (("folder", True), ("dangling", False)):
        target = disk / name
        if there:
            target.mkdir()
            (target / "old").write_text("old")
        (tmp_path / f"{name} link").symlink_to(target)
        (tmp_path / f"{name} chain").symlink_to(tmp_path / f"{name} link")
        with replacing_folder(tmp_path / f"{name} chain") as temporary:
            assert temporary.parent == disk  # on the disk that the link leads to
            (temporary / "new").write_text("new")
        assert (tmp_path / f"{name} chain").is_symlink() and (tmp_path / f"{name} link").is_symlink()
        assert [p.name for p in target.iterdir()] == ["new"]
    assert sorted(p.name for p in disk.iterdir()) == ["dangling", "file.txt", "folder", "later.txt"]


def test_a_link_to_another_disk(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=shared) as other:
        (tmp_path / "model").symlink_to(Path(other) / "deep" / "model")
        for word in ("one", "two"):
            with replacing_folder(tmp_path / "model") as temporary:
                (temporary / word).write_text(word)
            assert [p.name for p in (Path(other) / "deep" / "model").iterdir()] == [word]
        with filling_folder(tmp_path / "model") as temporary:
            (temporary / "three").write_text("3")
        (tmp_path / "model" / "four").symlink_to(tmp_path / "four.txt")  # back to the first disk
        with filling_folder(tmp_path / "model") as temporary:
            (temporary / "four").write_text("4")
        assert (tmp_path / "four.txt").read_text() == "4"
        assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["four", "three", "two"]


def test_links_that_go_round_in_circles_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    for name in ("a", "self"):
        for write in (replacing, replacing_folder, filling_folder):
            with pytest.raises(OSError) as caught, write(tmp_path / name):
                pass
            assert explain(caught.value) == f"{str(tmp_path / name)!r}: the links go round in circles"
    assert (tmp_path / "a").is_symlink() and (tmp_path / "self").is_symlink()


def test_only_leftovers_of_exactly_this_name_go(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = ("model", "model.v2", "mo*el", "mo[d]el", "m?del", "model-best", "модель", "a b")
    strays = {name: tmp_path / f".{name}.{ended.pid}.tmp" for name in names}
    for name in names:
        for stray in strays.values():
            stray.mkdir(exist_ok=True)
        with replacing_folder(tmp_path / name) as temporary:
            (temporary / "x").write_text(name)
        left = {p.name for p in tmp_path.iterdir() if p.name.startswith(".")}
        assert left == {stray.name for other, stray in strays.items() if other != name}
    alike = (".model.tmp", ".model.12x.tmp", ".model.1.tmpx", "model.1.tmp", ".model.1.bak", ".model..tmp")
    for stray in alike:
        (tmp_path / stray).write_text("mine")
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "x").write_text("x")
    assert all((tmp_path / stray).read_text() == "mine" for stray in alike)


def test_what_another_machine_or_a_live_process_writes_stays(tmp_path: Path) -> None:
    host = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, elsewhere = (tmp_path / f".model.{where}-{ended.pid}.tmp" for where in (host, "another"))
    alive = tmp_path / f".model.{host}-{os.getppid()}.tmp"
    for path in (mine, elsewhere, alive):
        path.mkdir()
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "x").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([elsewhere.name, alive.name, "model"])


def test_a_folder_set_aside_by_a_killed_process_comes_back_first(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".model.{ended.pid}.old").mkdir()
    (tmp_path / f".model.{ended.pid}.old" / "kept").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "kept").read_text() == "old"


def test_filling_keeps_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), filling_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"notes": "mine", "a": "old"}
    with filling_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "b").write_text("new")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"notes": "mine", "a": "new", "b": "new"}


def test_where_nothing_can_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for write in (replacing, replacing_folder, filling_folder):
        with pytest.raises(OSError) as caught, write(tmp_path / "file" / "deep" / "model"):
            pass
        assert str(tmp_path / "file") in str(explain(caught.value))
        with pytest.raises(ValueError, match="root of a disk"), write("/"):
            pass
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with replacing_folder(".") as temporary:
        (temporary / "x").write_text("x")
    assert (tmp_path / "empty" / "x").read_text() == "x" and (tmp_path / "file").read_text() == "mine"


def test_who_may_read_a_file_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "secret").write_text("old")
    for path in (tmp_path / "secret", tmp_path / "folder" / "secret"):
        path.chmod(0o600)
    (tmp_path / "folder").chmod(0o700)
    with replacing(tmp_path / "secret") as temporary:
        temporary.write_text("new")
    with filling_folder(tmp_path / "folder") as temporary:
        (temporary / "secret").write_text("new")
    assert [oct((tmp_path / p).stat().st_mode & 0o777) for p in ("secret", "folder/secret")] == ["0o600"] * 2
    with replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "x").write_text("new")
    assert oct((tmp_path / "folder").stat().st_mode & 0o777) == "0o700"


def test_home_folders_are_not_made_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~/x.json", "~", "~someone/a/b"):
        with pytest.raises(ValueError, match="write the whole path"):
            check_writable(name)
        with pytest.raises(ValueError, match="write the whole path"), replacing(name) as temporary:
            temporary.write_text("y")
        with pytest.raises(ValueError, match="write the whole path"), locked(name):
            pass
    with replacing("~backup.txt") as temporary:
        temporary.write_text("y")
    (tmp_path / "a").symlink_to("a")
    with pytest.raises((OSError, RuntimeError)) as error:
        (tmp_path / "a" / "b").resolve(strict=True)
    assert "go round in circles" in str(explain(error.value))
    assert [p.name for p in tmp_path.iterdir() if p.name != "a"] == ["~backup.txt"]


def test_a_disk_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("unidiff.files.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="knows no locks; make sure yourself"), locked(tmp_path / "run", "training"):
        assert (tmp_path / "run" / ".lock").is_file()
    assert not (tmp_path / "run" / ".lock").exists()


def test_what_lies_in_the_place_of_the_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for name, make in {
        "link": lambda path: path.symlink_to(tmp_path / "mine.txt"),
        "dangling": lambda path: path.symlink_to(tmp_path / "nothing"),
        "folder": lambda path: path.mkdir(),
        "pipe": lambda path: os.mkfifo(path),
        "notes": lambda path: path.write_text("process 5 of my diet"),
    }.items():
        (tmp_path / name).mkdir()
        lock = tmp_path / name / ".lock"
        make(lock)
        with (
            pytest.raises(ValueError, match=r"\.lock' is .*; move it, or name another folder"),
            locked(tmp_path / name),
        ):
            raise AssertionError
        assert os.path.lexists(lock)
    assert (tmp_path / "mine.txt").read_text() == "precious" and not (tmp_path / "nothing").exists()
    assert (tmp_path / "notes" / ".lock").read_text() == "process 5 of my diet"
    for left in ("", "process 1 on elsewhere (training)\n"):  # of a run that was killed
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / ".lock").write_text(left)
        with locked(tmp_path / "run", "encoding"):
            assert (tmp_path / "run" / ".lock").read_text().endswith(" (encoding)\n")


def test_no_lock_is_left_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as error, locked(tmp_path / "run"):
            raise AssertionError
    assert str(tmp_path / "run") in str(explain(error.value))
    assert not any((tmp_path / "run").iterdir())
