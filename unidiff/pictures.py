"""The one reader of pictures: files, addresses, bytes and PIL images to upright RGB, the same in training, Python and commands."""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from unidiff.addresses import Unreachable, fetch, local_path, scheme
from unidiff.errors import DamagedFile, reading

PictureSource = str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image.Image
"""A path, an address (http, https or file), the bytes of a picture file, an open binary file, or a PIL image."""

MAX_PIXELS = 64 * 1024 * 1024
"""Largest picture that is decoded: a few kB can claim to be gigapixels."""
MAX_BYTES = 256 * 1024 * 1024
"""Largest file that is read or downloaded."""
FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP")
"""What is opened, told by its first bytes and never by its name. Pillow would start other programs for some formats."""

_PNG = b"\x89PNG\r\n\x1a\n"
_WORDS = "a picture"
_FIX = f"expected a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation; 1 is upright
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def open_picture(
    source: PictureSource, what: str | None = None, *, max_pixels: int = MAX_PIXELS, background: str = "white"
) -> Image.Image:
    """A picture in mode RGB, turned upright; of an animation the first frame.

    Args:
        what: name of the picture for messages, for instance "images[2]"; a path is named anyway.
        max_pixels: larger pictures are refused before they are decoded. background: colour under transparent pixels.

    Raises:
        FileNotFoundError: no such file. DamagedFile: not a whole picture of the `FORMATS`, too large, or not reachable.
    """
    return as_rgb(decode_picture(source, what, max_pixels=max_pixels), background, what)


def decode_picture(source: PictureSource, what: str | None = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture with all its pixels in memory, turned upright as its EXIF tag says, in its own mode; see `open_picture`.

    Any other metadata (text, colour profile, resolution, even where they are malformed) is ignored.
    """
    if isinstance(source, Image.Image):
        name = what or "the picture"
        if getattr(source, "tile", None) and source.format == "EPS":
            raise DamagedFile(f"{name} is an EPS file, which Pillow would run a program for; {_FIX}")
        _check_size(source, max_pixels, name)
        with reading(name, _WORDS, _FIX):
            source.load()
            return _upright(source)
    data, name = _read(source, what)
    with reading(name, _WORDS, _FIX):
        image = _opened(data)
    _check_size(image, max_pixels, name)
    with reading(name, _WORDS, _FIX):
        image.load()
        return _upright(image)


def as_rgb(image: Image.Image, background: str = "white", what: str | None = None) -> Image.Image:
    """A decoded PIL image of any mode in RGB.

    16-bit grey is scaled to 8 bits; transparency (alpha, a transparent colour or palette entry) is laid on `background`;
    CMYK and other colours are converted by Pillow, without their colour profile. Mode I counts as 16-bit grey, mode F as
    grey in [0, 1].

    Raises:
        DamagedFile: numbers of mode I or F outside of what these hold, or no pixels.
    """
    name = what or "the picture"
    if not image.width or not image.height:
        raise DamagedFile(f"{name} is {image.width} x {image.height} pixels; expected at least one pixel")
    transparent: np.ndarray | None = None  # [H, W]
    if image.mode in (*_DEEP_GREY, "I", "F"):
        key = image.info.get("transparency")
        values = np.asarray(image)
        if isinstance(key, int) and image.mode != "F":
            transparent = values == key
        image = Image.fromarray(_eight_bits(values, image.mode, name))
    with reading(name, _WORDS, "convert it to RGB"):
        if image.mode == "La":  # Pillow converts it to nothing else
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        image = image.convert("RGB")
        if transparent is not None:
            image.paste(background, mask=Image.fromarray(transparent))
    return image


def _eight_bits(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    """uint8 `[H, W]` of grey in another type; Pillow's own conversion cuts whatever is above 255."""
    low, high = values.min(), values.max()
    if mode == "F":
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise DamagedFile(f"{name} has mode F and values in [{low:.3g}, {high:.3g}]; expected [0, 1], or RGB")
        return (values * 255.0).round().astype(np.uint8)
    if mode == "I" and (low < 0 or high > 65535 or 0 < high < 256):
        raise DamagedFile(
            f"{name} has mode I and values in [{low}, {high}], neither clearly 8 nor 16 bits; convert it to L or RGB"
        )
    return (values.astype(np.float64) / 257.0).round().astype(np.uint8)


def _opened(data: bytes) -> ImageFile.ImageFile:
    """The file with its header read, by its first bytes. `Image.open` would warn about sizes that are refused anyway."""
    if data.startswith(_PNG):
        if len(data) < 33 or data[12:16] != b"IHDR":
            raise ValueError("its beginning is cut or damaged")
        image = PngImageFile(io.BytesIO(b"".join(_plain_chunks(data))))
        _scale_key(image, depth=data[24])
        return image
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(io.BytesIO(b"".join(_plain_segments(data))))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile(io.BytesIO(data))
    if data.startswith(b"BM"):
        return BmpImageFile(io.BytesIO(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(data))
    kind = next((words for start, words in _KNOWN.items() if data.startswith(start)), "of another kind")
    raise ValueError(f"it is {kind}" if data else "it is empty")


_KNOWN = {
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"<": "a page or a drawing (HTML, SVG)",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"\0\0\0": "a film, or a HEIC or AVIF picture",
}


def _plain_chunks(data: bytes) -> Iterator[bytes]:
    """A PNG without its metadata: Pillow refuses a picture for the least fault in them, and inflates them unasked."""
    yield _PNG
    place = len(_PNG)
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place : place + length + 12]
        place += length + 12
        whole = len(chunk) == length + 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind == b"tRNS":
            if not whole:
                raise ValueError(f"its {kind.decode('latin-1')} chunk at byte {place - length - 12} is cut or damaged")
            yield chunk
        elif kind == b"eXIf" and whole:
            yield chunk
        if kind == b"IEND":
            return


def _plain_segments(data: bytes) -> Iterator[bytes]:
    """A JPEG without its metadata but for orientation and what says how its colours are coded."""
    place = 2
    yield data[:place]
    while data[place : place + 1] == b"\xff" and len(data) > place + 4:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA or not 0xC0 <= marker <= 0xFE:  # pixels follow, or filling
            break
        body = data[place + 4 : place + 2 + length]
        coded = (marker == 0xE0 and body.startswith(b"JFIF") and len(body) >= 14) or (
            marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        )
        oriented = marker == 0xE1 and body.startswith(b"Exif\0\0")
        if coded or oriented or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield data[place : place + 2 + length]
        place += 2 + length
    yield data[place:]


def _scale_key(image: Image.Image, depth: int) -> None:
    """The transparent colour in the units of Pillow's pixels; it keeps the file's."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _check_size(image: Image.Image, max_pixels: int, name: str) -> None:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise DamagedFile(f"{name!r} has {size}, more than the {max_pixels} that are read; make it smaller")


def _upright(image: Image.Image) -> Image.Image:
    orientation = None
    with suppress(Exception):  # malformed metadata raise almost anything, and are ignored
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    turned = image.transpose(method)
    for note in ("exif", "XML:com.adobe.xmp", "xmp"):  # so that nobody turns it again
        turned.info.pop(note, None)
    return turned


def _read(source: str | os.PathLike[str] | bytes | bytearray | BinaryIO, what: str | None) -> tuple[bytes, str]:
    """Bytes of a picture file and its name for messages."""
    if isinstance(source, bytes | bytearray):
        return bytes(source), what or "the picture"
    if isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        shown = where if len(where) <= 200 else where[:197] + "..."
        name = f"{what}: {shown}" if what else shown
        kind = scheme(where)
        if kind in ("http", "https"):
            try:
                return fetch(where, MAX_BYTES), name
            except Unreachable as error:
                raise DamagedFile(f"{what}: {error}" if what else str(error)) from error
        if kind not in ("", "file"):
            raise DamagedFile(f"{name!r} is no address that unidiff reads; give a path, or http, https or file")
        return _read_path(local_path(where), name), name
    if hasattr(source, "read"):
        name = what or str(getattr(source, "name", "the picture"))
        with reading(name, _WORDS, _FIX):
            data = source.read(MAX_BYTES + 1)
            if not isinstance(data, bytes):
                raise ValueError("it is open as text; open it with mode 'rb'")
        return _bounded(data, name), name
    raise DamagedFile(f"{what or 'the picture'} is a {type(source).__name__}; expected a path, address, bytes or PIL")


def _read_path(path: str, name: str) -> bytes:
    with reading(name, _WORDS, "give the path of a picture file"):
        status = os.stat(path) if os.path.lexists(path) else None
    if status is None:
        raise FileNotFoundError(f"image file {name!r} does not exist")
    with reading(name, _WORDS, "give the path of a picture file"):
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no ordinary file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    return _bounded(data, name)


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise DamagedFile(f"{name!r} is larger than {MAX_BYTES // 2**20} MB; no picture that fits a model is")
    return data
