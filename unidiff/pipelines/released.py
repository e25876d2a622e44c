"""Released families as pipelines: the same task methods as `UniDiffPipeline`, over a family's own rows and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from unidiff.families.chat import Turn, check_turns, words_of_turns
from unidiff.families.checkpoint.load import Released
from unidiff.pipelines.arguments import longest_of, repeated, task_method, texts_of, whole
from unidiff.pipelines.checks import check_released
from unidiff.pipelines.components import SharedParts
from unidiff.pipelines.holes import between_holes, refuse_holes
from unidiff.pipelines.inputs import ImageInputs, as_list, broadcast, opened, size_of
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.released_run import ReleasedOptions, run_request
from unidiff.pipelines.released_tasks import FamilyTasks, Grid
from unidiff.pipelines.tasks import call_task
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer

_OPTIONS = tuple(ReleasedOptions.__dataclass_fields__)
_LONGEST_SIDE = 16_384
_FILL = "generate, inpaint or infill fill <mask> holes, where the model can"


class ReleasedPipeline(SharedParts):
    """UniDisc, MMaDA, Lumina-DiMOO, LLaDA or Dream with its tokenizers.

    Words in texts are hidden with `<mask>` or `<mask:3>`. Every method takes the fields of `ReleasedOptions` as keyword
    arguments and returns a `UniDiffOutput`. `tasks.names` lists what the model can do; every other task raises
    `ValueError`. A row's result depends on its own seed and inputs, not on the other rows.

    Args:
        released: the network.
        tasks: the family's tasks.
        images, texts: the tokenizers that it was trained with; no image tokenizer for a model of text alone.
        grid: rows and columns of codes, for models that draw any size; None for the usual, or those of a given picture.
    """

    progress_bar: Any = DiffusionPipeline.progress_bar
    set_progress_bar_config: Any = DiffusionPipeline.set_progress_bar_config
    interrupt = False
    """Set by a callback to fill the rest of a running decode in one last pass."""
    _component_names = ("released", "tasks", "images", "texts")

    def __init__(
        self,
        released: Released,
        tasks: FamilyTasks,
        images: VQImageTokenizer | None,
        texts: TextTokenizer,
        grid: Grid | None = None,
    ) -> None:
        self.released, self.tasks, self.images, self.texts = released, tasks, images, texts
        self.fixed_size = grid is not None or not tasks.sizes
        if grid is not None and not tasks.sizes:
            raise ValueError(f"{tasks.family} draws pictures of one size; leave grid out")
        self.grid = tasks.grid if grid is None else grid
        check_released(released, images, texts)
        self._inputs: ImageInputs | None = None
        if images is not None:
            self._inputs = ImageInputs((self.grid[0] * images.factor, self.grid[1] * images.factor), images.factor)

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of the constructor; see `SharedParts`."""
        return super().components | {"grid": self.grid if self.fixed_size and self.tasks.sizes else None}

    @property
    def transformer(self) -> Any:
        """The network."""
        return self.released.model

    @property
    def image_inputs(self) -> ImageInputs:
        """What turns pictures into tensors and back.

        Raises:
            ValueError: a model of text alone.
        """
        if self._inputs is None:
            raise ValueError(f"{self.tasks.family} knows no pictures; it does {', '.join(self.tasks.names)}")
        return self._inputs

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; `ValueError` for a model of text alone."""
        return self.image_inputs.size

    def to(self, *args: Any, **kwargs: Any) -> ReleasedPipeline:
        """Move network and image tokenizer, as `nn.Module.to`."""
        self.released.model.to(*args, **kwargs)
        if self.images is not None:
            self.images.to(*args, **kwargs)
        return self

    def sized(self, height: int, width: int) -> ReleasedPipeline:
        """The same for pictures of another size in pixels, where the model draws any.

        Raises:
            ValueError: a model of one size, or a side that the image tokenizer's factor does not divide.
        """
        factor = self.image_inputs.factor
        if not self.tasks.sizes:
            raise ValueError(f"{self.tasks.family} draws pictures of one size; leave height and width out")
        for name, side in (("height", height), ("width", width)):
            whole(side, name, 1, _LONGEST_SIDE, f", divided by {factor}")
        if height % factor or width % factor:
            raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}")
        grid = (height // factor, width // factor)
        return ReleasedPipeline(self.released, self.tasks, self.images, self.texts, grid)

    def __call__(
        self, prompt: str | Sequence[str] | None = None, task: str | None = None, **inputs: Any
    ) -> UniDiffOutput:
        """The task that the inputs mean, as `UniDiffPipeline` chooses it; words alone are a question to a model of text.

        Raises:
            ValueError: inputs that no task takes together, and as for that task.
        """
        if isinstance(task, str) and task in ("chat", "complete", "infill", "edit"):
            first = {"image": inputs.pop("image", None)} if task == "edit" else {}
            first["prompt"] = prompt
            if missing := [name for name, value in first.items() if value is None]:
                raise ValueError(f"task {task!r} needs {' and '.join(missing)}")
            return getattr(self, task)(*first.values(), **inputs)
        if prompt is not None and task is None and self.images is None:
            return self.chat(prompt, **inputs)
        return call_task(self, prompt, task, inputs)

    @task_method(_OPTIONS)
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> UniDiffOutput:
        """Draw pictures from words.

        Args:
            height, width: in pixels, where the model draws any size; `image_size` where left out.

        Raises:
            ValueError: an empty prompt, one longer than the model holds, a size it cannot draw, or an option out of range.
        """
        self.tasks.need("text_to_image")
        pipe = self if height is None and width is None else self._sized_or_usual(height, width)
        said = texts_of(prompt, "prompt")
        refuse_holes(said, "prompt", _FILL)
        prompts, count = repeated(said, num_images_per_prompt)
        request = self.tasks.text_to_image(prompts, pipe.grid)
        return run_request(pipe, request, options, count, said=prompts, noted=said, drawn=True)

    @task_method(_OPTIONS)
    def caption(
        self, image: Any, max_text_tokens: int | None = None, resize: bool = False, **options: Any
    ) -> UniDiffOutput:
        """Describe pictures.

        Args:
            image: one or several, all of one size. A model that draws any size takes them as they are.
            max_text_tokens: `tasks.longest` where left out.
            resize: bring other sizes to the model's (or, of a model for any size, to the nearest that it was trained on).

        Raises:
            ValueError: a picture of another size, mode, dtype or range, or an option out of range.
        """
        self.tasks.need("caption")
        longest = longest_of(max_text_tokens, self.tasks.longest)
        image = opened(image)
        pipe = self._fitting(image, resize)
        pixels = pipe.image_inputs.images(image, resize)
        request = self.tasks.caption(pipe._encode(pixels), longest)
        return run_request(pipe, request, options, longest=longest, shown=pixels)

    @task_method(_OPTIONS)
    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        max_text_tokens: int | None = None,
        resize: bool = False,
        **options: Any,
    ) -> UniDiffOutput:
        """Answer questions about pictures; one picture with several questions, or the other way round, is fine too.

        Raises:
            ValueError: a model that was not trained for it, an empty question, or as for `caption`.
        """
        self.tasks.need("answer")
        said, longest = texts_of(question, "question"), longest_of(max_text_tokens, self.tasks.longest)
        refuse_holes(said, "question", _FILL)
        image = opened(image)
        pipe = self._fitting(image, resize)
        pixels = pipe.image_inputs.images(image, resize)
        shown, codes, questions = broadcast(image=list(pixels), codes=list(pipe._encode(pixels)), question=said)
        request = self.tasks.answer(torch.stack(codes), questions, longest)
        return run_request(pipe, request, options, longest=longest, noted=said, shown=torch.stack(shown))

    @task_method(_OPTIONS)
    def inpaint(
        self,
        image: Any,
        mask_image: Any = None,
        text: str | Sequence[str] | None = None,
        paste_back: bool = False,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> UniDiffOutput:
        """Fill holes in pictures (white in the mask) and in their captions (`<mask>`) together.

        Args:
            text: the caption; one for all pictures or one each.
            paste_back: put the picture's own pixels back outside the mask.

        Raises:
            ValueError: no text, nothing to decode, a mask of another size, text that does not fit, or as for `caption`.
        """
        self.tasks.need("inpaint")
        if text is None:
            raise ValueError(f"{self.tasks.family} needs the caption of the picture; give text=, with <mask> for holes")
        said, image = texts_of(text, "text"), opened(image)
        pipe = self._fitting(image, resize)
        pixels, mask = pipe.image_inputs.images(image, resize), pipe._mask(mask_image, image, resize)
        columns = broadcast(image=list(pixels), mask_image=list(mask), text=said, codes=list(pipe._encode(pixels)))
        shown, hidden, texts, codes = (repeated(column, num_images_per_prompt)[0] for column in columns)
        holes = torch.stack(hidden)  # [B, H, W]
        request = self.tasks.inpaint(texts, torch.stack(codes), pipe.image_inputs.cells(holes))
        paste = (torch.stack(shown), holes) if paste_back else None
        return run_request(
            pipe, request, options, num_images_per_prompt, said=texts, noted=between_holes(said), paste=paste
        )

    @task_method(_OPTIONS)
    def edit(
        self,
        image: Any,
        prompt: str | Sequence[str],
        reference: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> UniDiffOutput:
        """Change pictures as told.

        Args:
            image: one or several, of one size.
            prompt: what to change.
            reference: one further picture for each (a style, a subject).
            mask_image: white where the picture may change; everywhere when left out.
            height, width: of the result, in pixels; as the picture when left out.

        Raises:
            ValueError: a model that does not edit, an empty prompt, a size together with a mask, or as for `caption`.
        """
        self.tasks.need("edit")
        said, image = texts_of(prompt, "prompt"), opened(image)
        refuse_holes(said, "prompt", _FILL)
        pipe = self._fitting(image, resize)
        columns: dict[str, list[Any]] = {
            "image": list(pipe._encode(pipe.image_inputs.images(image, resize))),
            "prompt": said,
        }
        if reference is not None:
            reference = opened(reference, "reference")
            other = self._fitting(reference, resize)
            columns["reference"] = list(other._encode(other.image_inputs.images(reference, resize)))
        if mask_image is not None:
            columns["mask_image"] = list(pipe.image_inputs.cells(pipe._mask(mask_image, image, resize)))
        names, rows = list(columns), broadcast(**columns)
        full = {name: repeated(row, num_images_per_prompt)[0] for name, row in zip(names, rows, strict=True)}
        further, holes = (torch.stack(full[n]) if n in full else None for n in ("reference", "mask_image"))
        grid = None if height is None and width is None else pipe._sized_or_usual(height, width).grid
        request = self.tasks.edit(torch.stack(full["image"]), full["prompt"], grid, further, holes)
        return run_request(pipe, request, options, num_images_per_prompt, said=full["prompt"], noted=said, drawn=True)

    @task_method(_OPTIONS)
    def generate(
        self,
        text: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        max_text_tokens: int | None = None,
        **options: Any,
    ) -> UniDiffOutput:
        """Make pictures and their captions together, from nothing or from captions with `<mask>` holes.

        Raises:
            ValueError: a model that cannot, a caption that does not fit, or an option out of range.
        """
        self.tasks.need("generate")
        longest = longest_of(max_text_tokens, self.tasks.longest)
        if text is None:
            _, count = repeated([None], num_images_per_prompt)
            return run_request(self, self.tasks.generate(None, count, longest), options, count, longest=longest)
        said = texts_of(text, "text")
        texts, count = repeated(said, num_images_per_prompt)
        request = self.tasks.generate(texts, count, longest)
        return run_request(self, request, options, count, said=texts, noted=between_holes(said))

    @task_method(_OPTIONS)
    def chat(self, messages: Turn | Sequence[Turn], max_text_tokens: int = 128, **options: Any) -> UniDiffOutput:
        """Answer in words.

        Args:
            messages: a question, a conversation (messages `{"role": ..., "content": ...}`), or several of either.
            max_text_tokens: of an answer, its end included.

        Raises:
            ValueError: a model that does not chat, an empty question, or an option out of range.
        """
        self.tasks.need("chat")
        several = as_list(messages, "message")
        turns = [several] if all(isinstance(message, Mapping) for message in several) else several
        longest = longest_of(max_text_tokens, 128)
        asked = words_of_turns(check_turns(turns))
        return run_request(self, self.tasks.chat(turns, longest), options, noted=asked)

    @task_method(_OPTIONS)
    def complete(self, prompt: str | Sequence[str], max_text_tokens: int = 128, **options: Any) -> UniDiffOutput:
        """Go on with texts as they are (base models).

        Raises:
            ValueError: a model that cannot, an empty prompt, or an option out of range.
        """
        self.tasks.need("complete")
        said = texts_of(prompt, "prompt")
        return run_request(self, self.tasks.complete(said, longest_of(max_text_tokens, 128)), options, noted=said)

    @task_method(_OPTIONS)
    def infill(self, text: str | Sequence[str], **options: Any) -> UniDiffOutput:
        """Fill `<mask>` holes in texts.

        Raises:
            ValueError: a model that cannot, a text without holes, or an option out of range.
        """
        self.tasks.need("infill")
        said = texts_of(text, "text")
        return run_request(self, self.tasks.infill(said), options, noted=between_holes(said))

    def _sized_or_usual(self, height: int | None, width: int | None) -> ReleasedPipeline:
        usual = self.image_size
        return self.sized(usual[0] if height is None else height, usual[1] if width is None else width)

    def _fitting(self, image: Any, resize: bool) -> ReleasedPipeline:
        """This pipeline for the size of the pictures, where the model takes any and none was asked for."""
        if self.fixed_size:
            return self
        sizes = sorted({size_of(part) for part in as_list(image, "image")})
        if len(sizes) > 1:
            raise ValueError(f"the pictures have the sizes {sizes} (height, width); give those of one size at a time")
        height, width = sizes[0]
        if resize:
            factor = self.image_inputs.factor
            height, width = (side * factor for side in self.tasks.fit(height, width))
        return self.sized(height, width)

    def _encode(self, pixels: Tensor) -> Tensor:
        assert self.images is not None  # `need` has refused otherwise
        return self.images.encode(pixels).cpu()

    def _mask(self, mask_image: Any, image: Any, resize: bool) -> Tensor:
        """bool `[B, H, W]`: pixels to paint again; none without a mask."""
        if mask_image is None:
            return torch.zeros(1, *self.image_size, dtype=torch.bool)
        return self.image_inputs.masks(mask_image, image, resize)
