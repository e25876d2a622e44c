"""What a command or a recipe sets up once before torch loads, and how it ends. Importing unidiff does none of it."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_READ_ONCE = {
    # threads that wait on a shared machine must sleep, not spin: three times the throughput when other work runs
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",  # bf16 kernels are cached per shape
}
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt(3)


def set_up_process(environment: MutableMapping[str, str]) -> None:
    """Fill in what torch reads when it loads, where the person has not, and keep freed memory; to be called before that."""
    keep_freed_memory()
    for name, value in _READ_ONCE.items():
        environment.setdefault(name, value)


def keep_freed_memory() -> bool:
    """Let the process keep memory that it frees, up to 2 GiB, for its next tensors (glibc; elsewhere nothing changes).

    As it comes, glibc hands large freed blocks back to the system and gets them again page by page, which for small
    models is a fifth of the time of a decode and a tenth of that of a training step.

    Returns:
        Whether it took effect.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another libc, or no libc to look in
        return False
    wanted = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26, _MMAP_THRESHOLD: 2**25}  # 32 MiB is the most it takes
    return all([set_option(name, value) == 1 for name, value in wanted.items()])


def free_memory() -> int | None:
    """Bytes that new programs can use without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def versions(device: object = "cpu") -> dict[str, str]:
    """Versions of everything that decides about a result, and the name of the device."""
    import platform
    from importlib.metadata import version

    import torch

    names = ("unidiff", "torch", "torchvision", "transformers", "diffusers", "numpy", "pillow")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    place = torch.device(str(device))
    return found | {"device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type}


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        ValueError: another name, or a device that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    found = re.fullmatch(r"cpu|mps|cuda(?::(\d{1,4}))?", name)
    if found is None:
        raise ValueError(f"device {name!r} cannot be used here; use auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' cannot be used here; use cpu")
    if name.startswith("cuda") and int(found[1] or 0) >= count:
        there = f"there are {count} CUDA devices, numbered from 0" if count else "no CUDA device is there"
        raise ValueError(f"device {name!r} cannot be used here: {there}; use another, for instance cpu")
    return torch.device(name)


def clock(device: torch.device) -> float:
    """Seconds, read when all work that was handed to the device (CUDA, mps, xpu, ...) is done; a CPU has none waiting."""
    import torch

    there = torch.accelerator.current_accelerator(check_available=True)
    if there is not None and there.type == device.type:
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a call returns and its seconds, from one idle device to the next."""
    begun = clock(device)
    found = work()
    return found, clock(device) - begun


def parsed(parser: ArgumentParser, words: list[str] | None = None) -> Namespace:
    """`parser.parse_args(words)`, options and arguments in any order; `--name=--` is no value (argparse takes it for a list).

    Args:
        words: None for those of the command line.
    """
    words = sys.argv[1:] if words is None else words
    for word in words:
        if word.startswith("-") and word.endswith("=--"):
            parser.error(f"{word.removesuffix('=--')} has no value")
    return parser.parse_intermixed_args(words)
