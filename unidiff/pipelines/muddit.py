"""Muddit and Meissonic with the task methods of `UniDiffPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unidiff.families.muddit.folder import Muddit
from unidiff.families.muddit.tasks import MudditSettings
from unidiff.pipelines.arguments import MOST_ROWS, check_keywords, check_rows, flag, one_of, repeated, texts_of, whole
from unidiff.pipelines.inputs import ImageInputs, broadcast, opened
from unidiff.pipelines.options import OUTPUT_TYPES
from unidiff.pipelines.seeds import RowGenerator, row_seeds
from unidiff.schema import check_value
from unidiff.tokens.text import TextTokenizer
from unidiff.words import notes_on, refuse_holes

_SETTINGS = tuple(MudditSettings.__dataclass_fields__)
_FILL = "text is known or hidden as a whole to this model"


@dataclass(frozen=True)
class MudditOutput:
    """Results of B rows.

    Attributes:
        images: as `output_type` says; for captions and answers, the pictures that were given, at the model's size.
        texts: captions or answers; the prompts for pictures.
        seeds: int64 `[B]`; `generator=[seed]` repeats a row alone.
        notes: sentences about what the model cannot know, words that it has no ids for.
    """

    images: Any
    texts: list[str]
    seeds: Tensor
    notes: list[str] = field(default_factory=list)


def task_method(options: Any) -> Any:
    def decorate(method: Any) -> Any:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_keywords(method, kwargs, options)
            flag(kwargs.get("resize", False), "resize")
            one_of(kwargs.get("output_type", "pil"), "output_type", OUTPUT_TYPES)
            for name in ("steps", "num_images_per_prompt"):
                if kwargs.get(name) is not None:
                    whole(kwargs[name], name, 1, MOST_ROWS)
            return method(self, *args, **kwargs)

        call.options = options
        return call

    return decorate


class MudditPipeline:
    """A `Muddit` folder whose methods take pictures, seeds and settings as `UniDiffPipeline` does.

    Text is known or hidden as a whole, so there is no joint generation here; `inpaint` repaints pictures.

    Args:
        parts: the loaded folder.
        image_size: (height, width) in pixels.
    """

    interrupt = False
    layout = SimpleNamespace(any_size=False)

    @property
    def components(self) -> dict[str, Any]:
        return {"parts": self.parts, "image_size": self.image_size}

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> MudditPipeline:
        return cls(**{**pipeline.components, **changes})

    def __init__(self, parts: Muddit, image_size: tuple[int, int] = (512, 512)) -> None:
        self.parts, self.image_size = parts, image_size
        self.image_inputs = ImageInputs(image_size, parts.images.factor)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None) -> MudditPipeline:
        """See `Muddit.from_folder`; a folder called `1024` gives pictures of that size."""
        size = 1024 if Path(folder).resolve().name == "1024" else 512
        return cls(Muddit.from_folder(folder, dtype=dtype), (size, size))

    def to(self, *args: Any, **kwargs: Any) -> MudditPipeline:
        """Move network, text encoder and image tokenizer, as `nn.Module.to`."""
        self.parts.model.to(*args, **kwargs)
        self.parts.encoder.encoder.to(*args, **kwargs)
        self.parts.images.to(*args, **kwargs)
        return self

    @task_method(_SETTINGS)
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | None = None,
        *,
        generator: RowGenerator = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> MudditOutput:
        """Draw pictures from words; `settings` are fields of `MudditSettings` (steps, guidance_scale, temperature, ...).

        Args:
            negative_prompt: what guidance leads away from; no words when left out or "".

        Raises:
            ValueError: a prompt longer than the text encoder reads, or a setting out of range.
        """
        chosen, notes = self._settings(settings), self._notes(said := texts_of(prompt, "prompt"), "prompt")
        prompts = repeated(said, num_images_per_prompt)
        away = self._away(negative_prompt, chosen, notes)
        seeds = row_seeds(generator, len(prompts), num_images_per_prompt)
        height, width = self.image_size
        images = self.parts.text_to_image(prompts, seeds, height, width, away, settings=chosen)
        return MudditOutput(self._pictures(images, output_type), prompts, seeds, notes)

    @task_method(_SETTINGS)
    def caption(
        self,
        image: Any,
        resize: bool = False,
        *,
        generator: RowGenerator = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> MudditOutput:
        """Describe pictures; errors as for `answer`."""
        chosen, pixels = self._settings(settings), self.image_inputs.images(image, resize)
        check_rows(len(pixels))
        seeds = row_seeds(generator, len(pixels), 1)
        texts = self.parts.answer(pixels, seeds, None, chosen)
        return MudditOutput(self._pictures(pixels, output_type), texts, seeds)

    @task_method(_SETTINGS)
    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        resize: bool = False,
        *,
        generator: RowGenerator = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> MudditOutput:
        """Answer questions about pictures; one picture with several questions, or the other way round, is fine too.

        Raises:
            ValueError: no mask embedding or text head, a picture of another size, or a question too long.
        """
        chosen, notes = self._settings(settings), self._notes(said := texts_of(question, "question"), "question")
        shown, questions = broadcast(image=list(self.image_inputs.images(image, resize)), question=said)
        check_rows(len(shown))
        pixels, seeds = torch.stack(shown), row_seeds(generator, len(shown), 1)
        texts = self.parts.answer(pixels, seeds, questions, chosen)
        return MudditOutput(self._pictures(pixels, output_type), texts, seeds, notes)

    @task_method(_SETTINGS)
    def inpaint(
        self,
        image: Any,
        mask_image: Any = None,
        text: str | Sequence[str] = "",
        strength: float = 1.0,
        negative_prompt: str | None = None,
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
        check_value(strength, float, "strength")
        chosen, notes = self._settings(settings), self._notes(said := texts_of(text, "text", empty=True), "text")
        image = opened(image)
        pixels = self.image_inputs.images(image, resize)  # [B, 3, H, W]
        holes = torch.ones(1, *self.image_size, dtype=torch.bool)
        if mask_image is not None:
            holes = self.image_inputs.masks(mask_image, image, resize)
        given, masks, prompts = broadcast(image=list(pixels), mask_image=list(holes), text=said)
        check_rows(len(given))
        seeds = row_seeds(generator, len(given), 1)
        away = self._away(negative_prompt, chosen, notes)
        images = self.parts.redraw(torch.stack(given), prompts, seeds, strength, torch.stack(masks), away, chosen)
        return MudditOutput(self._pictures(images, output_type), list(prompts), seeds, notes)

    def generate(self, *_: Any, **__: Any) -> MudditOutput:
        """Raises ValueError: text and picture together are beyond this model's training."""
        raise ValueError(
            "muddit cannot do 'generate'; it does text_to_image, caption, answer, inpaint (a picture and its words "
            "together go through unidiff.families.muddit.denoiser)"
        )

    def _settings(self, changes: dict[str, Any]) -> MudditSettings:
        return replace(self.parts.settings, **changes)

    def _notes(self, said: Sequence[str], what: str) -> list[str]:
        refuse_holes(said, what, _FILL)
        return notes_on(said, TextTokenizer(self.parts.tokenizer))

    def _away(self, negative_prompt: Any, settings: MudditSettings, notes: list[str]) -> str:
        """A negative prompt for all rows, "" for none; what it holds that the model does not know is added to `notes`."""
        said = "" if negative_prompt is None else texts_of((negative_prompt,), "negative_prompt", empty=True)[0]
        if said.strip():
            if settings.guidance_scale <= 1:
                raise ValueError("negative_prompt changes nothing at guidance_scale 1; choose a larger one")
            notes += [note for note in self._notes([said], "negative_prompt") if note not in notes]
        return said

    def _pictures(self, images: Tensor, output_type: str) -> Any:
        if output_type == "codes":
            return self.parts.images.encode(images).cpu()
        return self.image_inputs.output(images, output_type)
