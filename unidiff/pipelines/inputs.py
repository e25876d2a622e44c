"""Texts, pictures and masks as people have them (PIL, numpy, torch; one or a list) to columns of one entry for each row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unidiff.families.layout import Grid, RowLayout
from unidiff.pictures import MAX_PIXELS, open_picture
from unidiff.pipelines.masks import fit_white, plain_tensor, white_pixels
from unidiff.pipelines.options import MOST_ROWS, flag, kind_of, one_of, whole
from unidiff.tokens.text import refuse_holes

_KINDS = "a PIL image, a path or address of one, a numpy array or a torch tensor"
_LONGEST_SIDE = 16_384
_PIXELS = ("pil", "pt", "np")
_FILLED_BY = "generate, inpaint or infill fill <mask> holes, where the model can"


class ImageInputs:
    """Checks and converts pictures of one fixed size.

    Args:
        size: (height, width) in pixels.
        factor: pixels per image code along each side.
    """

    def __init__(self, size: tuple[int, int], factor: int) -> None:
        self.size, self.factor = size, factor
        self.processor = VaeImageProcessor(vae_scale_factor=factor, resample="bicubic", do_normalize=False)

    def images(self, images: Any, resize: bool = False) -> Tensor:
        """float32 `[B, 3, H, W]` in [0, 1].

        Args:
            images: PIL images of any mode, paths or addresses (http, https, file) of pictures (see `open_picture`;
                transparency becomes white), numpy `[H, W]`, `[H, W, C]` or `[B, H, W, C]`, torch `[C, H, W]` or
                `[B, C, H, W]`, each uint8 or floats in [0, 1]; one or a list.
            resize: bring any size to the model's (resize and crop the centre); otherwise another size is an error.

        Raises:
            ValueError: another size, dtype, range or kind of object; the message says which picture of a list.
            FileNotFoundError, DamagedFile: as `open_picture`.
        """
        items = as_list(images, "image")
        named = [(image, _number("image", i, len(items))) for i, image in enumerate(items)]
        return torch.cat([self._one(image, name, resize) for image, name in named])

    def masks(self, masks: Any, originals: Any, resize: bool = False) -> Tensor:
        """bool `[B, H, W]`, True where to repaint: white in the mask, see `white_pixels`.

        Args:
            masks: one or a list, or a batch `[B, h, w]`.
            originals: the pictures before any resizing, whose size each mask must have.
            resize: as the pictures; a pixel of the model is white where any of the mask's below it is.

        Raises:
            ValueError: another size than the picture, or as `white_pixels`.
        """
        originals = as_list(originals, "image")
        masks = mask_list(masks, len(originals))
        out = []
        for number, mask in enumerate(masks):
            name = _number("mask_image", number, len(masks))
            white = white_pixels(mask, name)  # [h, w]
            shown = originals if len(masks) == 1 else originals[min(number, len(originals) - 1) :][:1]
            for wanted in {size_of(original) for original in shown}:
                if white.shape != wanted:
                    raise ValueError(
                        f"{name} is {white.shape[1]}x{white.shape[0]} pixels but the image is {wanted[1]}x{wanted[0]}; "
                        "give both the same size"
                    )
            if resize and white.shape != self.size:
                white = fit_white(white, self.size, name)
            out.append(torch.from_numpy(np.array(white)))
        return torch.stack(out)

    def cells(self, mask: Tensor) -> Tensor:
        """bool `[B, h, w]`: image codes that cover any repainted pixel of `mask` `[B, H, W]`."""
        return F.max_pool2d(mask[:, None].float(), self.factor)[:, 0] > 0

    def output(self, images: Tensor, output_type: str) -> Any:
        """float `[B, 3, H, W]` in [0, 1] as a list of PIL images, a tensor, or a float array `[B, H, W, 3]`."""
        one_of(output_type, "output_type", _PIXELS)
        return self.processor.postprocess(images.cpu(), output_type, [False] * len(images))

    def _one(self, image: Any, name: str, resize: bool) -> Tensor:
        values = _to_floats(image, name)  # [1, 3, h, w]
        if tuple(values.shape[-2:]) == self.size:
            return values
        if not resize:
            raise ValueError(
                f"{name} is {values.shape[-1]}x{values.shape[-2]} pixels but this model takes "
                f"{self.size[1]}x{self.size[0]}; crop it, or let it be resized (resize=True, --resize)"
            )
        height, width = values.shape[-2:]
        scale = max(self.size[0] / height, self.size[1] / width)
        if height * width * scale**2 > MAX_PIXELS:  # a line a pixel wide would grow to gigabytes before it is cropped
            raise ValueError(f"{name} is {width}x{height} pixels, too long for its width to be resized; crop it")
        pictures = self.processor.numpy_to_pil(self.processor.pt_to_numpy(values))
        resized = [self.processor.resize(p, *self.size, resize_mode="crop") for p in pictures]
        return self.processor.numpy_to_pt(self.processor.pil_to_numpy(resized))


class PictureSizes:
    """What reads and writes pictures of a pipeline: of its size, of one asked for, or of the pictures' own.

    Args:
        images: the image tokenizer; None for a model of text alone. layout: of the family.
    """

    def __init__(self, images: Any, layout: RowLayout) -> None:
        self.images, self.layout = images, layout

    def of(self, grid: Grid | None = None) -> ImageInputs:
        """For rows and columns of codes, the pipeline's own when left out; `ValueError` for a model of text alone."""
        if self.images is None:
            raise ValueError(f"{self.layout.family} knows no pictures; it does {', '.join(self.layout.tasks)}")
        rows, columns = grid or self.layout.grid
        return ImageInputs((rows * self.images.factor, columns * self.images.factor), self.images.factor)

    def grid(self, height: int | None, width: int | None) -> Grid | None:
        """Rows and columns of codes of a size in pixels; None where none was asked for.

        Raises:
            ValueError: a family of one size, or a side that the image tokenizer's factor does not divide.
        """
        if height is None and width is None:
            return None
        if not self.layout.sizes:
            raise ValueError(f"{self.layout.family} draws pictures of one size; leave height and width out")
        (usual_height, usual_width), factor = self.of().size, self.images.factor
        height, width = usual_height if height is None else height, usual_width if width is None else width
        for name, side in (("height", height), ("width", width)):
            whole(side, name, 1, _LONGEST_SIDE, f", divided by {factor}")
        if height % factor or width % factor:
            raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}")
        return height // factor, width // factor

    def fitting(self, image: Sequence[Any], resize: bool) -> ImageInputs:
        """For opened pictures: of the pipeline's size, or of their own where the family takes any."""
        flag(resize, "resize")
        if not self.layout.any_size:
            return self.of()
        sizes = sorted({size_of(part) for part in image})
        if len(sizes) > 1:
            raise ValueError(f"the pictures have the sizes {sizes} (height, width); give those of one size at a time")
        return self.of(self.layout.fit(*sizes[0]) if resize else self.grid(*sizes[0]))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures float `[B, 3, H, W]` to codes int64 `[B, h, w]` in the host's memory."""
        codes: Tensor = self.images.encode(pixels).cpu()
        return codes


def texts_of(value: Any, what: str, empty: bool = False, holes: bool = False) -> list[str]:
    """One text or several as a list of strings.

    Args:
        what: the argument, for the message. empty: whether a text without words is fine. holes: whether it may have holes.

    Raises:
        ValueError: an empty list, something else than a text, a text without words or with holes; the message says which.
    """
    several = isinstance(value, list | tuple)
    texts = list(value) if several else [value]
    if not texts:
        raise ValueError(f"the list of {what}s is empty; give at least one")
    for number, text in enumerate(texts):
        where = f" (number {number + 1} of {len(texts)})" if len(texts) > 1 else ""
        if not isinstance(text, str):
            expected = "a string" if several else "a string, or a list of them"
            raise ValueError(f"the {what} is {kind_of(text)}{where}; expected {expected}")
        if not text.strip() and not empty:
            raise ValueError(f"the {what} is empty{where}; write at least one word")
        if (bad := next((c for c in text if "\ud800" <= c <= "\udfff"), None)) is not None:
            raise ValueError(f"the {what} holds the lone surrogate {bad!r}{where}, which is no character; leave it out")
    if not holes:
        refuse_holes(texts, what, _FILLED_BY)
    return texts


def as_list(value: Any, what: str) -> list[Any]:
    """One thing or several as a list; a 4-D array counts as several.

    Raises:
        ValueError: an empty list.
    """
    items = list(value) if isinstance(value, list | tuple) else None
    if items is None and isinstance(value, np.ndarray | Tensor) and value.ndim == 4:
        items = list(plain_tensor(value, what) if isinstance(value, Tensor) else value)
    if items is None:
        return [value]
    if not items:
        raise ValueError(f"the list of {what}s is empty; give at least one")
    return items


def opened(images: Any, what: str = "image") -> list[Any]:
    """Pictures as a list in which paths, addresses and bytes are read (PIL, RGB, upright); arrays stay what they are.

    Raises:
        ValueError: an empty list, or something else than pictures; the message says which of a list.
        FileNotFoundError, DamagedFile: as `open_picture`.
    """
    items = as_list(images, what)
    return [_opened(item, _number(what, i, len(items))) for i, item in enumerate(items)]


def mask_list(masks: Any, images: int) -> list[Any]:
    """One mask or several as a list; a batch `[B, h, w]`, `[B, 1, h, w]` or `[B, h, w, 1]` holds one for each image.

    Raises:
        ValueError: an empty list, or a batch of another number than `images`: its first side may be colours as well.
    """
    if isinstance(masks, list | tuple) or not isinstance(masks, np.ndarray | Tensor):
        return as_list(masks, "mask_image")
    if masks.ndim == 2 or (masks.ndim == 3 and 1 in (masks.shape[0], masks.shape[-1])):
        return [masks]
    if masks.ndim not in (3, 4) or len(masks) != images:
        raise ValueError(
            f"mask_image has shape {tuple(masks.shape)} for {images} images; expected [H, W], or one for each as [B, H, W]"
        )
    return list(plain_tensor(masks, "mask_image") if isinstance(masks, Tensor) else masks)


def broadcast(**columns: Sequence[Any]) -> list[list[Any]]:
    """Columns of one common length; those with a single entry are repeated.

    Raises:
        ValueError: lengths that do not agree.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    longest = max(lengths.values())
    if bad := [name for name, n in lengths.items() if n not in (1, longest)]:
        other = max(lengths, key=lambda name: lengths[name])
        raise ValueError(f"{lengths[bad[0]]} {bad[0]}s do not go with {longest} {other}s; give one, or as many of each")
    return [list(column) * (longest if len(column) == 1 else 1) for column in columns.values()]


def columns_of(count: int, **columns: Sequence[Any] | None) -> dict[str, Any]:
    """Columns of one common length, each entry `count` times; tensors are stacked, and columns that are None left out."""
    given = {name: column for name, column in columns.items() if column is not None}
    rows = {name: repeated(column, count) for name, column in zip(given, broadcast(**given), strict=True)}
    return {name: torch.stack(row) if isinstance(row[0], Tensor) else row for name, row in rows.items()}


def repeated(items: Sequence[Any], count: Any) -> list[Any]:
    """Each item `count` (`num_images_per_prompt`) times in a row.

    Raises:
        ValueError: a count that is no whole number of at least 1, or more than `MOST_ROWS` rows.
    """
    whole(count, "num_images_per_prompt", 1, MOST_ROWS)
    check_rows(len(items) * count)
    return [item for item in items for _ in range(count)]


def check_rows(rows: int) -> None:
    """Raise `ValueError` for more rows than `MOST_ROWS`."""
    if rows > MOST_ROWS:
        raise ValueError(
            f"this call would decode {rows} rows (num_images_per_prompt and num_candidates multiply); expected at most "
            f"{MOST_ROWS}, so make several calls"
        )


def _number(what: str, number: int, count: int) -> str:
    """What a picture is called in messages."""
    return what if count == 1 else f"{what} {number + 1} of {count}"


def _opened(image: Any, name: str) -> Any:
    if isinstance(image, Image.Image | str | bytes | os.PathLike):
        named = isinstance(image, str | os.PathLike) and name == "image"  # the path says which
        return open_picture(image, None if named else name)
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"{name} is {kind_of(image)}; expected {_KINDS}")
    return image


def _to_floats(image: Any, name: str) -> Tensor:
    """float32 `[1, 3, h, w]` in [0, 1]."""
    image = _opened(image, name)
    if isinstance(image, Image.Image):
        array = np.asarray(image, dtype=np.float32) / 255.0
        return torch.from_numpy(array).permute(2, 0, 1)[None]
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(
                f"{name} is an array of shape {image.shape}; expected [H, W], [H, W, 3] or a batch of those"
            )
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise ValueError(f"{name} has dtype {image.dtype}; expected uint8 or floats in [0, 1]")
        values = torch.from_numpy(np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32, order="C"))
        values = values[None] if image.ndim == 2 else values.permute(2, 0, 1)
    else:
        if image.ndim != 3:
            raise ValueError(f"{name} is a tensor of shape {tuple(image.shape)}; expected [3, H, W] or [B, 3, H, W]")
        values = plain_tensor(image, name)
    return _unit_rgb(values, name)[None]


def _unit_rgb(values: Tensor, name: str) -> Tensor:
    if values.shape[0] not in (1, 3, 4):
        raise ValueError(f"{name} has {values.shape[0]} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    if values.dtype == torch.uint8:
        values = values.float() / 255.0
    elif not values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}; expected uint8 or floats in [0, 1]")
    values = values.float()
    if values.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected at least one pixel")
    low, high = values.min().item(), values.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # false for NaN too
        raise ValueError(f"{name} values span [{low:.3g}, {high:.3g}]; expected finite floats in [0, 1] or uint8")
    values = values.clamp(0, 1)
    if values.shape[0] == 4:
        values = values[:3] * values[3:] + (1 - values[3:])
    return values.expand(3, -1, -1)


def size_of(image: Any) -> tuple[int, int]:
    """(height, width) in pixels of a PIL image, an array `[H, W, ...]` or a tensor `[..., H, W]`.

    Raises:
        ValueError: another kind of object.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    if not isinstance(image, np.ndarray | Tensor) or image.ndim < 2:
        raise ValueError(f"image is {kind_of(image)}; expected {_KINDS}")
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return int(height), int(width)
