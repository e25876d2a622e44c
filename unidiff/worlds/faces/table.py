"""Faces as training data: what is said about each, and their pictures by number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unidiff.worlds.faces.cells import FACTOR, face_tokenizer
from unidiff.worlds.faces.language import choices, draw_question, worded
from unidiff.worlds.faces.scenes import NONE, FaceGenerator, default_layers, render_batch


class FaceScenes:
    """A `SceneSource` of faces, with so many `questions` about each."""

    def __init__(self, faces: FaceGenerator, questions: int = 4) -> None:
        if questions < 0:
            raise ValueError(f"questions is {questions}; expected 0 or more")
        self.faces, self.questions = faces, questions

    def pictures(self, start: int, stop: int) -> Tensor:
        return render_batch([self.faces.face(number) for number in range(start, stop)])

    def texts(self, number: int, captions: int) -> tuple[list[str], list[tuple[str, str]]]:
        face, rng = self.faces.face(number), self.faces.rng(number, "texts")
        said = [worded(face, rng.choice(choices(face)), rng) for _ in range(captions)]
        return said, [draw_question(face, rng) for _ in range(self.questions)]

    def level(self, number: int) -> int:
        """One, and one more for each of beard, glasses and hat."""
        face = self.faces.face(number)
        return 1 + sum(value != NONE for value in (face.beard, face.glasses, face.hat))


def picture_source(profile: str, kinds: tuple[float, ...], seed: int) -> Callable[[int], Tensor]:
    """Faces for an image tokenizer: a picture by number, float32 `[3, 64, 64]` in [0, 1]. There is one profile and one kind."""
    faces = FaceGenerator(seed, "all")
    return lambda number: render_batch([faces.face(number)])[0]


def face_cells(profile: str, factor: int) -> tuple[Tensor, Tensor]:
    """Every cell of every face on all backgrounds, float `[cells, backgrounds, 3, 8, 8]` in [0, 1], and the backgrounds alone.

    Raises:
        ValueError: `factor` is not 8.
    """
    if factor != FACTOR:
        raise ValueError(f"faces are made of cells of {FACTOR} pixels, and factor is {factor}")
    table, grounds = face_tokenizer().cells, default_layers().grounds  # [K, 4, d, d], [G, 3]
    shown = table[len(grounds) :, None]  # [K - G, 1, 4, d, d]
    cells = torch.where(shown[:, :, 3:] > 0.5, shown[:, :, :3], grounds[:, :, None, None])
    step = FACTOR // cells.shape[-1]
    flat = grounds[:, :, None, None].expand(-1, -1, FACTOR, FACTOR).contiguous()
    return cells.repeat_interleave(step, 3).repeat_interleave(step, 4), flat
