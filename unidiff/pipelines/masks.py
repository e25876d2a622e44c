"""Masks of every kind to bool, and masks of large pictures to the model's size without losing a pixel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.pictures import decode_picture
from unidiff.pipelines.options import kind_of

_LEVELS = (1, 255, 65535)
"""White, by the largest value of a mask of whole numbers."""


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
    """bool `[H, W]` of `[h, w]`, resized and cropped as pictures are: white where any of its pixels is.

    Raises:
        ValueError: everything white lies in the part that is cropped away.
    """
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
    """A tensor without gradient in the host's memory, its values one after another.

    Raises:
        ValueError: a sparse, quantised or complex tensor, or one on the meta device, which has no values.
    """
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
    array = mask
    if isinstance(mask, Tensor):
        array = plain_tensor(mask, what).numpy()
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
    elif mask.mode == "P" and not (set(mask.tobytes()) - {0, 1}) and _is_dim(mask):
        return np.asarray(mask)  # label maps: the entries' numbers, since their colours say nothing
    return np.asarray(mask.convert("L"))


def _is_dim(mask: Image.Image) -> bool:
    return mask.convert("L").getextrema()[1] < 128  # type: ignore[operator]
