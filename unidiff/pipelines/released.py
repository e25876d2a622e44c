"""Released families as pipelines: the same task methods as `UniDiffPipeline`, over a family's own rows and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import RefreshPolicy, SamplerConfig
from unidiff.pipelines.inputs import ImageInputs, as_list, broadcast
from unidiff.pipelines.muddit import MudditPipeline
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.released_tasks import FamilyTasks, check_family, tasks_of
from unidiff.pipelines.seeds import RowGenerator, row_seeds
from unidiff.pipelines.settings import with_overrides
from unidiff.released.families import FAMILIES
from unidiff.released.loading import PIPELINE_PARTS, Released, load_released, read_config
from unidiff.released.native import RECORD
from unidiff.released.tasks import TaskRequest, run_task
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.tokens.vocabulary import Vocabulary

IMAGE_PLACES = ("image_tokenizer", "vqvae", "magvitv2", "vq_ds16_c2i.pt", "vq_ds8_c2i.pt")
TEXT_PLACES = ("text_tokenizer", "tokenizer", ".")


@dataclass(frozen=True)
class ReleasedOptions:
    """Everyday knobs of one call; None keeps the family's default.

    Args:
        generator: seeds, as for `UniDiffPipeline`.
        steps, guidance_scale, temperature: as for `UniDiffPipeline`.
        sampler: replaces the family's settings.
        policy: a cache policy.
        output_type: "pil", "pt", "np" or "codes".
    """

    generator: RowGenerator = None
    steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    sampler: SamplerConfig | None = None
    policy: RefreshPolicy | None = None
    output_type: str = "pil"


class ReleasedPipeline:
    """UniDisc, MMaDA or Lumina-DiMOO with its tokenizers.

    Words in texts are hidden with `<mask>` or `<mask:3>`. Every method takes the fields of `ReleasedOptions` as keyword
    arguments and returns a `UniDiffOutput`; `tasks.names` lists what the model can do.

    Args:
        released: the network.
        tasks: the family's tasks.
        images, texts: the tokenizers that it was trained with.
        grid: rows and columns of codes, for models that draw any size; None for the usual.
    """

    def __init__(
        self,
        released: Released,
        tasks: FamilyTasks,
        images: VQImageTokenizer,
        texts: TextTokenizer,
        grid: tuple[int, int] | None = None,
    ) -> None:
        vocabulary = released.vocabulary
        if vocabulary is None or vocabulary.image_size != images.codebook_size:
            size = None if vocabulary is None else vocabulary.image_size
            raise ValueError(
                f"the image tokenizer has {images.codebook_size} codes, but the model {size}; give the one it was "
                "trained with"
            )
        fewest = vocabulary.text_size if released.family.name == "unidisc" else 0
        if not fewest <= texts.size <= vocabulary.text_size + 1:  # with or without [MASK]; others leave ids unused
            raise ValueError(
                f"the text tokenizer has {texts.size} ids, but the model {vocabulary.text_size}; give the one it was "
                "trained with"
            )
        if grid is not None and not tasks.sizes:
            raise ValueError(f"{released.family.name} draws pictures of one size; leave grid out")
        self.released, self.tasks, self.images, self.texts = released, tasks, images, texts
        self.vocabulary, self.grid = vocabulary, grid or tasks.grid
        self.image_inputs = ImageInputs((self.grid[0] * images.factor, self.grid[1] * images.factor), images.factor)

    @property
    def transformer(self) -> Any:
        """The network."""
        return self.released.model

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_inputs.size

    def to(self, *args: Any, **kwargs: Any) -> ReleasedPipeline:
        """Move network and image tokenizer, as `nn.Module.to`."""
        self.released.model.to(*args, **kwargs)
        self.images.to(*args, **kwargs)
        return self

    def sized(self, height: int, width: int) -> ReleasedPipeline:
        """The same for pictures of another size in pixels, where the model draws any.

        Raises:
            ValueError: a model of one size, or a side that the image tokenizer's factor does not divide.
        """
        factor = self.images.factor
        if height % factor or width % factor:
            raise ValueError(f"image size {height}x{width} must be a multiple of {factor}")
        grid = (height // factor, width // factor)
        return ReleasedPipeline(self.released, self.tasks, self.images, self.texts, grid)

    def text_to_image(
        self, prompt: str | Sequence[str], num_images_per_prompt: int = 1, **options: Any
    ) -> UniDiffOutput:
        """Draw pictures from words.

        Raises:
            ValueError: an empty prompt, one longer than the model holds, or an option out of range.
        """
        prompts = [p for p in as_list(prompt, "prompt") for _ in range(num_images_per_prompt)]
        return self._run(self.tasks.text_to_image(prompts, self.grid), options, num_images_per_prompt)

    def caption(self, image: Any, max_text_tokens: int = 64, resize: bool = False, **options: Any) -> UniDiffOutput:
        """Describe pictures.

        Raises:
            ValueError: a picture of another size, mode, dtype or range, or an option out of range.
        """
        request = self.tasks.caption(self._encode(image, resize), max_text_tokens)
        return self._run(request, options, pictures=False, longest=max_text_tokens)

    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        max_text_tokens: int = 64,
        resize: bool = False,
        **options: Any,
    ) -> UniDiffOutput:
        """Answer questions about pictures; one picture with several questions, or the other way round, is fine too.

        Raises:
            ValueError: a model that was not trained for it, an empty question, or as for `caption`.
        """
        codes, questions = broadcast(image=list(self._encode(image, resize)), question=as_list(question, "question"))
        request = self.tasks.answer(torch.stack(codes), questions, max_text_tokens)
        return self._run(request, options, pictures=False, longest=max_text_tokens)

    def inpaint(
        self,
        image: Any,
        mask_image: Any = None,
        text: str | Sequence[str] = "",
        resize: bool = False,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> UniDiffOutput:
        """Fill holes in pictures (white in the mask) and in their captions (`<mask>`) together.

        Raises:
            ValueError: nothing to decode, a mask of another size, text that does not fit, or as for `caption`.
        """
        codes = self._encode(image, resize)  # [B, h, w]
        holes = torch.zeros(1, *codes.shape[1:], dtype=torch.bool)
        if mask_image is not None:
            holes = self.image_inputs.cells(self.image_inputs.masks(mask_image, image, resize))
        columns = broadcast(image=list(codes), mask_image=list(holes), text=as_list(text, "text"))
        given, hidden, prompts = ([x for x in column for _ in range(num_images_per_prompt)] for column in columns)
        request = self.tasks.inpaint(prompts, torch.stack(given), torch.stack(hidden))
        return self._run(request, options, num_images_per_prompt)

    def generate(self, num_images_per_prompt: int = 1, max_text_tokens: int = 64, **options: Any) -> UniDiffOutput:
        """Make pictures and their captions together, from nothing.

        Raises:
            ValueError: an option out of range.
        """
        request = self.tasks.generate(num_images_per_prompt, max_text_tokens)
        return self._run(request, options, num_images_per_prompt, longest=max_text_tokens)

    def _run(
        self,
        request: TaskRequest,
        options: Mapping[str, Any],
        per_entry: int = 1,
        pictures: bool = True,
        longest: int | None = None,
    ) -> UniDiffOutput:
        chosen = ReleasedOptions(**options)
        config = chosen.sampler or request.config
        config = with_overrides(config, chosen.steps, chosen.guidance_scale, temperature=chosen.temperature)
        seeds = row_seeds(chosen.generator, len(request.batch.ids), per_entry)
        done = run_task(self.transformer, self.vocabulary, replace(request, config=config), seeds, chosen.policy)
        words = [ids[:longest] for ids in done.texts]  # where no end-of-text came, its place holds one more word
        codes = torch.stack([row[-1] for row in done.codes]).cpu()  # [B, h, w]
        return UniDiffOutput(
            images=self._pictures(codes, chosen.output_type) if pictures else None,
            texts=[self.texts.decode([i for i in ids if i < self.texts.size]).strip() for ids in words],
            codes=codes,
            text_ids=words,
            ids=done.output.batch.ids.cpu(),
            confidences=done.output.confidence.cpu(),
            nfe=done.output.nfe,
            seconds=done.output.seconds,
            seeds=seeds,
        )

    def _encode(self, image: Any, resize: bool) -> Tensor:
        return self.images.encode(self.image_inputs.images(image, resize)).cpu()

    def _pictures(self, codes: Tensor, output_type: str) -> Any:
        if output_type == "codes":
            return codes
        return self.image_inputs.output(self.images.decode(codes), output_type)


def is_released(folder: Path) -> bool:
    """Whether a folder, or a part of it, holds a released denoiser or one that was converted."""
    for part in (folder, *(folder / name for name in PIPELINE_PARTS[:1])):
        if (part / RECORD).is_file():
            return True
        config = read_config(part / "weights")
        if config and any(family.fits(config) for family in FAMILIES.values() if family.vocabulary is not None):
            return True
    return False


def load_released_pipeline(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    image_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
) -> Any:
    """A released folder as an object with task methods: `MudditPipeline` for MM-DiTs, else `ReleasedPipeline`.

    Args:
        folder: the checkpoint. Tokenizers are looked for beside the weights: `IMAGE_PLACES`, `TEXT_PLACES`.
        dtype: of the network; None keeps the checkpoint's.
        vocabulary: as in `load_released`.
        image_tokenizer: file or folder of LlamaGen's, MAGVIT-v2's or a VQModel's weights; text_tokenizer: folder or hub name.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a family without a pipeline, or parts that do not fit together.
    """
    if (folder / "transformer").is_dir() and (folder / "text_encoder").is_dir():
        return MudditPipeline.from_folder(folder, dtype)
    released = load_released(folder, dtype, vocabulary=vocabulary)
    check_family(released)
    images = load_images(folder, image_tokenizer)
    place = text_tokenizer or next((folder / p for p in TEXT_PLACES if _has_text(folder / p)), None)
    if place is None:
        raise FileNotFoundError(f"{folder} has no text tokenizer; put it into {folder / 'text_tokenizer'}")
    texts = TextTokenizer.from_pretrained(place)
    return ReleasedPipeline(released, tasks_of(released, texts), images, texts)


def load_images(folder: Path, place: str | Path | None = None) -> VQImageTokenizer:
    """The image tokenizer at `place`, or at one of `IMAGE_PLACES` beside the weights, in float32.

    Raises:
        FileNotFoundError: none there. ValueError: not an image tokenizer.
    """
    found = place or next((folder / p for p in IMAGE_PLACES if (folder / p).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no image tokenizer; put it into {folder / 'image_tokenizer'} (LlamaGen's also as "
            "vq_ds16_c2i.pt beside the weights) or give image_tokenizer="
        )
    images = load_released(found, torch.float32).images
    if images is None:
        raise ValueError(f"{found} is no image tokenizer; give LlamaGen's, MAGVIT-v2's or a VQModel's weights")
    return images


def _has_text(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
