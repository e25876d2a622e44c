"""Train a masked diffusion transformer on text and image tokens.

    python training/pretrain.py configs/emoji.yaml [key=value ...]

Run the same command again to continue from the newest checkpoint. The averaged weights land in OUTPUT/model.
Several processes share a run, each with a slice of the batch, under torchrun:

    torchrun --nproc-per-node 8 training/pretrain.py configs/emoji.yaml parallel.mode=fsdp [key=value ...]

Any number of processes can continue the run of any other number.
"""

from __future__ import annotations

import os
import sys

# Read once when torch loads: threads that wait on a shared machine must sleep, not spin (three times the throughput when
# other work runs), and bf16 kernels are cached per shape.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

from unidiff.train.config import TrainConfig, read_config


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    try:
        return train(read_config(arguments[0], arguments[1:]))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(config: TrainConfig) -> int:
    from unidiff.train.build import pick_device
    from unidiff.train.datasets import open_sources
    from unidiff.train.distributed import Launch, Parallel
    from unidiff.train.samples import sheet_sampler
    from unidiff.train.trainer import Trainer, TrainingAborted

    names, launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), None
    if all(name in os.environ for name in names):  # set by torchrun
        rank, size, local, address, port = (os.environ[name] for name in names)
        launch = Launch(int(rank), int(size), int(local), address, int(port))
    parallel = Parallel(pick_device(config.device), config.parallel, launch)
    try:
        with parallel.main_first():  # raw shards are encoded once
            source, validation = open_sources(config)
        Trainer(config, source, validation, sheet_sampler(config, source), parallel).train()
    except TrainingAborted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        parallel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
