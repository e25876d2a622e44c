"""Runs of the image tokenizer's training in forked processes that are killed at random moments.

`python tests/killed_tokenizer.py OUT KILLS SEED` starts the run in OUT again and again, kills it KILLS times, and lets it end.
Prints how many of the kills fell into the writing of a checkpoint or a model.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from unidiff.train.image_tokenizer.config import CellCodes, ImageData, ImageTokenizerConfig
from unidiff.train.image_tokenizer.trainer import train_image_tokenizer


def config(out: Path, **changes) -> ImageTokenizerConfig:
    """A run of seconds with everything that has a state: codes of cells first or not, revival, validation, best model."""
    values = dict(
        out=str(out), data=ImageData(world="emoji", validation_images=8), steps=30, batch_size=4, warmup_steps=3,
        model=dict(codebook_size=64, encoder_width=16, encoder_depth=1, decoder_widths=[16], decoder_depths=[1]),
        log_every=1, validate_every=6, checkpoint_every=4, threads=1, device="cpu",
    )  # fmt: skip
    return ImageTokenizerConfig(**{**values, **changes})


def with_cells(out: Path) -> ImageTokenizerConfig:
    model = dict(encoder_width=16, encoder_depth=1, decoder_widths=[16], decoder_depths=[1])
    return config(out, cells=CellCodes(10, 32), model=model, steps=14, validate_every=4)


def _half_written(out: Path) -> set[str]:
    return {
        p.name for pattern in ("checkpoints/.step-*", ".model.*", "checkpoints/.latest*") for p in out.glob(pattern)
    }


def main(out: Path, kills: int, seed: int) -> None:
    chance, saving = random.Random(seed), 0
    for number in range(kills + 1):
        make = with_cells if "cells" in out.name else config
        child = os.fork()
        if not child:
            code = 70
            try:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                train_image_tokenizer(make(out))
                code = 0
            finally:
                os._exit(code)
        if number < kills:
            deadline = time.monotonic() + 60
            while not (out / ".lock").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            before = _half_written(out)
            if chance.random() < 0.5:  # in the middle of a save, where one comes in time
                end = time.monotonic() + 2
                while not _half_written(out) - before and time.monotonic() < end:
                    time.sleep(0.0002)
                time.sleep(0.01 * chance.random() ** 4)
            else:
                time.sleep(chance.uniform(0.0, 0.5))
            os.kill(child, signal.SIGKILL)
            saving += bool(_half_written(out) - before)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if number == kills else status) and status in (0, -signal.SIGKILL), status
    print(saving)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
