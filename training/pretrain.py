"""Train a masked diffusion transformer on text and image tokens.

    python training/pretrain.py configs/emoji.yaml [key=value ...]

Run the same command again to continue from the newest checkpoint. The averaged weights land in OUTPUT/model.
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
    from unidiff.train.datasets import open_sources
    from unidiff.train.samples import sheet_sampler
    from unidiff.train.trainer import Trainer, TrainingAborted

    source, validation = open_sources(config)
    trainer = Trainer(config, source, validation, sheet_sampler(config, source))
    try:
        trainer.train()
    except TrainingAborted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
