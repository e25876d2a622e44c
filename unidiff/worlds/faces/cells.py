"""The image tokenizer of faces: every cell of every face, written down."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from unidiff.tokens.image.cell_table import CellTableModel
from unidiff.worlds.faces.scenes import ATTRIBUTES, IMAGE_SIZE, NONE, SIDE, UNDER_A_HAT, Face, default_layers

FACTOR = 8
DETAIL = FACTOR * SIDE // IMAGE_SIZE  # pixels of the artwork along a side of a cell


def face_tokenizer() -> CellTableModel:
    """A tokenizer of all cells that occur in faces: decode(encode(picture)) is the picture for every face of the world."""
    grounds = default_layers().grounds
    flat = torch.cat([grounds, torch.ones(len(grounds), 1)], 1)[:, :, None, None].expand(-1, -1, DETAIL, DETAIL)
    count = SIDE // DETAIL
    found: dict[bytes, Tensor] = {}
    for row, column in product(range(count), repeat=2):
        for cell in _cells_at(row, column):
            if (cell[3] > 0).any():
                found.setdefault((cell * 255).round().to(torch.uint8).numpy().tobytes(), cell)
    return CellTableModel.of_cells(torch.cat([flat, torch.stack(list(found.values()))]), FACTOR, len(grounds))


def _cells_at(row: int, column: int) -> Tensor:
    """What one cell may show: float `[n, 4, d, d]`, opaque or clear."""
    window = slice(row * DETAIL, (row + 1) * DETAIL), slice(column * DETAIL, (column + 1) * DETAIL)
    patches = default_layers().rgba[:, window[0], window[1]]  # [L + 1, d, d, 4]
    choices = [list({patches[list(stack)].numpy().tobytes(): stack for stack in group}.values()) for group in _groups()]
    stacks = torch.tensor([[*skin, *clothing, *eyes, *glasses, *beard, *mouth, *top] for skin, clothing, eyes, glasses, beard,
                           mouth, top in product(*choices)])  # fmt: skip
    canvas = torch.zeros(len(stacks), DETAIL, DETAIL, 4)
    for layer in patches[stacks].unbind(1):
        alpha = layer[..., 3:]
        colour = canvas[..., :3] * (1 - alpha) + layer[..., :3] * alpha
        canvas = torch.cat([colour, torch.maximum(canvas[..., 3:], alpha)], -1)
    clear = canvas[..., 3:] == 0
    if not ((canvas[..., 3:] == 1) | clear).all():
        raise ValueError(f"cell {row}, {column} of the layers lets the background shine through half")
    return ((canvas * 255).round() / 255).masked_fill(clear, 0).movedim(-1, 1)


def _groups() -> Iterator[list[tuple[int, ...]]]:
    """Layers that are chosen together, in the order they are drawn in; hair and hat last, which depend on each other."""
    index, layers = dict(zip(Face._fields, range(len(Face._fields)), strict=True)), default_layers()
    plain = [values[-1] if name != "hat" else NONE for name, values in ATTRIBUTES.items()]
    plain[index["hair"]] = UNDER_A_HAT[-1]

    def stacks(names: tuple[str, ...], places: slice) -> list[tuple[int, ...]]:
        found = []
        for values in product(*(ATTRIBUTES[name] for name in names)):
            face = list(plain)
            for name, value in zip(names, values, strict=True):
                face[index[name]] = value
            if (made := Face(*face)).possible():
                found.append(tuple(layers.indices(made)[places]))
        return found

    yield stacks(("skin",), slice(0, 1))
    yield stacks(("clothing", "clothing_colour"), slice(1, 2))
    yield stacks(("eyes", "eye_colour"), slice(2, 3))
    yield from (stacks((name,), slice(i, i + 1)) for i, name in enumerate(("glasses", "beard", "mouth"), 3))
    yield stacks(("hair", "hair_colour", "hat"), slice(6, 8))
