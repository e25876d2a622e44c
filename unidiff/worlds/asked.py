"""A pipeline as the evaluation of a world asks it: batches of rows, each with its own seed, of which the finished ones may be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidiff.evaluation.kept import DecodedRow, KeptRows
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput

Numbers = Sequence[int]
"""Places of some rows among all."""


class HoledCaption:
    """A caption with a part of it hidden: `before`, `name` and `after` are its parts, and `name` is empty where all of it is given."""

    caption: str
    before: str
    name: str
    after: str

    def template(self, encode: Callable[[str], Sequence[int]]) -> str:
        """The caption with as many hidden tokens as the name has in its place; `encode` gives the ids of a text."""
        if not self.name:
            return self.caption
        parts = (self.caption, self.before.removesuffix(" "), self.after)
        whole, before, after = (len(encode(part)) for part in parts)
        return f"{self.before}<mask:{whole - before - after}>{self.after}"


@dataclass(frozen=True)
class Drawn:
    """Pictures float `[B, 3, H, W]` in [0, 1] and texts of some rows, and whether every given token came out as it went in."""

    images: Tensor
    texts: list[str]
    untouched: list[bool]


class PipelineModel:
    """A pipeline, run in batches with its own settings for each task: all that an evaluation asks of a model.

    Pictures are float `[B, 3, H, W]` in [0, 1], what is drawn in the 256 steps of a picture file, so that what is judged is
    what can be looked at. There is one seed per row.

    Args:
        batch_size: rows per decode; results do not depend on it. on_output: told what came out of every decode.
        kept: rows that need not be decoded again, and where finished ones go, by `row_name`. tick: told how many more
            rows are done.
        options: keyword arguments for every decode, for instance `steps`.
    """

    def __init__(
        self,
        pipe: UniDiffPipeline,
        batch_size: int = 64,
        on_output: Callable[[UniDiffOutput], Any] = lambda out: None,
        kept: KeptRows | None = None,
        tick: Callable[[int], None] = lambda more: None,
        **options: Any,
    ) -> None:
        self.pipe, self.batch_size, self.on_output = pipe, batch_size, on_output
        self.kept, self.tick, self.options = kept or KeptRows(), tick, {"output_type": "pt", **options}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the image tokenizer and back."""
        through = lambda part: self.pipe.images.decode(self.pipe.images.encode(part)).cpu()  # noqa: E731
        return torch.cat([through(part) for part in images.split(self.batch_size)])

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self._drawn(
            "text_to_image", seeds, lambda p, **how: self.pipe.text_to_image([prompts[i] for i in p], **how)
        ).images

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        rows = self._rows("caption", seeds, lambda p, **how: self.pipe.caption(images[p], **how), drawn=False)
        return [row.words for row in rows]

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        call = lambda p, **how: self.pipe.answer(images[p], [questions[i] for i in p], **how)  # noqa: E731
        return [row.words for row in self._rows("answer", seeds, call, drawn=False)]

    def inpaint(self, images: Tensor, masks: Tensor, cases: Sequence[HoledCaption], seeds: Sequence[int]) -> Drawn:
        """Repaint where `masks` (bool `[B, H, W]`) is True and fill the holes of the captions."""

        def fill(p: Numbers, **how: Any) -> UniDiffOutput:
            templates = [cases[i].template(self.pipe.texts.encode) for i in p]
            return self.pipe.inpaint(list(images[p]), list(masks[p]), templates, **how)

        def untouched(p: Numbers, out: UniDiffOutput) -> Iterator[bool]:
            kept = ~self.pipe.image_inputs.cells(masks[p])  # [B, h, w]
            same = (out.codes == self._codes(images[p])) | ~kept
            for i, text, whole in zip(p, out.texts, same.flatten(1).all(1).tolist(), strict=True):
                yield whole and text.startswith(cases[i].before.strip()) and text.endswith(cases[i].after.strip())

        return self._drawn("inpaint", seeds, fill, untouched)

    def _codes(self, images: Tensor) -> Tensor:
        """int64 `[B, h, w]`; of a model of latents, the codes that these are nearest to."""
        encoded = self.pipe.images.encode(images)
        return (self.pipe.images.codes(encoded) if self.pipe.layout.latents else encoded).cpu()

    def generate(self, seeds: Sequence[int]) -> Drawn:
        """A picture and its caption for each seed, from nothing."""
        call = lambda p, **how: self.pipe.generate(num_images_per_prompt=len(how["generator"]), **how)  # noqa: E731
        return self._drawn("generate", seeds, call)

    def _drawn(self, task: str, seeds: Sequence[int], *how: Any) -> Drawn:
        rows = self._rows(task, seeds, *how)
        pictures = torch.from_numpy(np.stack([np.asarray(row.picture) for row in rows]))
        return Drawn(pictures.movedim(-1, 1) / 255, [row.words for row in rows], [row.untouched for row in rows])

    def _rows(
        self,
        task: str,
        seeds: Sequence[int],
        call: Callable[..., UniDiffOutput],
        untouched: Callable[[Numbers, UniDiffOutput], Iterator[bool]] = lambda p, out: (True for _ in out.texts),
        drawn: bool = True,
    ) -> list[DecodedRow]:
        """All rows, batch by batch; `call` takes the numbers of the rows and the options of the decode."""
        names = [row_name(task, seed) for seed in seeds]
        rows = {i: row for i, name in enumerate(names) if (row := self.kept.get(name)) is not None}
        todo = [i for i in range(len(names)) if i not in rows]
        self.tick(len(rows))
        for start in range(0, len(todo), self.batch_size):
            part = todo[start : start + self.batch_size]
            out = call(part, generator=[seeds[i] for i in part], **self.options)
            self.on_output(out)
            pictures = bytes_of(torch.as_tensor(out.images)).numpy() if drawn else [None] * len(part)
            made = zip(out.texts, pictures, untouched(part, out), strict=True)
            fresh = {i: DecodedRow(*row) for i, row in zip(part, made, strict=True)}
            self.kept.put({names[i]: row for i, row in fresh.items()})
            self.tick(len(fresh))
            rows |= fresh
        return [rows[i] for i in range(len(names))]


def row_name(task: str, seed: int) -> str:
    """Of a row, by its task and its seed: seeds of 62 bits are those of one category and number."""
    return f"{task}/{seed:016x}"


def bytes_of(pictures: Tensor) -> Tensor:
    """Float `[B, 3, H, W]` in [0, 1] -> uint8 `[B, H, W, 3]`."""
    return (pictures.detach().cpu() * 255 + 0.5).clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous()
