"""Masks of every kind mean the same, and no white pixel of a large one is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff.pipelines.inputs import ImageInputs, fit_white, white_pixels

SIZE, FACTOR = (64, 96), 16
INPUTS = ImageInputs(SIZE, FACTOR)


def crop(height: int, width: int) -> tuple[float, float, float]:
    """Scale and offset (rows, columns) of `resize and crop the centre`, as Pillow pictures get it."""
    scale = max(SIZE[0] / height, SIZE[1] / width)
    return scale, (height * scale - SIZE[0]) / 2, (width * scale - SIZE[1]) / 2


@settings(max_examples=60)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), row=st.floats(0, 1), column=st.floats(0, 1))
@example(height=1024, width=1536, row=0.5, column=0.5)
@example(height=2048, width=2048, row=0.35, column=0.99)
@example(height=64, width=96, row=0.0, column=0.0)
@example(height=7, width=5, row=0.5, column=0.0)
@example(height=1025, width=1537, row=0.999, column=0.001)
def test_every_white_pixel_repaints_its_code(height, width, row, column):
    white = np.zeros((height, width), bool)
    y, x = min(int(row * height), height - 1), min(int(column * width), width - 1)
    white[y, x] = True
    scale, up, left = crop(height, width)
    top, bottom = y * scale - up, (y + 1) * scale - up  # where the pixel lands, in pixels of the model
    start, stop = x * scale - left, (x + 1) * scale - left
    edge = 1.0  # sizes are rounded to whole pixels before the crop
    try:
        fitted = fit_white(white, SIZE)
    except ValueError:
        assert bottom <= edge or top >= SIZE[0] - edge or stop <= edge or start >= SIZE[1] - edge
        return
    assert fitted.shape == SIZE
    rows, columns = np.nonzero(fitted)
    assert rows.min() >= top - 1 - edge and rows.max() <= bottom + edge
    assert columns.min() >= start - 1 - edge and columns.max() <= stop + edge
    assert INPUTS.cells(torch.from_numpy(fitted)[None]).any()


def test_a_resized_mask_covers_what_its_picture_shows():
    """A white square in the picture, and the same in the mask: the codes that see any of the white are repainted."""
    for height, width in ((128, 192), (1000, 1500), (640, 1200), (333, 222), (32, 48)):
        white = np.zeros((height, width), bool)
        white[height // 3 : height // 3 + 5, width // 2 : width // 2 + 7] = True
        picture = Image.fromarray(np.repeat(white[..., None].astype(np.uint8) * 255, 3, -1))
        shown = INPUTS.images(picture, resize=True)[0, 0]
        mask = INPUTS.masks(Image.fromarray(white), picture, resize=True)
        seen = INPUTS.cells((shown > 0.5)[None])
        assert not (seen & ~INPUTS.cells(mask)).any()


WHITE = np.zeros(SIZE, bool)
WHITE[3:9, 40:70] = True
KINDS = {
    "bool": WHITE,
    "0/1": WHITE.astype(np.uint8),
    "0/255": WHITE.astype(np.uint8) * 255,
    "int64 0/1": WHITE.astype(np.int64),
    "int16 0/255": WHITE.astype(np.int16) * 255,
    "uint16": WHITE.astype(np.uint16) * 65535,
    "floats": WHITE.astype(np.float64),
    "half floats": WHITE.astype(np.float16),
    "big-endian": WHITE.astype(">f4"),
    "grey edge": np.where(WHITE, 255, np.where(np.roll(WHITE, 1, 0), 127, 0)).astype(np.uint8),
    "reversed": WHITE[::-1][::-1],
    "column": WHITE[..., None],
    "channel": WHITE[None],
    "tensor": torch.from_numpy(WHITE),
    "tensor 0/1": torch.from_numpy(WHITE).to(torch.uint8),
    "tensor int64": torch.from_numpy(WHITE).long(),
    "tensor bfloat16": torch.from_numpy(WHITE).to(torch.bfloat16),
    "tensor with gradient": torch.from_numpy(WHITE).float().requires_grad_(),
    "tensor channel": torch.from_numpy(WHITE)[None],
    "batch": WHITE[None, ..., None],
    "mode 1": Image.fromarray(WHITE),
    "mode L 0/1": Image.fromarray(WHITE.astype(np.uint8)),
    "mode F": Image.fromarray(WHITE.astype(np.float32)),
    "mode I 0/1": Image.fromarray(WHITE.astype(np.int32)),
    "mode I;16": Image.fromarray(WHITE.astype(np.uint16) * 65535),
    "mode I;16 0/255": Image.fromarray(WHITE.astype(np.uint16) * 255),
}
KINDS |= {
    f"mode {mode}": Image.fromarray(WHITE.astype(np.uint8) * 255).convert(mode)
    for mode in ("L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr", "I")
}


@pytest.mark.parametrize("name", KINDS)
def test_masks_of_every_kind_mean_the_same(name):
    found = INPUTS.masks(KINDS[name], np.zeros((*SIZE, 3), np.uint8))
    assert torch.equal(found, torch.from_numpy(WHITE)[None])


def test_what_is_transparent_stays():
    painted = np.zeros((*SIZE, 4), np.uint8)
    painted[..., :3] = 255  # a white brush; what it did not touch is white too, but transparent
    painted[WHITE, 3] = 255
    assert np.array_equal(white_pixels(Image.fromarray(painted)), WHITE)


def test_label_maps_of_zero_and_one():
    labels = Image.fromarray(WHITE.astype(np.uint8)).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    assert np.array_equal(white_pixels(labels), WHITE)


def test_masks_in_files_keep_their_bits(tmp_path):
    for name, image in KINDS.items():
        if not isinstance(image, Image.Image) or image.mode in ("F", "I", "CMYK", "YCbCr"):
            continue
        image.save(tmp_path / "mask.png")
        for source in (tmp_path / "mask.png", str(tmp_path / "mask.png"), (tmp_path / "mask.png").read_bytes()):
            assert np.array_equal(white_pixels(source), WHITE), name


@pytest.mark.parametrize("value", [0.5, 0.75, 1.0])
def test_half_of_white_is_white(value):
    assert white_pixels(np.full(SIZE, value)).all()


def test_one_mask_for_each_picture_or_one_for_all():
    pictures = [np.zeros((*SIZE, 3), np.uint8)] * 3
    several = np.stack([WHITE, ~WHITE, WHITE])
    for masks in (several, torch.from_numpy(several), list(several), several[:, None], several[..., None]):
        assert torch.equal(INPUTS.masks(masks, pictures), torch.from_numpy(several))
    assert INPUTS.masks(WHITE, pictures).shape == (1, *SIZE)
    assert INPUTS.masks(list(several), pictures[:1]).shape == (3, *SIZE)
    with pytest.raises(ValueError, match=r"shape \(3, 64, 96\) for 1 images"):  # colours, or three masks?
        INPUTS.masks(torch.from_numpy(several), pictures[:1])
    other = [pictures[0], np.zeros((10, 10, 3), np.uint8)]
    with pytest.raises(ValueError, match="mask_image is 96x64 pixels but the image is 10x10"):
        INPUTS.masks(WHITE, other, resize=True)


def test_white_that_the_crop_loses_is_said():
    white = np.zeros((64, 960), bool)
    white[:, :3] = True
    with pytest.raises(ValueError, match="outside the centre"):
        INPUTS.masks(white, np.zeros((64, 960, 3), np.uint8), resize=True)
    assert not INPUTS.masks(np.zeros((64, 960), bool), np.zeros((64, 960, 3), np.uint8), resize=True).any()


def test_a_long_line_is_refused_before_it_grows():
    with pytest.raises(ValueError, match="too long for its width"):
        INPUTS.images(Image.new("RGB", (40_000, 1)), resize=True)
