"""Pictures and masks as people have them (PIL, numpy, torch; one or a list) to tensors of the model's size.

A mask of a large picture loses no pixel on the way: one of the model's is white where any of the mask's below it is.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unidiff.families.layout import Grid, RowLayout
from unidiff.pictures import MAX_PIXELS, decode_picture, open_picture
from unidiff.pipelines.options import flag, kind_of, short, whole

_KINDS = "a PIL image, a path or address of one, a numpy array or a torch tensor"
_LONGEST_SIDE = 16_384
_LEVELS = (1, 255, 65535)  # white, by the largest value of a mask of whole numbers


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
        return torch.cat([self._one(item, _number("image", i, len(items)), resize) for i, item in enumerate(items)])

    def masks(self, masks: Any, originals: Any, resize: bool = False) -> Tensor:
        """bool `[B, H, W]`, True where to repaint: white in the mask, see `white_pixels`.

        Args:
            masks: one or a list, or a batch `[B, h, w]`.
            originals: the pictures before any resizing, whose size each mask must have.
            resize: as the pictures; a pixel of the model is white where any of the mask's below it is.
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

    def _one(self, image: Any, name: str, resize: bool) -> Tensor:
        values = _to_floats(image, name)  # [1, 3, h, w]
        height, width = values.shape[-2:]
        if (height, width) == self.size:
            return values
        if not resize:
            raise ValueError(
                f"{name} is {width}x{height} pixels but this model takes {self.size[1]}x{self.size[0]}; crop it, or let it "
                "be resized (resize=True, --resize)"
            )
        scale = max(self.size[0] / height, self.size[1] / width)
        if height * width * scale**2 > MAX_PIXELS:  # a line a pixel wide would grow to gigabytes before it is cropped
            raise ValueError(f"{name} is {width}x{height} pixels, too long for its width to be resized; crop it")
        pictures = self.processor.numpy_to_pil(self.processor.pt_to_numpy(values))
        resized = [self.processor.resize(p, *self.size, resize_mode="crop") for p in pictures]
        return self.processor.numpy_to_pt(self.processor.pil_to_numpy(resized))


class GivenPictures(NamedTuple):
    """What a caller gave, opened, what reads more of that size, pixels float `[B, 3, H, W]` and codes int64 `[B, h, w]`."""

    opened: list[Any]
    reader: ImageInputs
    pixels: Tensor
    codes: Tensor


class PictureReader:
    """What a pipeline knows of the pictures that it is given and draws."""

    layout: RowLayout
    images: Any  # its image tokenizer, or None

    @property
    def image_inputs(self) -> ImageInputs:
        """What reads pictures; `ValueError` for a model of text alone."""
        return self._inputs(self.layout.grid)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels, the usual one where there are others; `ValueError` for a model of text alone."""
        return self.image_inputs.size

    def _grid_of(self, height: int | None, width: int | None, upscale: int = 1) -> Grid:
        """Rows and columns of codes of a size in pixels, of which one side may be left out.

        Args:
            upscale: that of the image tokenizer, for pictures that are drawn.
        """
        usual = (self.image_size[0] * upscale, self.image_size[1] * upscale)
        height, width = usual[0] if height is None else height, usual[1] if width is None else width
        if not self.layout.sizes and (height, width) != usual:
            only = f"{self.layout.family} draws pictures of {usual[0]}x{usual[1]} pixels only"
            raise ValueError(
                f"height is {short(height)} and width {short(width)}, but {only}; leave height and width out"
            )
        factor = self.images.factor * upscale
        for name, side in (("height", height), ("width", width)):
            whole(side, name, 1, _LONGEST_SIDE, f", divided by {factor}")
        if height % factor or width % factor:
            raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}")
        return height // factor, width // factor

    def _inputs(self, grid: Grid) -> ImageInputs:
        if self.images is None:
            raise ValueError(f"{self.layout.family} knows no pictures; it does {', '.join(self.layout.tasks)}")
        factor = self.images.factor
        return ImageInputs((grid[0] * factor, grid[1] * factor), factor)

    def _read(self, image: Any, resize: bool, what: str = "image") -> GivenPictures:
        """Pictures of the pipeline's size, or of their own where the family takes any."""
        given, reader = opened(image, what), self.image_inputs
        flag(resize, "resize")
        if self.layout.any_size:
            sizes = sorted({size_of(picture) for picture in given})
            if len(sizes) > 1:
                raise ValueError(
                    f"the pictures have the sizes {sizes} (height, width); give those of one size at a time"
                )
            reader = self._inputs(self.layout.fit(*sizes[0]) if resize else self._grid_of(*sizes[0]))
        pixels = reader.images(given, resize)
        return GivenPictures(given, reader, pixels, self.images.encode(pixels).cpu())


def pasted(images: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Drawn pictures `[B, 3, H, W]` with the original's pixels `[B, 3, h, w]` outside a mask `[B, h, w]`, both enlarged where
    pictures are drawn larger than they are read.
    """
    size = images.shape[-2:]
    if original.shape[-2:] != size:
        original = F.interpolate(original, size, mode="bicubic", align_corners=False).clamp(0, 1)
        mask = F.interpolate(mask[:, None].float(), size, mode="nearest")[:, 0] > 0
    return torch.where(mask[:, None], images, original)


def as_list(value: Any, what: str) -> list[Any]:
    """One thing or several as a list; a 4-D array counts as several. `ValueError` for an empty list."""
    if not isinstance(value, list | tuple) and not (isinstance(value, np.ndarray | Tensor) and value.ndim == 4):
        return [value]
    items = list(plain_tensor(value, what) if isinstance(value, Tensor) else value)
    if not items:
        raise ValueError(f"the list of {what}s is empty; give at least one")
    return items


def opened(images: Any, what: str = "image") -> list[Any]:
    """Pictures as a list in which paths, addresses and bytes are read (PIL, RGB, upright); arrays stay what they are.

    Raises:
        ValueError: an empty list, or something else than pictures; others as of `open_picture`.
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
    """(height, width) in pixels of a PIL image, an array `[H, W, ...]` or a tensor `[..., H, W]`; else `ValueError`."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if not isinstance(image, np.ndarray | Tensor) or image.ndim < 2:
        raise ValueError(f"image is {kind_of(image)}; expected {_KINDS}")
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return int(height), int(width)


def white_pixels(mask: Any, what: str = "mask_image") -> np.ndarray:
    """bool `[h, w]`: pixels to repaint, those of at least half of white.

    Args:
        mask: a PIL image of any mode, a path, address or bytes of one, or a numpy array or torch tensor `[h, w]`,
            `[1, h, w]` or `[h, w, 1]`: bool, whole numbers with 1, 255 or 65535 for white (0/1, 0/255), or floats in [0, 1].
            Colours are read as grey; what is transparent is black, that is, kept.

    Raises:
        ValueError: another kind of object, shape or type, NaN, or values that are dim everywhere: nobody can tell what they
            mean. DamagedFile, FileNotFoundError: as `open_picture`.
    """
    values = _values(mask, what)
    if values.dtype == np.bool_:
        return values
    if values.dtype.kind == "f":
        if not (values.size and values.min() >= 0 and values.max() <= 1):  # false for NaN too
            raise ValueError(
                f"{what} values lie outside [0, 1]; expected bool, whole numbers (0/1 or 0/255) or finite floats in [0, 1]"
            )
        white = values >= 0.5
    else:
        low, high = (int(values.min()), int(values.max())) if values.size else (-1, -1)
        level = next((level for level in _LEVELS if high <= level), None)
        if low < 0 or level is None:
            raise ValueError(f"{what} values span [{low}, {high}]; expected 0 and 1, or 0 and 255")
        white = values.astype(np.int64) * 2 >= level
    if not white.any() and values.any():
        raise ValueError(
            f"{what} is dim everywhere (its largest value is {values.max():.4g}); paint what is to change in white: 1 in "
            "bool, 0/1 and float masks, 255 in pictures"
        )
    return white


def fit_white(white: np.ndarray, size: tuple[int, int], what: str = "mask_image") -> np.ndarray:
    """bool `[H, W]` of `[h, w]`, resized and cropped as pictures are; `ValueError` where that crops everything white."""
    rows = _cover(white.shape[0], size[0], *_scaled(white.shape[0], white.shape[1], size[0], size[1]))
    columns = _cover(white.shape[1], size[1], *_scaled(white.shape[1], white.shape[0], size[1], size[0]))
    fitted = (rows @ white.astype(np.float32) @ columns.T) > 0
    if white.any() and not fitted.any():
        raise ValueError(
            f"all that is white in {what} lies outside the centre that resize=True keeps; crop both yourself"
        )
    return fitted


def _scaled(side: int, other: int, wanted: int, wanted_other: int) -> tuple[int, int]:
    """Length of a side after scaling so that both are covered, and where the model's part of it begins."""
    scaled = wanted if wanted * other >= wanted_other * side else side * wanted_other // other
    return scaled, scaled // 2 - wanted // 2


def _cover(length: int, wanted: int, scaled: int, start: int) -> np.ndarray:
    """float32 `[wanted, length]`: 1 where a pixel of the model's picture covers any part of a pixel of the given one."""
    place = np.arange(start, start + wanted)[:, None]  # in the scaled picture
    pixel = np.arange(length)[None]
    return ((place * length < (pixel + 1) * scaled) & ((place + 1) * length > pixel * scaled)).astype(np.float32)


def plain_tensor(values: Tensor, what: str) -> Tensor:
    """A tensor without gradient in the host's memory, its values one after another; `ValueError` for one of other kinds."""
    if values.is_meta:
        raise ValueError(f"{what} is a tensor on the meta device, which holds no values; give one on cpu or cuda")
    if values.layout != torch.strided:
        raise ValueError(f"{what} is a tensor of layout {values.layout}; make it dense with to_dense()")
    if values.is_quantized or values.is_complex():
        raise ValueError(f"{what} has dtype {values.dtype}; expected uint8, bool or floats in [0, 1]")
    values = values.detach().cpu().resolve_neg()
    return values.float() if values.is_floating_point() else values  # numpy has no bfloat16 or float8


def _values(mask: Any, what: str) -> np.ndarray:
    """The mask as an array `[h, w]` of bool, whole numbers or floats."""
    if isinstance(mask, str | bytes | os.PathLike):
        mask = decode_picture(mask, what)
    if isinstance(mask, Image.Image):
        return _of_picture(mask, what)
    array = plain_tensor(mask, what).numpy() if isinstance(mask, Tensor) else mask
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{what} is {kind_of(mask)}; expected a PIL image, a path, a numpy array or a torch tensor")
    if array.dtype.kind not in "buif":
        raise ValueError(f"{what} has dtype {array.dtype}; expected bool, whole numbers or floats")
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{what} has shape {array.shape}; expected [H, W], or several as [B, H, W]")
    return array


def _of_picture(mask: Image.Image, what: str) -> np.ndarray:
    mask = decode_picture(mask, what)
    if mask.mode in ("1", "L", "F", "I") or mask.mode.startswith("I;16"):
        return np.asarray(mask)
    if mask.has_transparency_data:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    grey = mask.convert("L")
    if mask.mode == "P" and not (set(mask.tobytes()) - {0, 1}) and grey.getextrema()[1] < 128:  # type: ignore[operator]
        return np.asarray(mask)  # label maps: the entries' numbers, since their colours say nothing
    return np.asarray(grey)
