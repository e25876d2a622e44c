"""Runs of the training recipe in processes of their own, forked from one process that has imported torch once.

`forked(folder, runs)` starts that process and returns what it reports. A run may have several ranks, as torchrun would set
them up, and may be killed (at a random moment, or while a checkpoint or an export is being written) or asked to stop.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "training" / "pretrain.py"
IMPORTED_ONCE = ("torch.distributed.checkpoint", "unidiff.train.datasets", "unidiff.train.trainer")


def forked(folder: Path, runs: list[dict[str, Any]], timeout: float = 1500) -> list[dict[str, Any]]:
    """Do `runs` one after the other; returns for each `codes` (exit status per rank) and `saving` (died in a save).

    Args:
        folder: for the messages to and from the process.
        runs: dicts with `arguments` (overrides, one of them `output=`), `ranks` (default 1), and `end`: None, "kill" (at
            a random moment), "kill saving", or "stop N" (SIGTERM to rank 0 alone after step N).
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
        if not (run.get("end") or "").startswith("kill"):
            assert set(result["codes"]) == {0}, (run, process.stdout[-4000:])
    return results


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("pretrain_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    chance = random.Random(7)
    runs = json.loads((folder / "runs.json").read_text())
    results = [_run(recipe.main, str(folder / "empty.yaml"), run, chance) for run in runs]
    (folder / "results.json").write_text(json.dumps(results))


def _run(recipe: Any, config: str, run: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    ranks, end = run.get("ranks", 1), run.get("end") or ""
    output = Path(next(a.partition("=")[2] for a in run["arguments"] if a.startswith("output=")))
    before = set(_half_written(output))
    log = _Log(output / "metrics.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(recipe, [config, *run["arguments"]], rank, ranks, port) for rank in range(ranks)]
    if end.startswith("stop"):
        log.wait_for_step(int(end.split()[1]))
        os.kill(children[0], signal.SIGTERM)
    elif end:
        log.wait_until_opened()
        if end == "kill saving":
            while not set(_half_written(output)) - before and not log.late:
                time.sleep(0.0002)
            time.sleep(0.02 * chance.random() ** 4)  # mostly at once: a fast disk needs milliseconds for a save
        else:
            log.wait_for_lines(chance.randint(0, 4))
            time.sleep(chance.uniform(0, 0.03))
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "saving": bool(set(_half_written(output)) - before)}


def _fork(recipe: Any, arguments: list[str], rank: int, ranks: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = recipe(arguments)
        sys.stdout.flush()
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
