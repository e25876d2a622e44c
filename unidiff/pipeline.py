"""`UniDiffPipeline`: text-to-image, captions, answers, joint inpainting and joint generation with one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from unidiff.hub import ALL_FILES, HUB_OPTIONS, locate
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.arguments import check_keywords, repeated, task_method, texts_of
from unidiff.pipelines.checks import check_fit, read_dtype
from unidiff.pipelines.components import SharedParts
from unidiff.pipelines.decode import DecodeOptions
from unidiff.pipelines.folder import forget_origins, is_pipeline, load_parts, write_folder
from unidiff.pipelines.holes import between_holes
from unidiff.pipelines.inputs import ImageInputs, broadcast, opened
from unidiff.pipelines.native_run import TaskRows, decode_rows
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.released_folder import is_released, load_released_pipeline
from unidiff.pipelines.rows import TextSlot, TextSlots, build_batch
from unidiff.pipelines.settings import PipelineSettings
from unidiff.pipelines.tasks import call_task
from unidiff.schema import check_value
from unidiff.tokens import TokenBatch
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.weights.saving import check_save_options


class UniDiffPipeline(SharedParts, DiffusionPipeline):
    """One masked diffusion model over text and image tokens, with everything around it.

    All tasks are the same decode with other tokens known; they share the keyword arguments of `DecodeOptions`.

    Args:
        transformer: the denoiser.
        image_tokenizer: a `VQImageTokenizer`, or the model inside one.
        text_tokenizer: a `TextTokenizer`, or the Hugging Face tokenizer inside one.
        settings: `PipelineSettings`, or its plain-data form; saved in `model_index.json`.

    Raises:
        ValueError: parts that do not fit together.
    """

    transformer: MaskedTransformer
    image_tokenizer: Any
    text_tokenizer: Any
    model_cpu_offload_seq = "transformer->image_tokenizer"  # type: ignore[assignment]
    _component_names = ("transformer", "image_tokenizer", "text_tokenizer", "settings")

    def __init__(
        self,
        transformer: MaskedTransformer,
        image_tokenizer: Any,
        text_tokenizer: Any,
        settings: PipelineSettings | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(settings, PipelineSettings):
            settings = PipelineSettings.from_dict({} if settings is None else settings)
        check_value(transformer, torch.nn.Module, "transformer")
        images, texts = image_tokenizer, text_tokenizer
        self.images = images if isinstance(images, VQImageTokenizer) else VQImageTokenizer(images)
        self.texts = texts if isinstance(texts, TextTokenizer) else TextTokenizer(texts)
        parts = {"image_tokenizer": self.images.model, "text_tokenizer": self.texts.tokenizer}
        self.register_modules(transformer=transformer.eval(), **parts)
        self.register_to_config(settings=settings.to_dict())
        self.settings = settings
        check_fit(transformer, self.images, self.texts, settings)
        factor = self.images.factor
        self.image_inputs = ImageInputs((settings.grid[0] * factor, settings.grid[1] * factor), factor)
        self.text_slots = TextSlots(self.texts, settings)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """True once a callback has asked the running decode to finish."""
        return self._interrupt

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_inputs.size

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str | None = None,
        image_tokenizer: str | Path | None = None,
        text_tokenizer: str | Path | None = None,
        **hub_options: Any,
    ) -> Self:
        """Load a folder, a hub model `owner/name`, or an embedded model (`"emoji"`), strictly.

        The folder of a released family gives a `ReleasedPipeline` (UniDisc, MMaDA, Lumina-DiMOO, LLaDA, Dream) or a
        `MudditPipeline` instead, which has the task methods of this class that its model can do.

        Args:
            name: where.
            dtype: of the weights in memory; `torch_dtype` is the same. Left out: float32, or the checkpoint's own for a
                released family.
            subfolder: below `name`, for instance Muddit's `512`.
            image_tokenizer, text_tokenizer: where they are, for a released family that comes without.
            hub_options: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: nothing there, or a part is missing.
            ValueError: another family, unknown settings, or weights that are missing, unexpected, misshaped or NaN.
            TypeError: an unknown argument.
        """
        check_keywords(cls.from_pretrained, hub_options, HUB_OPTIONS)
        if dtype is not None and torch_dtype is not None and read_dtype(dtype) != read_dtype(torch_dtype):
            raise ValueError(f"dtype is {dtype} and torch_dtype {torch_dtype}, which mean the same; give one of them")
        chosen = dtype if torch_dtype is None else torch_dtype
        check_value(subfolder, str | None, "subfolder")
        folder = locate(name, ALL_FILES, **hub_options) / (subfolder or "")
        if not is_pipeline(folder) and is_released(folder):
            own = None if chosen is None else read_dtype(chosen)
            return load_released_pipeline(folder, own, image_tokenizer=image_tokenizer, text_tokenizer=text_tokenizer)
        if image_tokenizer is not None or text_tokenizer is not None:
            raise ValueError(f"{str(folder)!r} brings its own tokenizers; leave image_tokenizer and text_tokenizer out")
        parts = load_parts(folder, read_dtype(chosen))
        try:
            return cls(parts.transformer, parts.image_tokenizer, parts.text_tokenizer, parts.settings)
        except ValueError as error:
            raise ValueError(f"the parts in {str(folder)!r} do not fit together: {error}") from error

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, max_shard_size: int | str | None = None, **options: Any
    ) -> None:
        """Write the whole folder (safetensors, in the dtype of the weights), or nothing.

        A pipeline that was saved there before is replaced; a link is written through.

        Args:
            max_shard_size: bytes, or text such as "5GB"; larger weights become several files. None: 10 GB.
            options: diffusers' others, of which only the defaults are taken.

        Raises:
            ValueError: a folder that holds anything that is no part of a pipeline of ours, an argument that
                `from_pretrained` could not follow, or weights that hold NaN or have no values.
            OSError: a full or read-only disk; the message names the folder.
        """
        check_save_options(options, max_shard_size)

        def write(folder: Path) -> None:
            DiffusionPipeline.save_pretrained(self, str(folder), max_shard_size=max_shard_size)
            forget_origins(folder)

        write_folder(save_directory, write)

    def __call__(
        self, prompt: str | Sequence[str] | None = None, task: str | None = None, **inputs: Any
    ) -> UniDiffOutput:
        """The task that the inputs mean: `pipe("a dog")`, `pipe(image=picture)`, `pipe(image=picture, question="what?")`.

        A prompt alone: `text_to_image`. A picture: `caption`; with a question `answer`; with a mask or text `inpaint`.
        Text with holes, or nothing: `generate` (a picture and its caption).

        Args:
            prompt: one or several captions to draw.
            task: the name of a method, where it is not the one that the inputs mean.
            inputs: the arguments of that method.

        Raises:
            ValueError: inputs that no task takes together, and as for that task.
        """
        return call_task(self, prompt, task, inputs)

    @task_method(DecodeOptions.__annotations__)
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        **options: Unpack[DecodeOptions],
    ) -> UniDiffOutput:
        """Draw pictures from words.

        Args:
            prompt: one or several captions.
            num_images_per_prompt: rows per prompt, next to each other in the results.
            negative_prompt: what guidance leads away from, one for all prompts or one each; "" for hidden words. Left out:
                what `guidance_hides` says.

        Raises:
            ValueError: an empty prompt, one with `<mask>` holes or longer than the model holds, or an option out of range.
        """
        said, away = texts_of(prompt, "prompt"), None
        slots = [self.text_slots.prompt(p) for p in said]
        if negative_prompt is not None:
            unwanted = texts_of(negative_prompt, "negative_prompt", empty=True)
            columns = broadcast(
                prompt=slots,
                negative_prompt=[
                    self.text_slots.prompt(p, "negative_prompt") if p.strip() else self.text_slots.unsaid()
                    for p in unwanted
                ],
            )
            slots, away = columns[0], repeated(columns[1], num_images_per_prompt)[0]
            said = [*said, *unwanted]
        slots, count = repeated(slots, num_images_per_prompt)
        return decode_rows(self, TaskRows("text_to_image", slots, None, None, said, count, away), options)

    @task_method(DecodeOptions.__annotations__)
    def caption(
        self, image: Any, max_text_tokens: int | None = None, resize: bool = False, **options: Unpack[DecodeOptions]
    ) -> UniDiffOutput:
        """Describe pictures.

        Args:
            image: one or several pictures, paths or addresses, see `ImageInputs.images`.
            max_text_tokens: longest caption.
            resize: accept other sizes.

        Raises:
            ValueError: a picture of another size, dtype or range, or an option out of range.
        """
        slot, pixels = self.text_slots.hidden(max_text_tokens), self.image_inputs.images(image, resize)
        codes = self._encode(pixels)
        return decode_rows(self, TaskRows("caption", [slot] * len(codes), codes, shown=pixels), options)

    @task_method(DecodeOptions.__annotations__)
    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        max_text_tokens: int | None = None,
        resize: bool = False,
        **options: Unpack[DecodeOptions],
    ) -> UniDiffOutput:
        """Answer questions about pictures; one picture with several questions, or the other way round, is fine too.

        Raises:
            ValueError: as for `caption`; an empty or too long question; lists of different lengths.
        """
        said = texts_of(question, "question")
        slots = [self.text_slots.question(q, max_text_tokens) for q in said]
        pixels = self.image_inputs.images(image, resize)  # [B, 3, H, W]
        shown, codes, slots = broadcast(image=list(pixels), codes=list(self._encode(pixels)), question=slots)
        rows = TaskRows("answer", slots, torch.stack(codes), None, said, shown=torch.stack(shown))
        return decode_rows(self, rows, options)

    @task_method(DecodeOptions.__annotations__)
    def inpaint(
        self,
        image: Any,
        mask_image: Any = None,
        text: str | Sequence[str] | None = None,
        max_text_tokens: int | None = None,
        paste_back: bool = False,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        **options: Unpack[DecodeOptions],
    ) -> UniDiffOutput:
        """Fill holes in pictures and in their captions together. Every other token stays exactly as it was.

        Args:
            image: one or several pictures, paths or addresses.
            mask_image: white where to repaint, as large as the picture, see `white_pixels`; a code is decoded again when
                any of its pixels is white. None repaints nothing.
            text: captions with holes: `<mask>` hides one token (a word and the space before it, for most words),
                `<mask:3>` three; without holes the caption guides the picture. None: a caption of unknown words.
            max_text_tokens: longest caption, when `text` is None.
            paste_back: put the picture's own pixels back outside the mask (its codes are exact without that).
            resize: accept pictures of other sizes.

        Raises:
            ValueError: nothing to decode, a mask of another size, text that does not fit, or as for `caption`.
        """
        captions, said = self._captions(text, max_text_tokens)
        image = opened(image)
        pixels = self.image_inputs.images(image, resize)  # [B, 3, H, W]
        holes = torch.zeros(1, *self.image_size, dtype=torch.bool)
        if mask_image is not None:
            holes = self.image_inputs.masks(mask_image, image, resize)  # [B, H, W]
        columns = broadcast(image=list(pixels), mask_image=list(holes), text=captions, codes=list(self._encode(pixels)))
        shown, masks, slots, codes = (repeated(column, num_images_per_prompt)[0] for column in columns)
        mask = torch.stack(masks)
        paste = (torch.stack(shown), mask) if paste_back else None
        cells = self.image_inputs.cells(mask)
        rows = TaskRows("inpaint", slots, torch.stack(codes), cells, said, num_images_per_prompt, paste=paste)
        return decode_rows(self, rows, options)

    @task_method(DecodeOptions.__annotations__)
    def generate(
        self,
        text: str | Sequence[str] | None = None,
        image: Any = None,
        max_text_tokens: int | None = None,
        resize: bool = False,
        num_images_per_prompt: int = 1,
        **options: Unpack[DecodeOptions],
    ) -> UniDiffOutput:
        """Make a picture and its caption together, from nothing, from a few words, or from either one.

        Args:
            text: None for a caption of unknown words, or captions with holes as for `inpaint`.
            image: None for pictures of unknown content, or known pictures.
            num_images_per_prompt: rows per text or image.

        Raises:
            ValueError: text and image both known in full, or as for `inpaint`.
        """
        captions, said = self._captions(text, max_text_tokens)
        codes = None
        if image is not None:
            known = self._encode(self.image_inputs.images(image, resize))
            columns = broadcast(image=list(known), text=captions)
            given, captions = (repeated(column, num_images_per_prompt)[0] for column in columns)
            codes = torch.stack(given)
        else:
            captions, _ = repeated(captions, num_images_per_prompt)
        rows = TaskRows("generate", captions, codes, None, said, num_images_per_prompt)
        return decode_rows(self, rows, options)

    def _rows(self, slots: Sequence[TextSlot], codes: Tensor | None, hidden: Tensor | None) -> TokenBatch:
        return build_batch(slots, codes, hidden, self.settings).to(self._execution_device)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pictures float `[B, 3, H, W]` to codes int64 `[B, h, w]`."""
        return self.images.encode(pixels).cpu()

    def _captions(
        self, text: str | Sequence[str] | None, max_text_tokens: int | None
    ) -> tuple[list[TextSlot], list[str]]:
        """Text slots of captions with holes, and the words that they give."""
        if text is None:
            return [self.text_slots.hidden(max_text_tokens)], []
        texts = texts_of(text, "text")
        return [self.text_slots.template(t) for t in texts], between_holes(texts)
