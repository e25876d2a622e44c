"""`UniDiffPipeline`: pictures from words, captions, answers, joint inpainting and generation, and text, with one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, TypeAlias, Unpack, overload

import torch

from unidiff.families.layout import Grid, RowLayout, TaskInputs
from unidiff.pipelines.decode import TaskCall, columns_of, decode, task_method, texts_of
from unidiff.pipelines.folder import PipelineFolder
from unidiff.pipelines.latents.decode import decode_latents
from unidiff.pipelines.options import CallInputs, CallKeywords, DecodeKeywords, flag
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.score import score_of
from unidiff.pipelines.settings import NativeLayout, PipelineSettings
from unidiff.pipelines.tasks.choose import call_task
from unidiff.pipelines.tasks.words import WordTasks
from unidiff.schedulers.unmasking import UnmaskingScheduler
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer, between_holes

Prompt: TypeAlias = str | Sequence[str] | None


class UniDiffPipeline(WordTasks, PipelineFolder):
    """One masked diffusion model over text and image tokens, with everything around it, of whatever family.

    All tasks are the same decode with other tokens known. They share the keyword arguments of `DecodeOptions`, and return a
    `UniDiffOutput`. A family knows some of them (`layout.tasks`); another one is a `ValueError` that lists those. A row's
    result depends on its own seed and inputs, not on the other rows. `<mask>` and `<mask:3>` in a text hide one token (a
    word and the space before it, for most words) and three.

    Several tasks take:

    - `prompt`, `question`, `text`: one or several; a single one goes with all pictures, and a single picture with all texts.
    - `image`: one or several pictures of one size, paths or addresses, see `ImageInputs.images`.
    - `resize`: accept pictures of other sizes (a family that takes any brings them to the nearest that it was trained on).
    - `mask_image`: white where to repaint, as large as the picture, see `white_pixels`; a code is decoded again when any
      of its pixels is white.
    - `negative_prompt`: what guidance leads away from, one for all or one each; "" for hidden words. Left out: what
      `guidance_hides` says.
    - `height`, `width`: of the drawn picture in pixels, where the family draws any size; `image_size` where left out.
    - `num_images_per_prompt`: rows for each entry, next to each other in the results.
    - `max_text_tokens`: longest text to write, its end included.

    Args:
        transformer: the denoiser.
        image_tokenizer: a `VQImageTokenizer`, or the model inside one; None for a model of text alone.
        text_tokenizer: a `TextTokenizer`, or the Hugging Face tokenizer inside one.
        settings: of unidiff's own models: `PipelineSettings`, or its plain-data form; saved in `model_index.json`.
        layout: of another family: how its rows are laid out, in place of `settings`.
        scheduler: settings of every call, an `UnmaskingScheduler`, or what decides in each pass, a discrete one of diffusers.

    Raises:
        ValueError: parts that do not fit together.
    """

    transformer: Any
    image_tokenizer: Any
    text_tokenizer: Any
    scheduler: Any
    model_cpu_offload_seq = "transformer->image_tokenizer"  # type: ignore[assignment]

    def __init__(
        self,
        transformer: Any,
        image_tokenizer: Any,
        text_tokenizer: Any,
        settings: PipelineSettings | Mapping[str, Any] | None = None,
        layout: RowLayout | None = None,
        scheduler: Any = None,
    ) -> None:
        super().__init__()
        check_value(transformer, torch.nn.Module, "transformer")
        images, texts = image_tokenizer, text_tokenizer
        if layout is not None and layout.latents:
            images = layout.pictures(images)
        elif images is not None and not isinstance(images, VQImageTokenizer):
            images = VQImageTokenizer(images)
        self.images: Any = images
        self.texts = texts if isinstance(texts, TextTokenizer) else TextTokenizer(texts)
        parts = {"image_tokenizer": images and images.model, "text_tokenizer": self.texts.tokenizer}
        others = {} if layout is None else layout.modules
        self.register_modules(transformer=transformer.eval(), **parts, **others)
        if layout is None:
            if not isinstance(settings, PipelineSettings):
                settings = PipelineSettings.from_dict({} if settings is None else settings)
            self.settings = settings
            self.register_to_config(settings=settings.to_dict())
            layout = NativeLayout(self.texts, settings)
        self.layout: RowLayout = layout
        layout.check_parts(transformer, images, self.texts)
        usual = UnmaskingScheduler(self.vocabulary.image_mask, "text" if images is None else "image")
        self.register_modules(scheduler=scheduler or usual)
        self.interrupt = False  # a callback sets it to finish the running decode

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of text and image tokens."""
        return self.layout.vocabulary

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of the constructor: `type(pipe)(**pipe.components)` is the same pipeline again."""
        names = ("transformer", "image_tokenizer", "text_tokenizer", "scheduler")
        own = {"settings": self.settings} if hasattr(self, "settings") else {"layout": self.layout}
        return {name: getattr(self, name) for name in names} | own

    @property
    def device(self) -> torch.device:
        """Where rows are decoded."""
        return self.transformer.device if self.hf_device_map else super().device

    def sized(self, height: int, width: int) -> Self:
        """The same for pictures of another size in pixels; `ValueError` for one that the family does not draw."""
        return self.from_pipe(self, layout=replace(self.layout, fixed=self._grid(height, width)))  # type: ignore[type-var]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """See `DiffusionPipeline.to`; what else reads the rows follows the network."""
        super().to(*args, **kwargs)
        for module in self.layout.modules.values():
            module.to(self.transformer.device, self.transformer.dtype)
        return self

    @overload
    def __call__(
        self,
        prompt: Prompt = None,
        task: str | None = None,
        *,
        return_dict: Literal[False],
        **inputs: Unpack[CallInputs],
    ) -> tuple[Any, ...]: ...

    @overload
    def __call__(
        self,
        prompt: Prompt = None,
        task: str | None = None,
        *,
        return_dict: Literal[True] = True,
        **inputs: Unpack[CallInputs],
    ) -> UniDiffOutput: ...

    @overload
    def __call__(
        self, prompt: Prompt = None, task: str | None = None, *, return_dict: bool, **inputs: Unpack[CallInputs]
    ) -> UniDiffOutput | tuple[Any, ...]: ...

    def __call__(
        self, prompt: Prompt = None, task: str | None = None, **inputs: Unpack[CallKeywords]
    ) -> UniDiffOutput | tuple[Any, ...]:
        """The task that the inputs mean: `pipe("a dog")`, `pipe(image=picture)`, `pipe(image=picture, question="what?")`.

        A prompt alone: `text_to_image`, or `chat` with a model of text alone; `messages`: `chat`. A picture: `caption`; with
        a question `answer`; with a mask or text, or with a prompt and a mask or `strength`, `inpaint` (`edit` where the model
        knows no other way). Text with holes, or nothing: `generate` (a picture and its caption).

        Args:
            task: the name of a method, where it is not the one that the inputs mean.
            inputs: the arguments of that method.
        """
        return call_task(self, prompt, task, inputs)

    @property
    def decoder(self) -> Callable[..., UniDiffOutput]:
        """What decodes the rows of a task: of families whose pictures are latents a loop of its own."""
        return decode_latents if self.layout.latents else decode

    @task_method
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[DecodeKeywords],
    ) -> TaskCall:
        """Draw pictures from words.

        Raises:
            ValueError: an empty prompt, one with `<mask>` holes or longer than the model holds, a size it cannot draw, or
                an option out of range.
        """
        said = texts_of(prompt, "prompt")
        away = None if negative_prompt is None else texts_of(negative_prompt, "negative_prompt", empty=True)
        rows = columns_of(num_images_per_prompt, prompt=said, negative_prompt=away)
        grid = self._grid(height, width)
        inputs = TaskInputs(len(rows["prompt"]), rows["prompt"], rows.get("negative_prompt"), grid=grid)
        return TaskCall(inputs, num_images_per_prompt, [*said, *(away or ())])

    @task_method
    def inpaint(
        self,
        image: Any,
        mask_image: Any = None,
        text: str | Sequence[str] | None = None,
        max_text_tokens: int | None = None,
        paste_back: bool = False,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[DecodeKeywords],
    ) -> TaskCall:
        """Fill holes in pictures and in their captions together. Every other token stays exactly as it was.

        Args:
            mask_image: None repaints nothing.
            text: captions with `<mask>` holes; without holes the caption guides the picture. None: a caption of unknown
                words, where the family writes one.
            strength: redraw the whole picture where there is no mask, in this share of the steps, in (0, 1]: codes are
                hidden by a coin each, as many as the steps before would leave. Less than 1 where the family can do that.
            height, width: those of the picture, if given at all.
            paste_back: put the picture's own pixels back outside the mask (its codes are exact without that).

        Raises:
            ValueError: nothing to decode, a mask of another size, text that does not fit, or as for `caption`.
        """
        flag(paste_back, "paste_back")
        longest = self._longest(max_text_tokens, text)
        said = None if text is None else texts_of(text, "text", holes=True)
        share = 1.0 if strength is None else strength
        check_value(share, float, "strength")
        if not 0 < share <= 1 or (share < 1 and not self.layout.strengths):
            most = "a number in (0, 1]" if self.layout.strengths else f"1, as {self.layout.family} runs all its steps"
            raise ValueError(f"strength is {strength}; expected {most}")
        away = None if negative_prompt is None else texts_of(negative_prompt, "negative_prompt", empty=True)
        given = self._read(image, resize)
        size = given.reader.size
        if (height, width) != (None, None) and (height or size[0], width or size[1]) != size:
            raise ValueError(f"height and width are not the picture's {size[0]}x{size[1]} pixels; leave them out")
        white = torch.full((1, *size), strength is not None)
        if mask_image is not None:
            white = given.reader.masks(mask_image, given.opened, resize)  # [B, H, W]
        columns = {"image": given.pixels, "mask_image": white, "codes": given.codes}
        rows = columns_of(num_images_per_prompt, **columns, text=said, negative_prompt=away)
        inputs = TaskInputs(
            len(rows["image"]),
            rows.get("text"),
            rows.get("negative_prompt"),
            codes=rows["codes"],
            holes=given.reader.cells(rows["mask_image"]) if white.any() or mask_image is not None else None,
            strength=share,
            longest=longest,
        )
        paste = (rows["image"], rows["mask_image"]) if paste_back else None
        return TaskCall(inputs, num_images_per_prompt, [*between_holes(said or ()), *(away or ())], paste=paste)

    @task_method
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
        max_text_tokens: int | None = None,
        **options: Unpack[DecodeKeywords],
    ) -> TaskCall:
        """Change pictures as told, and answer in words as well where the family can (`layout.words_beside`).

        Args:
            prompt: what to change.
            reference: one further picture for each (a style, a subject).
            mask_image: where the picture may change; everywhere when left out.
            height, width: of the result; as the picture when left out.

        Raises:
            ValueError: an empty prompt, a size together with a mask, words of a family without, or as for `caption`.
        """
        said, given = texts_of(prompt, "prompt"), self._read(image, resize)
        columns: dict[str, Any] = {"image": given.codes, "prompt": said}
        if reference is not None:
            columns["reference"] = self._read(reference, resize, "reference").codes
        if mask_image is not None:
            columns["mask_image"] = given.reader.cells(given.reader.masks(mask_image, given.opened, resize))
        rows = columns_of(num_images_per_prompt, **columns)
        inputs = TaskInputs(
            len(rows["prompt"]),
            rows["prompt"],
            codes=rows["image"],
            holes=rows.get("mask_image"),
            references=rows.get("reference"),
            grid=self._grid(height, width),
            **self._beside("edit", max_text_tokens),
        )
        return TaskCall(inputs, num_images_per_prompt, said)

    @task_method
    def generate(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        max_text_tokens: int | None = None,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        prompt: str | Sequence[str] | None = None,
        **options: Unpack[DecodeKeywords],
    ) -> TaskCall:
        """Make a picture and its caption together, from nothing, from a few words, or from either one.

        Args:
            text: None for a caption of unknown words, or captions with holes as for `inpaint`.
            image: None for pictures of unknown content, or known pictures.
            prompt: what to answer in words and a picture (`layout.words_beside`), in place of text and image.

        Raises:
            ValueError: text and image both known in full, or as for `inpaint`; a prompt that the family does not take.
        """
        if prompt is not None:
            if text is not None or image is not None:
                raise ValueError("prompt is for words and a picture that are both new; leave text and image out")
            told = texts_of(prompt, "prompt")
            texts = columns_of(num_images_per_prompt, prompt=told)["prompt"]
            more = self._beside("generate", max_text_tokens)
            inputs = TaskInputs(len(texts), texts, grid=self._grid(height, width), **more)
            return TaskCall(inputs, num_images_per_prompt, told)
        longest = self._longest(max_text_tokens, text)
        said = None if text is None else texts_of(text, "text", holes=True)
        flag(resize, "resize")
        codes = None if image is None else self._read(image, resize).codes
        rows = columns_of(num_images_per_prompt, rows=[0], image=codes, text=said)
        grid = self._grid(height, width)
        inputs = TaskInputs(len(rows["rows"]), rows.get("text"), codes=rows.get("image"), grid=grid, longest=longest)
        return TaskCall(inputs, num_images_per_prompt, between_holes(said or ()))

    score = score_of

    def _grid(self, height: int | None, width: int | None) -> Grid | None:
        """Rows and columns of codes of a picture to draw; None where no size was asked for."""
        if height is None and width is None:
            return None
        return self._grid_of(height, width, 1 if self.images is None else self.images.upscale)

    def _beside(self, task: str, asked: int | None) -> dict[str, Any]:
        """Whether a task that is told what to make writes words beside the picture, and how many."""
        usual = self.layout.usual_words(task, asked)
        return {"told": True, "longest": self._longest(asked, usual=usual)} if usual or asked is not None else {}
