import io
import pickle
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from shard_samples import picture, png_bytes

from unidiff.data import report
from unidiff.data.members import (
    Unusable,
    check_member,
    decode_member,
    encode_member,
    find_member,
    is_blank,
    member_type,
)


class Explosive:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["png", "webp", "bmp", "PNG"])
def test_lossless_images_round_trip(name):
    image = picture(3)
    assert torch.equal(decode_member(name, encode_member(name, image)), image)


@pytest.mark.parametrize("name", ["jpg", "jpeg"])
def test_jpeg_round_trips_closely(name):
    image = picture(4)
    decoded = decode_member(name, encode_member(name, image))
    assert decoded.dtype == torch.uint8 and decoded.shape == image.shape
    assert (decoded.float() - image.float()).abs().mean() < 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("txt", "Grüße 😀\n"), ("json", {"qa": [["a", "ß"]], "n": 1.5}), ("meta.json", [1, None])],
)
def test_text_and_json_round_trip(name, value):
    assert decode_member(name, encode_member(name, value)) == value


def test_arrays_and_tensors_round_trip():
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    decoded = decode_member("codes.npy", encode_member("codes.npy", array))
    assert decoded.dtype == array.dtype and np.array_equal(decoded, array)
    tensors = decode_member("safetensors", encode_member("safetensors", {"x": torch.arange(3)}))
    assert torch.equal(tensors["x"], torch.arange(3))


@pytest.mark.parametrize(
    "name", ["pkl", "pickle", "pyd", "pth", "pt", "ten", "mp", "cls", "npz", "tiff", "svg", "", "data.pkl"]
)
def test_other_types_are_refused(name):
    with pytest.raises(ValueError, match="never decoded"):
        check_member(name)
    with pytest.raises(ValueError, match="never decoded"):
        decode_member(name, pickle.dumps(Explosive()))
    with pytest.raises(ValueError, match="never decoded"):
        encode_member(name, b"")


def test_pickles_inside_allowed_types_are_not_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Explosive()], dtype=object), allow_pickle=True)
    for name in ("npy", "json", "txt", "png", "safetensors"):
        data = buffer.getvalue() if name == "npy" else pickle.dumps(Explosive(), protocol=4)
        with pytest.raises(Unusable):
            decode_member(name, data)
    archive = io.BytesIO()
    np.savez(archive, x=np.zeros(2))
    with pytest.raises(Unusable, match="single array"):
        decode_member("npy", archive.getvalue())


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("jpg", b"", report.CORRUPT_IMAGE),
        ("png", b"not a picture", report.CORRUPT_IMAGE),
        ("txt", b"caf\xe9", report.BAD_CAPTION),
        ("json", b"{", report.BAD_JSON),
        ("json", b"[" * 100_000, report.BAD_JSON),
        ("npy", b"\x93NUMPY", report.BAD_ARRAY),
        ("safetensors", b"\x00" * 4, report.BAD_ARRAY),
    ],
)
def test_damage_is_named_by_reason(name, data, reason):
    with pytest.raises(Unusable) as caught:
        decode_member(name, data)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{name}: ") and " at 0x" not in str(caught.value)


@pytest.mark.parametrize("name", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_images_are_corrupt(name, share):
    data = encode_member(name, torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8))
    with pytest.raises(Unusable) as caught:
        decode_member(name, data[: int(len(data) * share)])
    assert caught.value.reason == report.CORRUPT_IMAGE


def test_other_image_formats_are_not_opened():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "TIFF")
    with pytest.raises(Unusable, match=r"TIFF.*expected a whole PNG, JPEG, WebP, GIF or BMP"):
        decode_member("png", buffer.getvalue())


def test_a_claim_of_gigapixels_is_refused():
    data = bytearray(png_bytes("L", 0))
    header = data.index(b"IHDR")
    data[header + 4 : header + 12] = (8_500).to_bytes(4, "big") * 2
    checksum = zlib.crc32(bytes(data[header : header + 17]))
    data[header + 17 : header + 21] = checksum.to_bytes(4, "big")
    with pytest.raises(Unusable, match="8500 x 8500 pixels"):
        decode_member("png", bytes(data))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8080, (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, expected):
    decoded = decode_member("png", png_bytes(mode, value))
    assert decoded.shape == (3, 4, 4)
    assert tuple(decoded[:, 0, 0].tolist()) == expected


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode_member("jpg", buffer.getvalue()).shape == (3, 6, 4)


@pytest.mark.parametrize("text", ["", " \n", "\ufeff", "\u200b\u200b", "\t\x00"])
def test_blank_texts(text):
    assert is_blank(text) and not is_blank(text + "a") and not is_blank("😀" + text)


def test_byte_order_marks_are_no_part_of_the_content():
    assert decode_member("txt", b"\xef\xbb\xbfwords") == "words"
    assert decode_member("json", b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_arrays_that_claim_more_than_they_hold():
    for shape in ("(1000000000000,)", "(3, 1000000, 1000000)", "(5,)"):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        with pytest.raises(Unusable, match="the array is cut"):
            decode_member("npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(32))


def test_names():
    assert member_type("codes.NPY") == "npy"
    assert find_member({"txt": b"", "jpeg": b""}, "image") == "jpeg"
    assert find_member({"txt": b""}, "image") is None
    assert find_member({"txt": b""}, "txt") == "txt"
