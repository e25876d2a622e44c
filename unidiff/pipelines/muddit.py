"""Muddit and Meissonic with the task methods of `UniDiffPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff.pipelines.inputs import ImageInputs, as_list, broadcast
from unidiff.pipelines.seeds import RowGenerator, row_seeds
from unidiff.released.muddit_folder import Muddit
from unidiff.released.muddit_tasks import MudditSettings


@dataclass(frozen=True)
class MudditOutput:
    """Results of B rows.

    Attributes:
        images: as `output_type` says; None for texts.
        texts: captions or answers; the prompts for pictures.
        seeds: int64 `[B]`; `generator=[seed]` repeats a row alone.
    """

    images: Any
    texts: list[str]
    seeds: Tensor


class MudditPipeline:
    """A `Muddit` folder whose methods take pictures, seeds and settings as `UniDiffPipeline` does.

    Text is known or hidden as a whole, so there is no joint generation here; `inpaint` repaints pictures.

    Args:
        parts: the loaded folder.
        image_size: (height, width) in pixels.
    """

    def __init__(self, parts: Muddit, image_size: tuple[int, int] = (512, 512)) -> None:
        self.parts, self.image_size = parts, image_size
        self.image_inputs = ImageInputs(image_size, parts.images.factor)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None) -> MudditPipeline:
        """See `Muddit.from_folder`; a folder called `1024` gives pictures of that size."""
        size = 1024 if Path(folder).name == "1024" else 512
        return cls(Muddit.from_folder(folder, dtype=dtype), (size, size))

    def to(self, *args: Any, **kwargs: Any) -> MudditPipeline:
        """Move network, text encoder and image tokenizer, as `nn.Module.to`."""
        self.parts.model.to(*args, **kwargs)
        self.parts.encoder.encoder.to(*args, **kwargs)
        self.parts.images.to(*args, **kwargs)
        return self

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str = "",
        *,
        generator: RowGenerator = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> MudditOutput:
        """Draw pictures from words; `settings` are fields of `MudditSettings` (steps, guidance_scale, temperature, ...).

        Raises:
            ValueError: a prompt longer than the text encoder reads, or a setting out of range.
        """
        prompts = [p for p in as_list(prompt, "prompt") for _ in range(num_images_per_prompt)]
        seeds = row_seeds(generator, len(prompts), num_images_per_prompt)
        height, width = self.image_size
        images = self.parts.text_to_image(
            prompts, seeds, height, width, negative_prompt, settings=self._settings(settings)
        )
        return MudditOutput(self.image_inputs.output(images, output_type), prompts, seeds)

    def caption(
        self, image: Any, resize: bool = False, *, generator: RowGenerator = None, **settings: Any
    ) -> MudditOutput:
        """Describe pictures; errors as for `answer`."""
        pixels = self.image_inputs.images(image, resize)
        seeds = row_seeds(generator, len(pixels), 1)
        return MudditOutput(None, self.parts.answer(pixels, seeds, None, self._settings(settings)), seeds)

    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        resize: bool = False,
        *,
        generator: RowGenerator = None,
        **settings: Any,
    ) -> MudditOutput:
        """Answer questions about pictures; one picture with several questions, or the other way round, is fine too.

        Raises:
            ValueError: no mask embedding or text head, a picture of another size, or a question too long.
        """
        pixels, questions = broadcast(
            image=list(self.image_inputs.images(image, resize)), question=as_list(question, "question")
        )
        seeds = row_seeds(generator, len(pixels), 1)
        return MudditOutput(
            None, self.parts.answer(torch.stack(pixels), seeds, questions, self._settings(settings)), seeds
        )

    def inpaint(
        self,
        image: Any,
        mask_image: Any = None,
        text: str | Sequence[str] = "",
        strength: float = 1.0,
        negative_prompt: str = "",
        resize: bool = False,
        *,
        generator: RowGenerator = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> MudditOutput:
        """Repaint pictures where the mask is white (everywhere without one) as `text` says.

        Raises:
            ValueError: a mask of another size, a strength outside (0, 1], or as for `text_to_image`.
        """
        pixels = self.image_inputs.images(image, resize)  # [B, 3, H, W]
        holes = torch.ones(1, *self.image_size, dtype=torch.bool)
        if mask_image is not None:
            holes = self.image_inputs.masks(mask_image, image, resize)
        given, masks, prompts = broadcast(image=list(pixels), mask_image=list(holes), text=as_list(text, "text"))
        seeds = row_seeds(generator, len(given), 1)
        images = self.parts.redraw(
            torch.stack(given), prompts, seeds, strength, torch.stack(masks), negative_prompt, self._settings(settings)
        )
        return MudditOutput(self.image_inputs.output(images, output_type), list(prompts), seeds)

    def generate(self, *_: Any, **__: Any) -> MudditOutput:
        """Raises ValueError: text and picture together are beyond this model's training."""
        raise ValueError(
            "muddit cannot do 'generate'; it does text_to_image, caption, answer, inpaint (a picture and its words "
            "together go through unidiff.released.muddit_denoiser)"
        )

    def _settings(self, changes: dict[str, Any]) -> MudditSettings:
        known = set(MudditSettings.__dataclass_fields__)
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"unknown settings {unknown}; expected some of {sorted(known)}")
        return replace(self.parts.settings, **changes)
