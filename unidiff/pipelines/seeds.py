"""One seed per row from what people pass as `generator`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.diffusion.noise import keyed_bits
from unidiff.pipelines.arguments import kind_of

RowGenerator = int | torch.Generator | Sequence[int | torch.Generator] | None
_LARGEST = (1 << 62) - 1
_CANDIDATE_STREAM = 7


def row_seeds(generator: RowGenerator, rows: int, per_entry: int = 1) -> Tensor:
    """int64 `[rows]`, non-negative.

    Args:
        generator: None for fresh seeds from the system; an int, from which every row gets its own; a torch generator,
            which draws one seed per row; or a list of ints (used as they are) and generators, one per row or one per
            entry.
        rows: rows of the batch, `per_entry` of them for each entry of the caller's list.

    Raises:
        ValueError: a list of another length, or an entry of another kind.
    """
    if generator is None:
        return torch.tensor([secrets.randbelow(_LARGEST) for _ in range(rows)])
    if isinstance(generator, torch.Generator):
        return torch.tensor([_draw(generator) for _ in range(rows)])
    if isinstance(generator, int) and not isinstance(generator, bool):
        return derived_seeds(_checked(generator), rows)
    if not isinstance(generator, list | tuple):
        raise ValueError(f"generator is {kind_of(generator)}; expected an int, a torch.Generator or a list")
    if len(generator) not in (rows, rows // per_entry):
        raise ValueError(f"generator lists {len(generator)} seeds for {rows} rows; give one per row")
    repeats = rows // len(generator)
    seeds: list[int] = []
    for entry in generator:
        if isinstance(entry, torch.Generator):
            seeds += [_draw(entry) for _ in range(repeats)]
        elif isinstance(entry, int) and not isinstance(entry, bool):
            seeds += [_checked(entry)] if repeats == 1 else derived_seeds(_checked(entry), repeats).tolist()
        else:
            raise ValueError(f"generator lists {kind_of(entry)}; expected ints and torch.Generators")
    return torch.tensor(seeds)


def _checked(seed: int) -> int:
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError("the seed (generator) does not fit into 64 bits; choose a smaller one")
    return seed


def derived_seeds(seed: int, rows: int) -> Tensor:
    """Row i's seed as a hash of (seed, i): rows of neighbouring seeds do not repeat each other."""
    return keyed_bits(seed, torch.arange(rows), 0, 1)[:, 0] & _LARGEST


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """int64 `[B * count]`: each row's own seed, then `count - 1` hashes of it."""
    numbers = torch.arange(1, count, device=seeds.device)
    more = keyed_bits(0, seeds[:, None] + numbers * 0x9E3779B97F4A7C1, _CANDIDATE_STREAM, 1)[..., 0] & _LARGEST
    return torch.cat([seeds[:, None], more], 1).flatten()


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(_LARGEST, (), generator=generator, device=generator.device))
