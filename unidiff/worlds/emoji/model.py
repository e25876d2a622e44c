"""What EmojiEval asks of a model, and `UniDiffPipeline` behind that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unidiff.pipeline import UniDiffPipeline


@dataclass(frozen=True)
class Drawn:
    """Pictures and texts of some rows.

    Attributes:
        images: float `[B, 3, H, W]` in [0, 1].
        texts: one per row.
        untouched: whether every given token came out as it went in.
    """

    images: Tensor
    texts: list[str]
    untouched: list[bool]


@dataclass(frozen=True)
class Hole:
    """A text with a hidden name: `before + name + after`; an empty name hides nothing."""

    before: str
    name: str
    after: str


class EvalModel(Protocol):
    """The tasks that are scored. Pictures are float `[B, 3, H, W]` in [0, 1]; there is one seed per row."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the image tokenizer and back."""
        ...

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor: ...

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]: ...

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]: ...

    def inpaint(self, images: Tensor, masks: Tensor, texts: Sequence[Hole], seeds: Sequence[int]) -> Drawn:
        """Repaint where `masks` (bool `[B, H, W]`) is True and fill the holes of the texts."""
        ...

    def generate(self, seeds: Sequence[int]) -> Drawn:
        """A picture and its caption for each seed, from nothing."""
        ...


class PipelineModel:
    """A pipeline, run in batches with its own settings for each task.

    Args:
        pipe: the pipeline.
        batch_size: rows per decode; results do not depend on it.
        on_drawn: told the prompts and pictures of every text-to-image batch.
        options: keyword arguments for every decode, for instance `steps`.
    """

    def __init__(
        self,
        pipe: UniDiffPipeline,
        batch_size: int = 64,
        on_drawn: Callable[[Sequence[str], Tensor], None] | None = None,
        **options: Any,
    ) -> None:
        self.pipe, self.batch_size, self.on_drawn = pipe, batch_size, on_drawn
        self.options = {"output_type": "pt", **options}

    def reconstruct(self, images: Tensor) -> Tensor:
        parts = [self.pipe.images.decode(self.pipe.images.encode(images[part])).cpu() for part in self._parts(images)]
        return torch.cat(parts)

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        pictures = []
        for part in self._parts(prompts):
            words = list(prompts[part])
            drawn = self.pipe.text_to_image(words, generator=list(seeds[part]), **self.options).images
            if self.on_drawn is not None:
                self.on_drawn(words, drawn)
            pictures.append(drawn)
        return torch.cat(pictures)

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        texts: list[str] = []
        for part in self._parts(images):
            texts += self.pipe.caption(images[part], generator=list(seeds[part]), **self.options).texts
        return texts

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        texts: list[str] = []
        for p in self._parts(questions):
            out = self.pipe.answer(images[p], list(questions[p]), generator=list(seeds[p]), **self.options)
            texts += out.texts
        return texts

    def inpaint(self, images: Tensor, masks: Tensor, texts: Sequence[Hole], seeds: Sequence[int]) -> Drawn:
        pictures, words, untouched = [], [], []
        for p in self._parts(texts):
            templates = [self._template(hole) for hole in texts[p]]
            out = self.pipe.inpaint(
                list(images[p]), list(masks[p]), templates, generator=list(seeds[p]), **self.options
            )
            kept = ~self.pipe.image_inputs.cells(masks[p])  # [B, h, w]
            same = (out.codes == self.pipe.images.encode(images[p]).cpu()) | ~kept
            for hole, text, whole in zip(texts[p], out.texts, same.flatten(1).all(1).tolist(), strict=True):
                framed = text.startswith(hole.before.strip()) and text.endswith(hole.after.strip())
                untouched.append(whole and framed)
            pictures.append(out.images)
            words += out.texts
        return Drawn(torch.cat(pictures), words, untouched)

    def generate(self, seeds: Sequence[int]) -> Drawn:
        pictures, words = [], []
        for p in self._parts(seeds):
            rows = list(seeds[p])
            out = self.pipe.generate(num_images_per_prompt=len(rows), generator=rows, **self.options)
            pictures.append(out.images)
            words += out.texts
        return Drawn(torch.cat(pictures), words, [True] * len(words))

    def _template(self, hole: Hole) -> str:
        """The text with as many hidden tokens as the name has in its place."""
        if not hole.name:
            return hole.before
        size = lambda text: len(self.pipe.texts.encode(text))  # noqa: E731
        before = hole.before.removesuffix(" ")
        hidden = size(hole.before + hole.name + hole.after) - size(before) - size(hole.after)
        return f"{hole.before}<mask:{hidden}>{hole.after}"

    def _parts(self, rows: Sequence[Any] | Tensor) -> Iterator[slice]:
        for start in range(0, len(rows), self.batch_size):
            yield slice(start, start + self.batch_size)
