"""Train an image tokenizer from a YAML file:

    python tokenizers/train_image_tokenizer.py configs/emoji_tokenizer.yaml [key=value ...]

Writes a folder that `VQImageTokenizer.from_pretrained` loads, `report.json` (PSNR, SSIM, code usage) and
`reconstructions.png` (pictures above, their reconstructions below).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unidiff.config import load_config
from unidiff.process import keep_freed_memory
from unidiff.train.vq_trainer import ImageTokenizerConfig, train_image_tokenizer


def main(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/emoji_tokenizer.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for instance steps=100")] = None,
) -> None:
    keep_freed_memory()
    try:
        train_image_tokenizer(load_config(ImageTokenizerConfig, config, overrides or []))
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
