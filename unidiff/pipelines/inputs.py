"""Pictures and masks as people have them (PIL, numpy, torch; one or a list) to tensors the tokenizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1")
_KINDS = "a PIL image, a numpy array or a torch tensor"
_WHITE = 127  # mask pixels above this are repainted


class ImageInputs:
    """Checks and converts pictures of one fixed size.

    Args:
        size: (height, width) in pixels.
        factor: pixels per image code along each side.
    """

    def __init__(self, size: tuple[int, int], factor: int) -> None:
        self.size, self.factor = size, factor
        self.processor = VaeImageProcessor(vae_scale_factor=factor, resample="bicubic", do_normalize=False)
        self._smooth = VaeImageProcessor(vae_scale_factor=factor, resample="bilinear", do_normalize=False)

    def images(self, images: Any, resize: bool = False) -> Tensor:
        """float32 `[B, 3, H, W]` in [0, 1].

        Args:
            images: PIL images (RGB, RGBA, L, LA, P, 1; transparency becomes white), numpy `[H, W]`, `[H, W, C]` or
                `[B, H, W, C]`, torch `[C, H, W]` or `[B, C, H, W]`, each uint8 or floats in [0, 1]; one or a list.
            resize: bring any size to the model's (resize and crop the centre); otherwise another size is an error.

        Raises:
            ValueError: another size, mode, dtype, range or kind of object.
        """
        return torch.cat([self._one(image, resize) for image in as_list(images, "image")])

    def masks(self, masks: Any, originals: Any, resize: bool = False) -> Tensor:
        """bool `[B, H, W]`, True where to repaint: white in the mask.

        Args:
            masks: as `images`, or bool arrays; PIL masks are read as grey.
            originals: the pictures before any resizing, whose size each mask must have.

        Raises:
            ValueError: another size than the picture, or a wrong kind of object.
        """
        masks, originals = as_list(masks, "mask_image"), as_list(originals, "image")
        out = []
        for number, mask in enumerate(masks):
            grey = _grey(mask)  # [h, w]
            wanted = size_of(originals[min(number, len(originals) - 1)])
            if grey.shape != wanted:
                raise ValueError(
                    f"mask_image is {grey.shape[1]}x{grey.shape[0]} pixels but the image is {wanted[1]}x{wanted[0]}; "
                    "give both the same size"
                )
            white = grey > _WHITE
            if resize and white.shape != self.size:
                picture = Image.fromarray(white.astype(np.uint8) * 255)
                picture = self._smooth.resize(picture, *self.size, resize_mode="crop")
                white = np.asarray(picture.convert("L")) > 0  # a thin stroke must not get lost
            out.append(torch.from_numpy(np.array(white)))
        return torch.stack(out)

    def cells(self, mask: Tensor) -> Tensor:
        """bool `[B, h, w]`: image codes that cover any repainted pixel of `mask` `[B, H, W]`."""
        return F.max_pool2d(mask[:, None].float(), self.factor)[:, 0] > 0

    def output(self, images: Tensor, output_type: str) -> Any:
        """float `[B, 3, H, W]` in [0, 1] as a list of PIL images, a tensor, or a float array `[B, H, W, 3]`."""
        return self.processor.postprocess(images.cpu(), output_type, [False] * len(images))

    def _one(self, image: Any, resize: bool) -> Tensor:
        values = _to_floats(image)  # [n, 3, h, w]
        if tuple(values.shape[-2:]) == self.size:
            return values
        if not resize:
            raise ValueError(
                f"image is {values.shape[-1]}x{values.shape[-2]} pixels but this model takes "
                f"{self.size[1]}x{self.size[0]}; crop it, or let it be resized (resize=True, --resize)"
            )
        pictures = self.processor.numpy_to_pil(self.processor.pt_to_numpy(values))
        resized = [self.processor.resize(p, *self.size, resize_mode="crop") for p in pictures]
        return self.processor.numpy_to_pt(self.processor.pil_to_numpy(resized))


def as_list(value: Any, what: str) -> list[Any]:
    """One thing or several as a list; a 4-D array counts as several.

    Raises:
        ValueError: an empty list.
    """
    items = list(value) if isinstance(value, list | tuple) else None
    if items is None and isinstance(value, np.ndarray | Tensor) and value.ndim == 4:
        items = list(value)
    if items is None:
        return [value]
    if not items:
        raise ValueError(f"the list of {what}s is empty; give at least one")
    return items


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


def repeated(items: Sequence[Any], count: int) -> tuple[list[Any], int]:
    """Each item `count` (`num_images_per_prompt`) times in a row, and the count.

    Raises:
        ValueError: a count that is no whole number of at least 1.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_images_per_prompt is {count!r}; expected a whole number of at least 1")
    return [item for item in items for _ in range(count)], count


def _to_floats(image: Any) -> Tensor:
    """float32 `[1, 3, h, w]` in [0, 1]."""
    if isinstance(image, Image.Image):
        array = np.asarray(_rgb(image), dtype=np.float32) / 255.0
        return torch.from_numpy(array).permute(2, 0, 1)[None]
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(f"image array has shape {image.shape}; expected [H, W], [H, W, 3] or a batch of those")
        values = torch.from_numpy(np.array(image))
        values = values[None] if image.ndim == 2 else values.permute(2, 0, 1)
    elif isinstance(image, Tensor):
        values = image.detach().cpu()
        if values.ndim != 3:
            raise ValueError(f"image tensor has shape {tuple(values.shape)}; expected [3, H, W] or [B, 3, H, W]")
    else:
        raise ValueError(f"image is a {type(image).__name__}; expected {_KINDS}")
    return _unit_rgb(values)[None]


def _unit_rgb(values: Tensor) -> Tensor:
    if values.shape[0] not in (1, 3, 4):
        raise ValueError(f"image has {values.shape[0]} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    if values.dtype == torch.uint8:
        values = values.float() / 255.0
    elif not values.is_floating_point():
        raise ValueError(f"image has dtype {values.dtype}; expected uint8 or floats in [0, 1]")
    values = values.float()
    if values.numel() == 0:
        raise ValueError(f"image has shape {tuple(values.shape)}; expected at least one pixel")
    low, high = values.min().item(), values.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # false for NaN too
        raise ValueError(f"image values span [{low:.3g}, {high:.3g}]; expected finite floats in [0, 1] or uint8")
    values = values.clamp(0, 1)
    if values.shape[0] == 4:
        values = values[:3] * values[3:] + (1 - values[3:])
    return values.expand(3, -1, -1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode not in _MODES:
        raise ValueError(f"image has mode {image.mode!r}; expected one of {', '.join(_MODES)}, so convert it to RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey(mask: Any) -> np.ndarray:
    """uint8 `[h, w]`."""
    if isinstance(mask, Image.Image):
        if mask.mode not in _MODES:
            raise ValueError(f"mask_image has mode {mask.mode!r}; expected one of {', '.join(_MODES)}")
        return np.asarray(mask.convert("L"))
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if not isinstance(array, np.ndarray):
        raise ValueError(f"mask_image is a {type(mask).__name__}; expected {_KINDS}")
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise ValueError(f"mask_image has shape {array.shape}; expected [H, W]")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"mask_image has dtype {array.dtype}; expected bool, uint8 or floats in [0, 1]")
    if not (array.size and array.min() >= 0 and array.max() <= 1):
        raise ValueError("mask_image values lie outside [0, 1]; expected bool, uint8 or floats in [0, 1]")
    return (array * 255).astype(np.uint8)


def size_of(image: Any) -> tuple[int, int]:
    """(height, width) in pixels of a PIL image, an array `[H, W, ...]` or a tensor `[..., H, W]`.

    Raises:
        ValueError: another kind of object.
    """
    if not isinstance(image, Image.Image | np.ndarray | Tensor) or (
        not isinstance(image, Image.Image) and image.ndim < 2
    ):
        raise ValueError(f"image is a {type(image).__name__}; expected {_KINDS}")
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return int(height), int(width)
