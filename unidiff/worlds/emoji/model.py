"""What EmojiEval asks of a model, and `UniDiffPipeline` behind that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.output import UniDiffOutput


@dataclass(frozen=True)
class Drawn:
    """Pictures and texts of some rows.

    Attributes:
        images: float `[B, 3, H, W]` in [0, 1]. texts: one per row.
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

    def template(self, encode: Callable[[str], Sequence[int]]) -> str:
        """The text with as many hidden tokens as the name has in its place; `encode` gives the ids of a text."""
        if not self.name:
            return self.before
        parts = (self.before + self.name + self.after, self.before.removesuffix(" "), self.after)
        whole, before, after = (len(encode(part)) for part in parts)
        return f"{self.before}<mask:{whole - before - after}>{self.after}"


class PipelineModel:
    """A pipeline, run in batches with its own settings for each task: all that EmojiEval asks of a model.

    Pictures are float `[B, 3, H, W]` in [0, 1]; there is one seed per row.

    Args:
        batch_size: rows per decode; results do not depend on it.
        on_output: told what came out of every decode.
        options: keyword arguments for every decode, for instance `steps`.
    """

    def __init__(
        self,
        pipe: UniDiffPipeline,
        batch_size: int = 64,
        on_output: Callable[[UniDiffOutput], Any] = lambda out: None,
        **options: Any,
    ) -> None:
        self.pipe, self.batch_size, self.on_output = pipe, batch_size, on_output
        self.options = {"output_type": "pt", **options}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the image tokenizer and back."""
        through = lambda part: self.pipe.images.decode(self.pipe.images.encode(part)).cpu()  # noqa: E731
        return torch.cat([through(part) for part in images.split(self.batch_size)])

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self._decode(seeds, lambda p, **how: self.pipe.text_to_image(list(prompts[p]), **how)).images

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        return self._decode(seeds, lambda p, **how: self.pipe.caption(images[p], **how)).texts

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return self._decode(seeds, lambda p, **how: self.pipe.answer(images[p], list(questions[p]), **how)).texts

    def inpaint(self, images: Tensor, masks: Tensor, texts: Sequence[Hole], seeds: Sequence[int]) -> Drawn:
        """Repaint where `masks` (bool `[B, H, W]`) is True and fill the holes of the texts."""

        def fill(p: slice, **how: Any) -> UniDiffOutput:
            templates = [hole.template(self.pipe.texts.encode) for hole in texts[p]]
            return self.pipe.inpaint(list(images[p]), list(masks[p]), templates, **how)

        def untouched(p: slice, out: UniDiffOutput) -> Iterator[bool]:
            kept = ~self.pipe.image_inputs.cells(masks[p])  # [B, h, w]
            same = (out.codes == self.pipe.images.encode(images[p]).cpu()) | ~kept
            for hole, text, whole in zip(texts[p], out.texts, same.flatten(1).all(1).tolist(), strict=True):
                yield whole and text.startswith(hole.before.strip()) and text.endswith(hole.after.strip())

        return self._decode(seeds, fill, untouched)

    def generate(self, seeds: Sequence[int]) -> Drawn:
        """A picture and its caption for each seed, from nothing."""
        return self._decode(
            seeds, lambda p, **how: self.pipe.generate(num_images_per_prompt=len(how["generator"]), **how)
        )

    def _decode(
        self,
        seeds: Sequence[int],
        call: Callable[..., UniDiffOutput],
        untouched: Callable[[slice, UniDiffOutput], Iterator[bool]] = lambda p, out: (True for _ in out.texts),
    ) -> Drawn:
        """All rows, batch by batch; `call` takes the slice of the rows and the options of the decode."""
        pictures, texts = list[Tensor](), list[str]()
        whole: list[bool] = []
        for start in range(0, len(seeds), self.batch_size):
            part = slice(start, start + self.batch_size)
            out = call(part, generator=list(seeds[part]), **self.options)
            self.on_output(out)
            pictures.append(torch.as_tensor(out.images))
            texts += out.texts
            whole += untouched(part, out)
        return Drawn(torch.cat(pictures), texts, whole)
