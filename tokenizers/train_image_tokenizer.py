"""Train an image tokenizer from a YAML file:

    python tokenizers/train_image_tokenizer.py configs/emoji_tokenizer.yaml [key=value ...]

Writes into `out`: `model`, which `VQImageTokenizer.from_pretrained` loads, `report.json` (PSNR, SSIM, code usage on pictures
that were not trained on), `reconstructions.png` (pictures above, their reconstructions below), `metrics.jsonl` and
`checkpoints`. The same command continues a run that was stopped or killed, bit for bit. The model with the best PSNR is kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from unidiff.config import load_config
from unidiff.errors import exit_status
from unidiff.process import set_up_process
from unidiff.train.image_tokenizer.config import ImageTokenizerConfig

set_up_process(os.environ)


def main(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/emoji_tokenizer.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for instance steps=100")] = None,
) -> None:
    settings = load_config(ImageTokenizerConfig, config, overrides or [])
    from unidiff.train.image_tokenizer.trainer import train_image_tokenizer

    train_image_tokenizer(settings)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: typer.run(main), failed=2))
