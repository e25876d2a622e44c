"""How a training recipe starts and ends: threads and memory, the processes of `torchrun`, errors as one line.

Free of torch until needed. Recipes hand over `os.environ`; nothing in here looks at it by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff import errors
from unidiff.process import keep_freed_memory

if TYPE_CHECKING:
    from unidiff.train.config import TrainConfig
    from unidiff.train.data.source import TokenSource
    from unidiff.train.run.distributed import Launch

exit_status = partial(errors.exit_status, failed=2)
"""`unidiff.errors.exit_status` with the recipes' own status after a sentence."""

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


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """This process among those that `torchrun` started; None when it did not.

    Raises:
        ValueError: numbers that are none, or do not fit each other.
    """
    from unidiff.train.run.distributed import Launch

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    if not all(name in environment for name in (*names, "MASTER_ADDR")):
        return None
    for name in names:
        if not (environment[name].isascii() and environment[name].isdigit()):
            raise ValueError(f"{name} is {environment[name]!r}; torchrun sets it to a number")
    rank, size, local, port = (int(environment[name]) for name in names)
    if not (rank < size and local < size and 0 < port < 2**16):
        raise ValueError(
            f"RANK {rank}, LOCAL_RANK {local}, WORLD_SIZE {size} and MASTER_PORT {port} do not fit together"
        )
    return Launch(rank, size, local, environment["MASTER_ADDR"], port)


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
    from unidiff.train.config import check_config
    from unidiff.train.data.datasets import open_documents, open_sources
    from unidiff.train.data.samples import sheet_sampler
    from unidiff.train.run.distributed import Parallel, lost_peer
    from unidiff.train.run.run_folder import check_run_folder
    from unidiff.train.trainer import Trainer, TrainingAborted

    check_config(config)
    check_run_folder(Path(config.output), "output", config.checkpoint.init_from)
    parallel = Parallel(pick_device(config.device), config.parallel, launch_of(environment))
    try:
        with parallel.locked(Path(config.output), "training"):  # before anything is written or read there
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
    except RuntimeError as error:
        if parallel.size > 1 and lost_peer(error):
            raise ValueError("another process of this run has ended; it says why") from error
        raise
    finally:
        parallel.close()
    return 0
