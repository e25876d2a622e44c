"""What every pipeline is made of, and how it is loaded, saved, shared and resized."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from unidiff.families.layout import Grid, RowLayout
from unidiff.hub import ALL_FILES, HUB_OPTIONS, locate
from unidiff.pipelines.arguments import check_keywords, flag, whole
from unidiff.pipelines.folder import forget_origins, load_parts, read_dtype, write_folder
from unidiff.pipelines.inputs import ImageInputs, size_of
from unidiff.pipelines.rows import NativeLayout
from unidiff.pipelines.settings import PipelineSettings
from unidiff.schema import check_value
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.tokens.vocabulary import Vocabulary
from unidiff.weights.saving import check_save_options

_LONGEST_SIDE = 16_384


class PipelineParts(DiffusionPipeline):
    """Network, tokenizers and layout of a pipeline; arguments as of `UniDiffPipeline`."""

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
        return self._image_inputs(self.layout.grid)

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

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Self:
        """A new pipeline with the parts of another one, which share their weights.

        Args:
            pipeline: of this class.
            changes: parts or settings to take instead, by their name in `components`.

        Raises:
            ValueError: a pipeline of another class, or a part that does not fit.
            TypeError: an unknown name.
        """
        if not isinstance(pipeline, cls):
            raise ValueError(f"from_pipe got a {type(pipeline).__name__}; expected a {cls.__name__}")
        parts = pipeline.components
        for name in changes:
            if name not in parts:
                near = difflib.get_close_matches(name, parts, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected some of {list(parts)}"
                raise TypeError(f"{cls.__name__}.from_pipe got an unexpected argument {name!r}; {hint}")
        return cls(**{**parts, **changes})

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
        """Load a folder, a hub model `owner/name`, or an embedded model (`"emoji"`), of any family, strictly.

        Args:
            name: where.
            dtype: of the weights in memory; `torch_dtype` is the same. Left out: float32, or the checkpoint's own for a
                released family.
            subfolder: below `name`, for instance Muddit's `512`.
            image_tokenizer, text_tokenizer: where they are, for a released family that comes without.
            hub_options: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: nothing there, or a part is missing.
            ValueError: an unknown family, unknown settings, or weights that are missing, unexpected, misshaped or NaN.
            TypeError: an unknown argument.
        """
        check_keywords(cls.from_pretrained, hub_options, HUB_OPTIONS, cls)
        if dtype is not None and torch_dtype is not None and read_dtype(dtype) != read_dtype(torch_dtype):
            raise ValueError(f"dtype is {dtype} and torch_dtype {torch_dtype}, which mean the same; give one of them")
        chosen = dtype if torch_dtype is None else torch_dtype
        check_value(subfolder, str | None, "subfolder")
        folder = locate(name, ALL_FILES, **hub_options) / (subfolder or "")
        parts = load_parts(folder, None if chosen is None else read_dtype(chosen), image_tokenizer, text_tokenizer)
        try:
            return cls(*parts)
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
            ValueError: a released family; a folder that holds anything that is no part of a pipeline of ours, an argument
                that `from_pretrained` could not follow, or weights that hold NaN or have no values.
            OSError: a full or read-only disk; the message names the folder.
        """
        check_save_options(options, max_shard_size)
        if not hasattr(self, "settings"):
            raise ValueError(
                f"{self.layout.family} is not saved as a pipeline; `unidiff convert` writes its checkpoint in both layouts"
            )

        def write(folder: Path) -> None:
            DiffusionPipeline.save_pretrained(self, str(folder), max_shard_size=max_shard_size)
            forget_origins(folder)

        write_folder(save_directory, write)

    def sized(self, height: int, width: int) -> Self:
        """The same for pictures of another size in pixels, where the family draws any.

        Raises:
            ValueError: a family of one size, or a side that the image tokenizer's factor does not divide.
        """
        return self.from_pipe(self, layout=replace(self.layout, fixed=self._grid(height, width)))  # type: ignore[type-var]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """See `DiffusionPipeline.to`; what else reads the rows follows the network."""
        super().to(*args, **kwargs)
        for module in self.layout.modules.values():
            module.to(self.transformer.device, self.transformer.dtype)
        return self

    @property
    def device_of_rows(self) -> torch.device:
        """Where rows go before they are decoded: that of the weights, or where offloaded ones compute."""
        device: torch.device = self._execution_device
        return device

    def _image_inputs(self, grid: Grid | None = None) -> ImageInputs:
        if self.images is None:
            raise ValueError(f"{self.layout.family} knows no pictures; it does {', '.join(self.layout.tasks)}")
        rows, columns = grid or self.layout.grid
        return ImageInputs((rows * self.images.factor, columns * self.images.factor), self.images.factor)

    def _grid(self, height: int | None, width: int | None) -> Grid | None:
        """Rows and columns of codes of a size in pixels; None where none was asked for."""
        if height is None and width is None:
            return None
        if not self.layout.sizes:
            raise ValueError(f"{self.layout.family} draws pictures of one size; leave height and width out")
        (usual_height, usual_width), factor = self.image_size, self.images.factor
        height, width = usual_height if height is None else height, usual_width if width is None else width
        for name, side in (("height", height), ("width", width)):
            whole(side, name, 1, _LONGEST_SIDE, f", divided by {factor}")
        if height % factor or width % factor:
            raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}")
        return height // factor, width // factor

    def _fitting(self, image: Sequence[Any], resize: bool) -> ImageInputs:
        """What reads opened pictures: of the pipeline's size, or of their own where the family takes any."""
        flag(resize, "resize")
        if not self.layout.any_size:
            return self.image_inputs
        sizes = sorted({size_of(part) for part in image})
        if len(sizes) > 1:
            raise ValueError(f"the pictures have the sizes {sizes} (height, width); give those of one size at a time")
        return self._image_inputs(self.layout.fit(*sizes[0]) if resize else self._grid(*sizes[0]))

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pictures float `[B, 3, H, W]` to codes int64 `[B, h, w]`."""
        codes: Tensor = self.images.encode(pixels).cpu()
        return codes
