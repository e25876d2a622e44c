"""From `DataConfig` to the training and validation token sources."""

from __future__ import annotations

from pathlib import Path

from unidiff.train.config import TrainConfig
from unidiff.train.source import TokenTable


def open_sources(config: TrainConfig) -> tuple[TokenTable, TokenTable | None]:
    """The training table and the held-out one (None when `validation_rows` is 0 and no file is named).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: nothing is configured, the two disagree, or too few rows are left for training.
    """
    data = config.data
    if not data.train:
        raise ValueError("data.train is empty; name a token table (.safetensors) or shards")
    table = _open(data.train)
    held_out = None
    if data.validation:
        held_out = _open(data.validation)
        if held_out.vocabulary != table.vocabulary or held_out.grid != table.grid:
            raise ValueError(f"{data.validation!r} has another vocabulary or grid than {data.train!r}")
    elif data.validation_rows:
        if data.validation_rows >= len(table):
            raise ValueError(
                f"data.validation_rows = {data.validation_rows} leaves nothing of {len(table)} rows to train on"
            )
        table, held_out = table.split(data.validation_rows)
    return table.seeded(config.seed, phases(config)), held_out


def phases(config: TrainConfig) -> tuple[tuple[int, int], ...] | None:
    """The curriculum in global sample indices."""
    total = config.steps * config.rows_per_step
    return tuple((round(float(share) * total), int(level)) for share, level in config.data.curriculum) or None


def _open(pattern: str) -> TokenTable:
    if Path(pattern).suffix == ".safetensors":
        return TokenTable.load(pattern)
    raise ValueError(f"data source {pattern!r} must end in .safetensors")
