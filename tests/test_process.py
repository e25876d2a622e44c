"""What a process sets up, and the clock of its measurements."""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys

import pytest
import torch

from unidiff.process import clock, free_memory, parsed, timed

PROGRAM = """
import resource, sys
import numpy as np
from unidiff.process import keep_freed_memory
assert keep_freed_memory()
def work():
    parts = [np.ones(3_000_000) for _ in range(4)]  # 24 MB each
    return sum(float(x[0]) for x in parts)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_memory_that_was_freed_is_used_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20 * 4 * 24_000_000 / 4096 / 100  # of the pages, fewer than one in a hundred anew


def test_a_word_without_a_value_is_refused(capsys):
    parser = argparse.ArgumentParser(prog="recipe")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--lr", type=float)
    assert vars(parsed(parser, ["a", "--lr", "1", "b"])) == {"words": ["a", "b"], "lr": 1.0}
    with pytest.raises(SystemExit) as left:
        parsed(parser, ["--lr=--"])
    assert left.value.code == 2 and "--lr has no value" in capsys.readouterr().err


def test_free_memory_is_a_number_of_bytes():
    assert free_memory() is None or free_memory() > 2**20


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_a_clock_is_read_when_the_device_is_idle(monkeypatch, kind):
    """Both timers, of decodes and of training, go by it."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    found, seconds = timed(lambda: len(waited), torch.device(kind, 0))
    assert found == 1 and seconds >= 0 and waited == [torch.device(kind, 0)] * 2
    timed(lambda: None, torch.device("cpu"))
    assert clock(torch.device("meta")) > 0 and len(waited) == 2


def test_a_cpu_is_never_busy():
    assert timed(lambda: 3, torch.device("cpu"))[0] == 3
