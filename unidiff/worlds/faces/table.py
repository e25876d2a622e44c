"""Faces as training data: what is said about each, and their pictures by number."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unidiff.worlds.faces.language import choices, draw_question, worded
from unidiff.worlds.faces.scenes import NONE, FaceGenerator, render_batch


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
