"""Runs of the training recipe in processes of their own, forked from one process that has imported torch once.

`forked(folder, runs)` starts that process and returns what it reports. A run may have several ranks, as torchrun would set
them up, and may be killed (at a random moment, or while a checkpoint or an export is being written), asked to stop, or fail on
a disk that takes no more.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "training" / "pretrain.py"
CLOCKS = ("time", "seconds_per_step", "tokens_per_second", "tflops", "data_wait")
IMPORTED_ONCE = ("torch.distributed.checkpoint", "unidiff.train.data.datasets", "unidiff.train.trainer")


def forked(folder: Path, runs: list[dict[str, Any]], timeout: float = 1500) -> list[dict[str, Any]]:
    """Do `runs` one after the other; returns for each `codes` (exit status per rank), `errors` (what the ranks said on stderr)
    and `saving` (died in a save).

    Args:
        folder: for the messages to and from the process.
        runs: dicts with `arguments` (overrides, one of them `output=`), `ranks` (default 1), and `end`: None, "kill" (at
            a random moment of training), "kill saving", "kill exporting", "kill early" (before the log is opened), or
            "stop N" (SIGTERM to rank 0 alone after step N). `limit`: bytes that a file may have; such a run may fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.yaml").write_text("seed: 3\n")
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "results.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, str(folder)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert process.returncode == 0, process.stdout[-4000:]
    results = json.loads((folder / "results.json").read_text())
    for run, result in zip(runs, results, strict=True):
        if not (run.get("end") or "").startswith("kill") and "limit" not in run:
            assert set(result["codes"]) == {0}, (run, result["errors"], process.stdout[-4000:])
    return results


def start(folder: Path, table: Path, *overrides: str) -> subprocess.Popen:
    """The recipe on `table` as a process of its own."""
    from train_fixtures import MIXED, TINY

    config = folder.parent / "config.yaml"
    config.write_text("seed: 3\n")
    arguments = [*TINY, *MIXED, f"output={folder}", f"data.train={table}", "accumulate=2", *overrides]
    return subprocess.Popen(
        [sys.executable, str(RECIPE), str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the log shows `step`."""
    metrics = folder / "metrics.jsonl"
    for _ in range(2400):
        if metrics.is_file() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines()):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def check_same_runs(tmp_path: Path, steps: int) -> None:
    """The runs in `whole` and `cut` hold the same numbers and the same log, and nothing half-written."""
    import torch
    from safetensors.torch import load_file

    for part in (f"checkpoints/step-{steps:08d}", "model"):
        expected, found = ({}, {})
        for run, tensors in (("whole", expected), ("cut", found)):
            for path in sorted((tmp_path / run / part).rglob("*.safetensors")):
                place = "shards" if path.parent.name == "shards" else path.name
                for name, value in load_file(path).items():  # ranks share replicated tensors out in any order
                    tensors.setdefault((place, name), []).append(value)
        assert expected and {k: len(v) for k, v in expected.items()} == {k: len(v) for k, v in found.items()}
        for key, pieces in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(pieces, found[key], strict=True)), key
    logs = [
        [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in text.splitlines()]
        for text in ((tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut"))
    ]
    assert logs[0] == logs[1]  # no step twice, none lost
    strays = [p.name for p in (tmp_path / "cut").rglob(".*")]
    assert not strays  # what killed processes left half-written is gone


def recipe_main():
    """`main` of the recipe, without a process of its own."""
    before = dict(os.environ)
    spec = importlib.util.spec_from_file_location("pretrain_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)
    return module.main


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("pretrain_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    chance = random.Random(7)
    runs = json.loads((folder / "runs.json").read_text())
    results = [_run(recipe.main, folder, run, chance) for run in runs]
    (folder / "results.json").write_text(json.dumps(results))


def _run(recipe: Any, folder: Path, run: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    ranks, end = run.get("ranks", 1), run.get("end") or ""
    output = Path(next(a.partition("=")[2] for a in run["arguments"] if a.startswith("output=")))
    before = set(_half_written(output))
    log = _Log(output / "metrics.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, said = str(folder / "empty.yaml"), [os.pipe() for _ in range(ranks)]
    children = [
        _fork(recipe, [config, *run["arguments"]], (rank, ranks, port), said[rank], run.get("limit"))
        for rank in range(ranks)
    ]
    if end.startswith("stop"):
        log.wait_for_step(int(end.split()[1]))
        os.kill(children[0], signal.SIGTERM)
    elif end == "kill early":
        time.sleep(chance.uniform(0, 0.15))
        for child in children:
            os.kill(child, signal.SIGKILL)
    elif end:
        log.wait_until_opened()
        if end in ("kill saving", "kill exporting"):
            wanted = "*" if end == "kill saving" else ".model*"
            while not {p for p in set(_half_written(output)) - before if p.match(wanted)} and not log.late:
                time.sleep(0.0002)
            time.sleep(0.02 * chance.random() ** 4)  # mostly at once: a fast disk needs milliseconds for a save
        else:
            log.wait_for_lines(chance.randint(0, 4))
            time.sleep(chance.uniform(0, 0.03))
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    errors = [_read_all(*pipe) for pipe in said]
    return {"codes": codes, "errors": errors, "saving": bool(set(_half_written(output)) - before)}


def _read_all(source: int, other_end: int) -> str:
    os.close(other_end)
    with open(source, encoding="utf-8") as pipe:
        return pipe.read()


def _fork(
    recipe: Any, arguments: list[str], place: tuple[int, int, int], said: tuple[int, int], limit: int | None
) -> int:
    child = os.fork()
    if child:
        return child
    code, (rank, ranks, port) = 70, place
    try:
        os.dup2(said[1], 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = recipe(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _half_written(output: Path) -> list[Path]:
    return [*output.glob("checkpoints/.step-*"), *output.glob("checkpoints/.latest*"), *output.glob(".model*")]


class _Log:
    """The metrics file of a run, which a process that starts or resumes makes or replaces."""

    def __init__(self, path: Path) -> None:
        self.path, self.deadline, self.lines = path, time.monotonic() + 120, 0
        self.before = self._inode()

    def _inode(self) -> int:
        return self.path.stat().st_ino if self.path.is_file() else 0

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wait_until_opened(self) -> None:
        while self._inode() in (0, self.before) and not self.late:
            time.sleep(0.001)
        self.lines = self.path.read_bytes().count(b"\n")

    def wait_for_lines(self, count: int) -> None:
        while self.path.read_bytes().count(b"\n") < self.lines + count and not self.late:
            time.sleep(0.001)

    def wait_for_step(self, step: int) -> None:
        while not self.late:
            if self.path.is_file() and f'"step": {step},' in self.path.read_text():
                return
            time.sleep(0.005)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
