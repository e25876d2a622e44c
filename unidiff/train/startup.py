"""How a training recipe starts and ends: threads and memory, the processes of `torchrun`, errors as one line. Free of torch until needed.

Recipes hand over `os.environ`; nothing in here looks at it by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING

from unidiff.process import keep_freed_memory

if TYPE_CHECKING:
    from unidiff.train.config import TrainConfig
    from unidiff.train.distributed import Launch
    from unidiff.train.source import TokenSource

_READ_ONCE = {
    # threads that wait on a shared machine must sleep, not spin: three times the throughput when other work runs
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",  # bf16 kernels are cached per shape
}


def set_up_process(environment: MutableMapping[str, str]) -> None:
    """Fill in what torch reads when it loads, where the person has not, and keep freed memory; to be called before that."""
    keep_freed_memory()
    for name, value in _READ_ONCE.items():
        environment.setdefault(name, value)


def asks_for_help(arguments: list[str], text: str | None) -> bool:
    """Print the recipe's own docstring when it is called with nothing or with `--help`."""
    if arguments and arguments[0] not in ("-h", "--help"):
        return False
    print((text or "").strip())
    return True


def exit_status(run: Callable[[], int | None], *expected: type[Exception]) -> int:
    """What `run` returns (None counts as 0), or 2 after one line about what a person can mend.

    Args:
        expected: errors that are such, besides ValueError and FileNotFoundError.
    """
    mendable: tuple[type[Exception], ...] = (ValueError, FileNotFoundError, *expected)
    try:
        return run() or 0
    except mendable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """This process among those that `torchrun` started; None when it did not."""
    from unidiff.train.distributed import Launch

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in environment for name in names):
        return None
    rank, size, local, address, port = (environment[name] for name in names)
    return Launch(int(rank), int(size), int(local), address, int(port))


def train(
    config: TrainConfig,
    environment: Mapping[str, str],
    check: Callable[[TokenSource], None] | None = None,
    finish: Callable[[], None] | None = None,
) -> int:
    """A run of `config` on its data, by this process and those that `torchrun` started with it.

    Args:
        check: sees the training tokens first, and raises ValueError for those that do not fit.
        finish: called by one process when the run is at its end or was stopped.

    Returns:
        0, or 1 after one line when the run had to be aborted.

    Raises:
        ValueError, FileNotFoundError: settings, data or a checkpoint that do not fit.
    """
    from unidiff.train.build import pick_device
    from unidiff.train.datasets import open_documents, open_sources
    from unidiff.train.distributed import Parallel
    from unidiff.train.samples import sheet_sampler
    from unidiff.train.trainer import Trainer, TrainingAborted

    parallel = Parallel(pick_device(config.device), config.parallel, launch_of(environment))
    try:
        with parallel.main_first():  # raw shards are encoded once
            source, validation = open_sources(config)
        if check is not None:
            check(source)
        documents = open_documents(config)
        Trainer(config, source, validation, sheet_sampler(config, source), parallel, documents).train()
        if finish is not None and parallel.main:
            finish()
    except TrainingAborted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        parallel.close()
    return 0
