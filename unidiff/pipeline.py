"""`UniDiffPipeline`: pictures from words, captions, answers, joint inpainting and generation, and text, with one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from unidiff.families.chat import Turn, check_turns, words_of_turns
from unidiff.families.layout import RowLayout, TaskInputs
from unidiff.pipelines.decode import TaskCall, task_method
from unidiff.pipelines.folder import PipelineFolder
from unidiff.pipelines.inputs import ImageInputs, PictureSizes, as_list, columns_of, opened, texts_of
from unidiff.pipelines.options import flag, whole
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.rows import NativeLayout
from unidiff.pipelines.settings import PipelineSettings
from unidiff.pipelines.tasks import call_task
from unidiff.schema import check_value
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer, between_holes


class UniDiffPipeline(PipelineFolder):
    """One masked diffusion model over text and image tokens, with everything around it, of whatever family.

    All tasks are the same decode with other tokens known. They share the keyword arguments of `DecodeOptions`, and return a
    `UniDiffOutput`. A family knows some of them (`layout.tasks`); another one is a `ValueError` that lists those. A row's
    result depends on its own seed and inputs, not on the other rows. `<mask>` and `<mask:3>` in a text hide one token (a
    word and the space before it, for most words) and three.

    Args:
        transformer: the denoiser.
        image_tokenizer: a `VQImageTokenizer`, or the model inside one; None for a model of text alone.
        text_tokenizer: a `TextTokenizer`, or the Hugging Face tokenizer inside one.
        settings: of unidiff's own models: `PipelineSettings`, or its plain-data form; saved in `model_index.json`.
        layout: of another family: how its rows are laid out, in place of `settings`.

    Raises:
        ValueError: parts that do not fit together.
    """

    transformer: Any
    image_tokenizer: Any
    text_tokenizer: Any
    model_cpu_offload_seq = "transformer->image_tokenizer"  # type: ignore[assignment]

    def __init__(
        self,
        transformer: Any,
        image_tokenizer: Any,
        text_tokenizer: Any,
        settings: PipelineSettings | Mapping[str, Any] | None = None,
        layout: RowLayout | None = None,
    ) -> None:
        super().__init__()
        check_value(transformer, torch.nn.Module, "transformer")
        images, texts = image_tokenizer, text_tokenizer
        if images is not None and not isinstance(images, VQImageTokenizer):
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
        self.pictures = PictureSizes(images, layout)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """True once a callback has asked the running decode to finish; a callback may set it."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of text and image tokens."""
        return self.layout.vocabulary

    @property
    def image_inputs(self) -> ImageInputs:
        """What turns pictures into tensors and back; `ValueError` for a model of text alone."""
        return self.pictures.of()

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels, the usual one where there are others; `ValueError` for a model of text alone."""
        return self.image_inputs.size

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of the constructor: `type(pipe)(**pipe.components)` is the same pipeline again."""
        names = ("transformer", "image_tokenizer", "text_tokenizer")
        own = {"settings": self.settings} if hasattr(self, "settings") else {"layout": self.layout}
        return {name: getattr(self, name) for name in names} | own

    def sized(self, height: int, width: int) -> Self:
        """The same for pictures of another size in pixels, where the family draws any.

        Raises:
            ValueError: a family of one size, or a side that the image tokenizer's factor does not divide.
        """
        return self.from_pipe(self, layout=replace(self.layout, fixed=self.pictures.grid(height, width)))  # type: ignore[type-var]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """See `DiffusionPipeline.to`; what else reads the rows follows the network."""
        super().to(*args, **kwargs)
        for module in self.layout.modules.values():
            module.to(self.transformer.device, self.transformer.dtype)
        return self

    def __call__(
        self, prompt: str | Sequence[str] | None = None, task: str | None = None, **inputs: Any
    ) -> UniDiffOutput:
        """The task that the inputs mean: `pipe("a dog")`, `pipe(image=picture)`, `pipe(image=picture, question="what?")`.

        A prompt alone: `text_to_image`, or `chat` with a model of text alone. A picture: `caption`; with a question
        `answer`; with a mask or text `inpaint`. Text with holes, or nothing: `generate` (a picture and its caption).

        Args:
            prompt: one or several captions to draw.
            task: the name of a method, where it is not the one that the inputs mean.
            inputs: the arguments of that method.

        Raises:
            ValueError: inputs that no task takes together, and as for that task.
        """
        return call_task(self, prompt, task, inputs)

    @task_method
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> TaskCall:
        """Draw pictures from words.

        Args:
            prompt: one or several captions.
            num_images_per_prompt: rows per prompt, next to each other in the results.
            negative_prompt: what guidance leads away from, one for all prompts or one each; "" for hidden words. Left out:
                what `guidance_hides` says.
            height, width: in pixels, where the family draws any size; `image_size` where left out.

        Raises:
            ValueError: an empty prompt, one with `<mask>` holes or longer than the model holds, a size it cannot draw, or
                an option out of range.
        """
        said, away = texts_of(prompt, "prompt"), None
        if negative_prompt is not None:
            away = texts_of(negative_prompt, "negative_prompt", empty=True)
        rows = columns_of(num_images_per_prompt, prompt=said, negative_prompt=away)
        grid = self.pictures.grid(height, width)
        inputs = TaskInputs(len(rows["prompt"]), rows["prompt"], rows.get("negative_prompt"), grid=grid)
        return TaskCall(inputs, num_images_per_prompt, [*said, *(away or ())], self.pictures.of(grid))

    @task_method
    def caption(self, image: Any, max_text_tokens: int | None = None, resize: bool = False, **options: Any) -> TaskCall:
        """Describe pictures.

        Args:
            image: one or several pictures, paths or addresses, see `ImageInputs.images`; all of one size.
            max_text_tokens: longest caption.
            resize: accept other sizes (a family that takes any brings them to the nearest that it was trained on).

        Raises:
            ValueError: a picture of another size, dtype or range, or an option out of range.
        """
        longest, images = self._longest(max_text_tokens), self.pictures.fitting(image := opened(image), resize)
        pixels = images.images(image, resize)
        codes = self.pictures.encode(pixels)
        return TaskCall(TaskInputs(len(codes), codes=codes, longest=longest), images=images, shown=pixels)

    @task_method
    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        max_text_tokens: int | None = None,
        resize: bool = False,
        **options: Any,
    ) -> TaskCall:
        """Answer questions about pictures; one picture with several questions, or the other way round, is fine too.

        Raises:
            ValueError: as for `caption`; an empty or too long question; lists of different lengths.
        """
        said, longest = texts_of(question, "question"), self._longest(max_text_tokens)
        images = self.pictures.fitting(image := opened(image), resize)
        pixels = images.images(image, resize)  # [B, 3, H, W]
        rows = columns_of(1, image=list(pixels), codes=list(self.pictures.encode(pixels)), question=said)
        inputs = TaskInputs(len(rows["question"]), rows["question"], codes=rows["codes"], longest=longest)
        return TaskCall(inputs, said=said, images=images, shown=rows["image"])

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
        strength: float = 1.0,
        **options: Any,
    ) -> TaskCall:
        """Fill holes in pictures and in their captions together. Every other token stays exactly as it was.

        Args:
            image: one or several pictures, paths or addresses.
            mask_image: white where to repaint, as large as the picture, see `white_pixels`; a code is decoded again when
                any of its pixels is white. None repaints nothing.
            text: captions with `<mask>` holes; without holes the caption guides the picture. None: a caption of unknown
                words, where the family writes one.
            max_text_tokens: longest caption, when `text` is None.
            strength: share of the steps to run, in (0, 1], where the family can redraw a picture in part of them: codes
                are hidden by a coin each, as many as the steps before would leave.
            negative_prompt: what guidance leads away from, where the family is guided by other words.
            paste_back: put the picture's own pixels back outside the mask (its codes are exact without that).
            resize: accept pictures of other sizes.

        Raises:
            ValueError: nothing to decode, a mask of another size, text that does not fit, or as for `caption`.
        """
        flag(paste_back, "paste_back")
        longest, said, away = self._longest(max_text_tokens, text), self._captions(text), None
        check_value(strength, float, "strength")
        if not 0 < strength <= 1 or (strength < 1 and not self.layout.strengths):
            most = "a number in (0, 1]" if self.layout.strengths else f"1, as {self.layout.family} runs all its steps"
            raise ValueError(f"strength is {strength}; expected {most}")
        if negative_prompt is not None:
            away = texts_of(negative_prompt, "negative_prompt", empty=True)
        images = self.pictures.fitting(image := opened(image), resize)
        pixels = images.images(image, resize)  # [B, 3, H, W]
        holes = torch.zeros(1, *images.size, dtype=torch.bool)
        if mask_image is not None:
            holes = images.masks(mask_image, image, resize)  # [B, H, W]
        columns = {"image": list(pixels), "mask_image": list(holes), "codes": list(self.pictures.encode(pixels))}
        rows = columns_of(num_images_per_prompt, **columns, text=said, negative_prompt=away)
        cells = None if mask_image is None else images.cells(rows["mask_image"])
        inputs = TaskInputs(
            len(rows["image"]),
            rows.get("text"),
            rows.get("negative_prompt"),
            codes=rows["codes"],
            holes=cells,
            strength=strength,
            longest=longest,
        )
        paste = (rows["image"], rows["mask_image"]) if paste_back else None
        told = [*between_holes(said or ()), *(away or ())]
        return TaskCall(inputs, num_images_per_prompt, told, images, paste=paste)

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
        **options: Any,
    ) -> TaskCall:
        """Change pictures as told.

        Args:
            image: one or several, of one size.
            prompt: what to change.
            reference: one further picture for each (a style, a subject).
            mask_image: white where the picture may change; everywhere when left out.
            height, width: of the result, in pixels; as the picture when left out.

        Raises:
            ValueError: an empty prompt, a size together with a mask, or as for `caption`.
        """
        said = texts_of(prompt, "prompt")
        images = self.pictures.fitting(image := opened(image), resize)
        columns: dict[str, Any] = {"image": list(self.pictures.encode(images.images(image, resize))), "prompt": said}
        if reference is not None:
            other = self.pictures.fitting(reference := opened(reference, "reference"), resize)
            columns["reference"] = list(self.pictures.encode(other.images(reference, resize)))
        if mask_image is not None:
            columns["mask_image"] = list(images.cells(images.masks(mask_image, image, resize)))
        rows = columns_of(num_images_per_prompt, **columns)
        inputs = TaskInputs(
            len(rows["prompt"]),
            rows["prompt"],
            codes=rows["image"],
            holes=rows.get("mask_image"),
            references=rows.get("reference"),
            grid=self.pictures.grid(height, width),
        )
        return TaskCall(inputs, num_images_per_prompt, said, images)

    @task_method
    def generate(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        max_text_tokens: int | None = None,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> TaskCall:
        """Make a picture and its caption together, from nothing, from a few words, or from either one.

        Args:
            text: None for a caption of unknown words, or captions with holes as for `inpaint`.
            image: None for pictures of unknown content, or known pictures.
            num_images_per_prompt: rows per text or image.

        Raises:
            ValueError: text and image both known in full, or as for `inpaint`.
        """
        longest, said = self._longest(max_text_tokens, text), self._captions(text)
        flag(resize, "resize")
        images, codes = self.image_inputs, None
        if image is not None:
            images = self.pictures.fitting(image := opened(image), resize)
            codes = list(self.pictures.encode(images.images(image, resize)))
        rows = columns_of(num_images_per_prompt, rows=[0], image=codes, text=said)
        inputs = TaskInputs(len(rows["rows"]), rows.get("text"), codes=rows.get("image"), longest=longest)
        return TaskCall(inputs, num_images_per_prompt, between_holes(said or ()), images)

    @task_method
    def chat(self, messages: Turn | Sequence[Turn], max_text_tokens: int | None = None, **options: Any) -> TaskCall:
        """Answer in words.

        Args:
            messages: a question, a conversation (messages `{"role": ..., "content": ...}`), or several of either.
            max_text_tokens: of an answer, its end included; 128 where left out.

        Raises:
            ValueError: an empty question, or an option out of range.
        """
        several = as_list(messages, "message")
        turns = check_turns([several] if all(isinstance(message, Mapping) for message in several) else several)
        inputs = TaskInputs(len(turns), turns=turns, longest=self._longest(max_text_tokens, usual=128))
        return TaskCall(inputs, said=words_of_turns(turns))

    @task_method
    def complete(self, prompt: str | Sequence[str], max_text_tokens: int | None = None, **options: Any) -> TaskCall:
        """Go on with texts as they are (base models); at most `max_text_tokens`, 128 where left out.

        Raises:
            ValueError: an empty prompt, or an option out of range.
        """
        said = texts_of(prompt, "prompt", holes=True)
        inputs = TaskInputs(len(said), said, longest=self._longest(max_text_tokens, usual=128))
        return TaskCall(inputs, said=said)

    @task_method
    def infill(self, text: str | Sequence[str], **options: Any) -> TaskCall:
        """Fill `<mask>` holes in texts.

        Raises:
            ValueError: a text without holes, or an option out of range.
        """
        said = texts_of(text, "text", holes=True)
        return TaskCall(TaskInputs(len(said), said), said=between_holes(said))

    def _longest(self, max_text_tokens: int | None, text: Any = None, usual: int | None = None) -> int:
        if max_text_tokens is None:
            return usual or self.layout.longest
        if text is not None:
            raise ValueError(
                "max_text_tokens is for texts of unknown length, but text says its own; leave one of them out"
            )
        return whole(max_text_tokens, "max_text_tokens", 1, self.layout.most)

    def _captions(self, text: str | Sequence[str] | None) -> list[str] | None:
        return None if text is None else texts_of(text, "text", holes=True)
