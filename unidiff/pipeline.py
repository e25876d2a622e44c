"""`UniDiffPipeline`: text-to-image, captions, answers, joint inpainting and joint generation with one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from unidiff.decoding import CacheConfig, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.graphs import Record
from unidiff.hub import ALL_FILES, locate
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.auto_cache import choose_cache
from unidiff.pipelines.candidates import candidate_seeds, keep_best
from unidiff.pipelines.checks import check_fit, check_negative, read_dtype
from unidiff.pipelines.decode import (
    OUTPUT_TYPES,
    DecodeOptions,
    StepCallback,
    StepWatcher,
    guidance_condition,
    trajectory_of,
)
from unidiff.pipelines.folder import forget_origins, is_pipeline, load_parts, write_folder
from unidiff.pipelines.inputs import ImageInputs, as_list, broadcast, repeated
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.released_folder import is_released, load_released_pipeline
from unidiff.pipelines.rows import TextSlot, TextSlots, build_batch
from unidiff.pipelines.seeds import RowGenerator, row_seeds
from unidiff.pipelines.settings import PipelineSettings, by_modality, check_candidates, with_overrides
from unidiff.pipelines.tasks import call_task
from unidiff.tokens import TokenBatch
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer


class UniDiffPipeline(DiffusionPipeline):
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

    def __init__(
        self,
        transformer: MaskedTransformer,
        image_tokenizer: Any,
        text_tokenizer: Any,
        settings: PipelineSettings | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(settings, PipelineSettings):
            settings = PipelineSettings.from_dict(settings or {})
        if isinstance(image_tokenizer, VQImageTokenizer):
            image_tokenizer = image_tokenizer.model
        if isinstance(text_tokenizer, TextTokenizer):
            text_tokenizer = text_tokenizer.tokenizer
        self.register_modules(
            transformer=transformer.eval(), image_tokenizer=image_tokenizer, text_tokenizer=text_tokenizer
        )
        self.register_to_config(settings=settings.to_dict())
        self.settings = settings
        self.images = VQImageTokenizer(image_tokenizer)
        self.texts = TextTokenizer(text_tokenizer)
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
        """
        chosen = dtype if torch_dtype is None else torch_dtype
        folder = locate(name, ALL_FILES, **hub_options) / (subfolder or "")
        if not is_pipeline(folder) and is_released(folder):
            own = None if chosen is None else read_dtype(chosen)
            return load_released_pipeline(folder, own, image_tokenizer=image_tokenizer, text_tokenizer=text_tokenizer)
        parts = load_parts(folder, read_dtype(chosen))
        return cls(parts.transformer, parts.image_tokenizer, parts.text_tokenizer, parts.settings)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the whole folder (safetensors, in the dtype of the weights), or nothing.

        Raises:
            ValueError: a folder that holds something else than a pipeline.
        """

        def write(folder: Path) -> None:
            DiffusionPipeline.save_pretrained(self, str(folder), **kwargs)
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
            negative_prompt: what guidance leads away from, one for all prompts or one each; hidden words when left out.

        Raises:
            ValueError: an empty prompt, one longer than the model holds, or an option out of range.
        """
        slots, away = [self.text_slots.prompt(p) for p in as_list(prompt, "prompt")], None
        if negative_prompt is not None:
            unwanted = [self.text_slots.prompt(p) for p in as_list(negative_prompt, "negative_prompt")]
            slots, unwanted = broadcast(prompt=slots, negative_prompt=unwanted)
            away, _ = repeated(unwanted, num_images_per_prompt)
        slots, count = repeated(slots, num_images_per_prompt)
        return self._decode("text_to_image", slots, None, None, per_entry=count, negative=away, **options)

    def caption(
        self, image: Any, max_text_tokens: int | None = None, resize: bool = False, **options: Unpack[DecodeOptions]
    ) -> UniDiffOutput:
        """Describe pictures.

        Args:
            image: one or several pictures, see `ImageInputs.images`.
            max_text_tokens: longest caption.
            resize: accept other sizes.

        Raises:
            ValueError: a picture of another size, mode, dtype or range, or an option out of range.
        """
        codes = self._encode(image, resize)
        slots = [self.text_slots.hidden(max_text_tokens)] * len(codes)
        return self._decode("caption", slots, codes, None, pictures=False, **options)

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
        slots = [self.text_slots.question(q, max_text_tokens) for q in as_list(question, "question")]
        images, slots = broadcast(image=list(self._encode(image, resize)), question=slots)
        return self._decode("answer", slots, torch.stack(images), None, pictures=False, **options)

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
            image: one or several pictures.
            mask_image: white where to repaint, as large as the picture; a code is decoded again when any of its pixels
                is white. None repaints nothing.
            text: captions with holes: `<mask>` hides one token (a word and the space before it, for most words),
                `<mask:3>` three; without holes the caption guides the picture. None: a caption of unknown words.
            max_text_tokens: longest caption, when `text` is None.
            paste_back: put the picture's own pixels back outside the mask (its codes are exact without that).
            resize: accept pictures of other sizes.

        Raises:
            ValueError: nothing to decode, a mask of another size, text that does not fit, or as for `caption`.
        """
        pixels = self.image_inputs.images(image, resize)  # [B, 3, H, W]
        if mask_image is None:
            holes = torch.zeros(1, *self.image_size, dtype=torch.bool)
        else:
            holes = self.image_inputs.masks(mask_image, image, resize)  # [B, H, W]
        given, masks, slots = broadcast(
            image=list(self.images.encode(pixels)), mask_image=list(holes), text=self._captions(text, max_text_tokens)
        )
        if paste_back:
            pixels = pixels.expand(len(given), -1, -1, -1)
        codes, mask = torch.stack(given), torch.stack(masks)
        slots, count = repeated(slots, num_images_per_prompt)
        codes, mask = (x.repeat_interleave(count, 0) for x in (codes, mask))
        paste = (pixels.repeat_interleave(count, 0), mask) if paste_back else None
        return self._decode(
            "inpaint", slots, codes, self.image_inputs.cells(mask), paste=paste, per_entry=count, **options
        )

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
        captions = self._captions(text, max_text_tokens)
        codes = None
        if image is not None:
            given, captions = broadcast(image=list(self._encode(image, resize)), text=captions)
            codes = torch.stack(given)
        slots, count = repeated(captions, num_images_per_prompt)
        codes = None if codes is None else codes.repeat_interleave(count, 0)
        return self._decode("generate", slots, codes, None, per_entry=count, **options)

    @torch.no_grad()
    def _decode(
        self,
        task: str,
        slots: Sequence[TextSlot],
        codes: Tensor | None,
        hidden: Tensor | None,
        *,
        pictures: bool = True,
        paste: tuple[Tensor, Tensor] | None = None,
        per_entry: int = 1,
        negative: Sequence[TextSlot] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_hides: str | None = None,
        temperature: float | None = None,
        sampler: SamplerConfig | None = None,
        cache: str | CacheConfig | None = None,
        policy: RefreshPolicy | None = None,
        block_length: int | Mapping[str, int] | None = None,
        threshold: float | Mapping[str, float] | None = None,
        num_candidates: int | None = None,
        graphs: bool | Record = False,
        generator: RowGenerator = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        record_trajectory: bool = False,
    ) -> UniDiffOutput:
        """The one path of all tasks: rows, sampler, and back to words and pixels."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
        settings = self.settings
        if num_candidates is None:
            num_candidates = settings.num_candidates.get(task, 1)
        check_candidates(num_candidates)
        # 1. settings of the decode
        never = self.text_slots.never(closed=all(slot.closed for slot in slots))
        blocks = by_modality("block_length", block_length, ("text", "image"))
        least = by_modality("threshold", threshold, ("image",) if task == "text_to_image" else ("text",))
        config = sampler or settings.sampler(task)
        config = with_overrides(config, steps, guidance_scale, guidance_hides, temperature, never, blocks, least)
        # 2. rows: text span, image span, what is known
        tries = torch.arange(len(slots)).repeat_interleave(num_candidates)
        batch = self._rows(slots, codes, hidden).rows(tries)  # [B * candidates, L]
        away = None
        if negative is not None:
            check_negative(config.guidance)
            away = self._rows(negative, codes, hidden).rows(tries)
        condition = guidance_condition(batch, config.guidance.hide) if away is None else None
        seeds = candidate_seeds(row_seeds(generator, len(slots), per_entry), num_candidates)
        choice = choose_cache(cache, policy, batch, config, self.transformer)
        # 3. decode
        self._interrupt, targets = False, int(batch.targets.sum())
        with self.progress_bar(total=targets) as bar:
            watcher = StepWatcher(self, bar, targets, callback_on_step_end)
            run = Sampler(self.transformer, settings.vocabulary, config, choice.policy, graphs=graphs)
            out = run(batch, seeds.to(batch.ids.device), condition, watcher, record_trajectory, away)
            watcher.finish()
        if num_candidates > 1:
            out, best = keep_best(out, self.transformer, settings.vocabulary, num_candidates)
            seeds = seeds[best.cpu()]
        # 4. back to words and pixels
        ids = out.batch.ids.cpu()
        text_ids = [self.text_slots.words(row, slot) for row, slot in zip(ids, slots, strict=True)]
        codes = ids[:, settings.text_length :].unflatten(1, settings.grid) - settings.vocabulary.image[0]  # [B, h, w]
        trajectory = None
        if out.trajectory is not None:
            trajectory = trajectory_of(out.trajectory, slots, self.text_slots, settings, self.images.decode)
        return UniDiffOutput(
            images=self._pictures(codes, output_type, paste) if pictures else None,
            texts=[self.texts.decode(words).strip() for words in text_ids],
            codes=codes,
            text_ids=text_ids,
            ids=ids,
            confidences=out.confidence.cpu(),
            nfe=out.nfe,
            seconds=out.seconds,
            seeds=seeds,
            trajectory=trajectory,
            stats=out.stats,
            cache=choice.config,
            cache_note=choice.note,
        )

    def _rows(self, slots: Sequence[TextSlot], codes: Tensor | None, hidden: Tensor | None) -> TokenBatch:
        return build_batch(slots, codes, hidden, self.settings).to(self._execution_device)

    def _encode(self, image: Any, resize: bool) -> Tensor:
        """Pictures to codes int64 `[B, h, w]`."""
        return self.images.encode(self.image_inputs.images(image, resize)).cpu()

    def _captions(self, text: str | Sequence[str] | None, max_text_tokens: int | None) -> list[TextSlot]:
        if text is None:
            return [self.text_slots.hidden(max_text_tokens)]
        return [self.text_slots.template(t) for t in as_list(text, "text")]

    def _pictures(self, codes: Tensor, output_type: str, paste: tuple[Tensor, Tensor] | None) -> Any:
        if output_type == "codes":
            return codes
        images = self.images.decode(codes).cpu()  # [B, 3, H, W]
        if paste is not None:
            original, mask = paste
            images = torch.where(mask[:, None], images, original)
        return self.image_inputs.output(images, output_type)
