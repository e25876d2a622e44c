"""Train a finished model on, whole or through low-rank adapters, and save it as a pipeline again.

    python training/finetune.py MODEL [CONFIG.yaml] data.train=TOKENS output=FOLDER [lora.rank=16] [key=value ...]

MODEL is a pipeline folder, `emoji`, a hub name, or a folder with a transformer alone. Its architecture and tokenizers are
taken over; settings are those of training/pretrain.py. Run the same command again to continue from the newest checkpoint.
The averaged weights, adapters folded in, land in OUTPUT/model, and with the model's tokenizers in OUTPUT/pipeline.
Works under torchrun like training/pretrain.py.
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
    name, *rest = arguments
    path = rest.pop(0) if rest and "=" not in rest[0] else None

    def run() -> int:
        config = read_config(path, rest)
        from unidiff.hub import locate
        from unidiff.train.finetune import finetune

        return finetune(locate(name), config, os.environ)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
