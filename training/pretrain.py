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

from unidiff.process import asks_for_help, exit_status, set_up_process
from unidiff.train.config import read_config

set_up_process(os.environ)


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments, __doc__):
        return 0 if arguments else 2

    def run() -> int:
        config = read_config(arguments[0], arguments[1:])
        from unidiff.train.trainer import train

        return train(config, os.environ)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
