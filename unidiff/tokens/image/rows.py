"""What goes into an image tokenizer and out of it, row by row: checks, and a generator for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.schema import check_value

_LARGEST = (1 << 62) - 1
RowDraws = torch.Generator | int | Tensor | Sequence[int | torch.Generator] | None
"""Where rows take their noise from, see `row_generators`."""


def check_images(images: Tensor, factor: int) -> None:
    """Raise `ValueError` unless `images` is float `[B, 3, H, W]` in [0, 1] with sides that `factor` divides."""
    check_value(images, Tensor, "the batch of images")
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; expected floats in [0, 1], so divide 8-bit values by 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W] (RGB)")
    height, width = images.shape[-2:]
    if height % factor or width % factor or not height or not width:
        raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}; resize or crop it")
    low, high = images.amin().item(), images.amax().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"image values span [{low:.3g}, {high:.3g}]; expected finite values in [0, 1]")


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise `ValueError` unless `codes` is integer `[B, h, w]` with values below `codebook_size`."""
    if not isinstance(codes, Tensor):
        check_value(codes, Tensor, "the batch of codes")
    if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or not codes.numel():
        raise ValueError(f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; expected int64 [B, h, w]")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes span [{low}, {high}]; expected values in [0, {codebook_size})")


def row_generators(generator: RowDraws, rows: int) -> list[torch.Generator]:
    """A generator on the CPU for each row, so that a row's noise does not depend on the other rows or on the device.

    Args:
        generator: None for fresh noise; a torch generator, or an int that stands for one, which draws a seed for each row; or
            one entry for each row, a seed (int64 `[B]` or a list) or a generator.

    Raises:
        ValueError: another kind of thing, or a list of another length.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    elif isinstance(generator, int) and not isinstance(generator, bool):
        generator = torch.Generator().manual_seed(generator)
    if isinstance(generator, torch.Generator):
        drawn = [int(torch.randint(_LARGEST, (), generator=generator, device=generator.device)) for _ in range(rows)]
        return [torch.Generator().manual_seed(seed) for seed in drawn]
    entries = generator.tolist() if isinstance(generator, Tensor) else generator
    if not isinstance(entries, list | tuple) or len(entries) != rows:
        given = f"{len(entries)} entries" if isinstance(entries, list | tuple) else f"a {type(entries).__name__}"
        raise ValueError(
            f"generator is {given} for {rows} rows; expected an int, a torch.Generator, or one of them per row"
        )
    if bad := [entry for entry in entries if isinstance(entry, bool) or not isinstance(entry, int | torch.Generator)]:
        raise ValueError(f"generator lists a {type(bad[0]).__name__}; expected ints and torch.Generators")
    return [e if isinstance(e, torch.Generator) else torch.Generator().manual_seed(e) for e in entries]
