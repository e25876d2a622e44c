"""The members a sample may have: bytes to values and back, by an allow-list of types. Nothing here can run code."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from unidiff.data import report
from unidiff.data.report import Unusable
from unidiff.errors import first_line
from unidiff.pictures import open_picture

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
ALLOWED_TYPES = (*IMAGE_TYPES, "txt", "json", "npy", "safetensors")


def member_type(name: str) -> str:
    """The type of a member: the last extension, lower case (`codes.npy` is `npy`)."""
    return name.rsplit(".", 1)[-1].lower()


def check_member(name: str) -> None:
    """Raise ValueError for a member name that is not on the allow-list (`image` is any image type, `images` all of such a type)."""
    if name not in ("image", "images") and member_type(name) not in ALLOWED_TYPES:
        raise ValueError(
            f"member {name!r} has type {member_type(name)!r}, which is never decoded; expected 'image', 'images' or one of {ALLOWED_TYPES}"
        )


def find_member(sample: dict[str, Any], name: str) -> str | None:
    """The name under which a raw sample holds `name`; `image` finds the first image of any type."""
    if name != "image":
        return name if name in sample else None
    return next((kind for kind in IMAGE_TYPES if kind in sample), None)


def decode_member(name: str, data: bytes) -> Any:
    """The value of a member, by the last extension of its name: images give uint8 tensors `[3, H, W]`, `txt` a string, `json`
    plain data, `npy` an array (never an object array), `safetensors` a dict of tensors.

    Raises:
        Unusable: the bytes are damaged.
        ValueError: the type is not on the allow-list.
    """
    check_member(name)
    decode, reason = _DECODERS[member_type(name)]
    try:
        return decode(data)
    except (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # decoders raise almost anything on damaged bytes; the caller counts every case
        raise Unusable(reason, f"{name}: {first_line(error)}") from error


def encode_member(name: str, value: Any) -> bytes:
    """Inverse of `decode_member`. Bytes pass unchanged; images may be PIL or uint8 tensors `[3, H, W]`.

    Raises ValueError for a type that is not on the allow-list, or a value that does not fit it.
    """
    check_member(name)
    if isinstance(value, bytes):
        return value
    kind = member_type(name)
    buffer = io.BytesIO()
    if kind in IMAGE_TYPES:
        if isinstance(value, Tensor):
            if value.dtype != torch.uint8 or value.ndim != 3 or value.shape[0] != 3:
                raise ValueError(f"expected a uint8 image [3, H, W], got {value.dtype} {tuple(value.shape)}")
            value = Image.fromarray(value.permute(1, 2, 0).contiguous().numpy())
        options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind in ("jpg", "jpeg") else {}
        value.save(buffer, "JPEG" if kind == "jpg" else kind.upper(), **options)
    elif kind == "txt":
        return value.encode("utf-8")
    elif kind == "json":
        return json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8")
    elif kind == "npy":
        np.save(buffer, np.asarray(value), allow_pickle=False)
    else:
        return safetensors.torch.save(value)
    return buffer.getvalue()


def is_blank(text: str) -> bool:
    """Whether a text holds nothing that can be seen."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def _decode_image(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(open_picture(data))).permute(2, 0, 1).contiguous()


def _decode_json(data: bytes) -> Any:
    value = json.loads(data.decode("utf-8-sig"))
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escaped lone surrogate is no text: it fails here
    return value


def _decode_array(data: bytes) -> np.ndarray:
    if data.startswith(b"PK"):
        raise ValueError("not a single array")
    buffer = io.BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(buffer)
    if math.prod(shape) * dtype.itemsize > len(data) - buffer.tell():  # numpy would take the memory before it looks
        raise ValueError(f"the array is cut: {dtype} {shape} in {len(data)} bytes")
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


_DECODERS: dict[str, tuple[Callable[[bytes], Any], str]] = {  # and the reason where one fails
    **dict.fromkeys(IMAGE_TYPES, (_decode_image, report.CORRUPT_IMAGE)),
    # without the mark that some programs put before a text
    "txt": (lambda data: data.decode("utf-8-sig"), report.BAD_CAPTION),
    "json": (_decode_json, report.BAD_JSON),
    "npy": (_decode_array, report.BAD_ARRAY),
    "safetensors": (safetensors.torch.load, report.BAD_ARRAY),
}
