"""Pictures and masks of every kind arrive as the same tensors, or are refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unidiff.pipelines.decode import columns_of
from unidiff.pipelines.inputs import ImageInputs

SIZE = (16, 24)
INPUTS = ImageInputs(SIZE, 8)
RGB = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(RGB).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(RGB),
        Image.fromarray(RGB).convert("RGBA"),
        RGB,
        RGB / 255.0,
        (RGB / 255.0).astype(np.float32),
        RGB[None],
        EXPECTED,
        EXPECTED[None].double(),
        torch.from_numpy(RGB).permute(2, 0, 1),
        [Image.fromarray(RGB)],
    ],
    ids=["pil", "rgba", "uint8", "float64", "float32", "batch", "tensor", "tensor batch", "uint8 tensor", "list"],
)
def test_kinds_of_pictures_agree(picture):
    images = INPUTS.images(picture)
    assert images.dtype == torch.float32 and torch.allclose(images, EXPECTED[None], atol=1e-6)


def test_grey_palette_and_transparency():
    grey = Image.fromarray(RGB).convert("L")
    expected = torch.from_numpy(np.asarray(grey) / 255.0).float().expand(1, 3, -1, -1)
    assert torch.allclose(INPUTS.images(grey), expected, atol=1e-6)
    assert torch.allclose(INPUTS.images(np.asarray(grey)), expected, atol=1e-6)
    palette = Image.new("P", SIZE[::-1])
    palette.putpalette([200, 100, 50] * 256)
    assert torch.allclose(INPUTS.images(palette)[0, :, 0, 0], torch.tensor([200, 100, 50]) / 255, atol=1e-6)
    clear = np.zeros((*SIZE, 4), dtype=np.uint8)
    for transparent in (Image.fromarray(clear), clear):
        assert (INPUTS.images(transparent) == 1).all()  # white shows through, not black


def test_resize_crops_the_centre_and_keeps_the_model_size():
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 24:72] = 255
    images = INPUTS.images([Image.fromarray(wide), Image.fromarray(RGB), wide], resize=True)
    assert images.shape == (3, 3, *SIZE)
    assert (images[0, :, 4:-4, 4:-4] > 0.99).all() and torch.allclose(images[1], EXPECTED, atol=1e-6)
    assert torch.equal(images[0], images[2])


def test_masks_of_every_kind_agree_and_cover_cells():
    mask = np.zeros(SIZE, dtype=bool)
    mask[0, 8], mask[15, 23] = True, True
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    kinds = [grey, grey.convert("RGB"), grey.convert("1"), mask, mask.astype(np.uint8) * 255, mask.astype(np.float32)]
    kinds += [torch.from_numpy(mask), torch.from_numpy(mask)[None], mask[..., None]]
    for kind in kinds:
        found = INPUTS.masks(kind, RGB)
        assert torch.equal(found, torch.from_numpy(mask)[None])
    assert INPUTS.cells(found).tolist() == [[[False, True, False], [False, False, True]]]


def test_a_mask_is_resized_with_its_picture():
    large = Image.new("L", (240, 160))
    large.putpixel((20, 30), 255)  # one pixel in a hundred per pixel of the model
    found = INPUTS.masks(large, Image.new("RGB", (240, 160)), resize=True)
    assert INPUTS.cells(found).tolist() == [[[True, False, False], [False, False, False]]]


BAD = {
    "size": (Image.new("RGB", (24, 17)), "24x17 pixels but this model takes 24x16"),
    "mode F": (Image.new("F", (24, 16), 3.0), "mode F and values in [3, 3]"),
    "int64": (RGB.astype(np.int64), "dtype int64"),
    "int64 tensor": (torch.from_numpy(RGB.astype(np.int64)).permute(2, 0, 1), "dtype torch.int64"),
    "bool": (RGB > 99, "dtype bool"),
    "complex": (RGB * 1j, "dtype complex128"),
    "complex tensor": (torch.zeros(3, *SIZE, dtype=torch.complex64), "dtype torch.complex64"),
    "objects": (RGB.astype(object), "dtype object"),
    "texts": (np.full((*SIZE, 3), "white"), "dtype <U5"),
    "meta": (torch.zeros(3, *SIZE, device="meta"), "meta device"),
    "sparse": (torch.zeros(3, *SIZE).to_sparse(), "layout torch.sparse_coo"),
    "mapping": ({"image": RGB}, "image is a dict"),
    "nested": ([Image.new("RGB", (24, 16)), [Image.new("RGB", (24, 16))]], "image 2 of 2 is a list"),
    "one of three": ([RGB, RGB, RGB[:8]], "image 3 of 3 is 24x8 pixels"),
    "empty file": (b"", "it is empty"),
    "range": (RGB.astype(np.float32), "values span"),
    "nan": (np.full((*SIZE, 3), np.nan), "values span"),
    "channels": (np.zeros((*SIZE, 2)), "2 channels"),
    "5-D": (np.zeros((1, 1, *SIZE, 3)), "shape"),
    "2-D tensor": (torch.zeros(SIZE), "shape (16, 24)"),
    "no pixels": (np.zeros((0, 0, 3)), "at least one pixel"),
    "none": (None, "image is None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(name):
    picture, words = BAD[name]
    with pytest.raises(ValueError) as caught:
        INPUTS.images(picture)
    assert words in str(caught.value)


BAD_MASKS = {
    "size": (np.zeros((4, 4), bool), "4x4 pixels but the image is 24x16"),
    "texts": (np.full(SIZE, "white"), "dtype <U5"),
    "complex": (np.zeros(SIZE, complex), "dtype complex128"),
    "objects": (np.zeros(SIZE, object), "dtype object"),
    "negative": (np.full(SIZE, -1), "values span [-1, -1]"),
    "huge": (np.full(SIZE, 70000), "values span [70000, 70000]"),
    "dim": (np.full(SIZE, 3, np.uint8), "dim everywhere"),
    "labels": (np.arange(16 * 24).reshape(SIZE).astype(np.uint8) % 5, "dim everywhere"),
    "dim floats": (np.full(SIZE, 0.25), "dim everywhere"),
    "list": ([[0, 1], [1, 0]], "mask_image 1 of 2 is a list"),
    "path": (3, "mask_image is an int"),
    "batch of others": (np.zeros((2, *SIZE), bool), "shape (2, 16, 24) for 1 images"),
    "one dimension": (np.zeros(16, bool), "shape (16,)"),
    "empty": (np.zeros((0, 24), bool), "shape (0, 24)"),
    "meta": (torch.zeros(SIZE, device="meta"), "meta device"),
    "sparse": (torch.zeros(SIZE).to_sparse(), "layout torch.sparse_coo"),
    "range": (np.full(SIZE, 3.0), "outside [0, 1]"),
    "nan": (np.full(SIZE, np.nan), "outside [0, 1]"),
    "channels": (np.zeros((*SIZE, 3)), "expected [H, W]"),
    "mode": (Image.new("F", (24, 16), 7), "outside [0, 1]"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks(name):
    mask, words = BAD_MASKS[name]
    with pytest.raises(ValueError) as caught:
        INPUTS.masks(mask, RGB)
    assert words in str(caught.value)


def test_columns_have_one_length():
    assert columns_of(1, a=[1], b=[2, 3], c=None) == {"a": [1, 1], "b": [2, 3]}
    assert columns_of(2, a=[1], b=[2, 3]) == {"a": [1, 1, 1, 1], "b": [2, 2, 3, 3]}
    assert columns_of(2, a=torch.tensor([[1]]))["a"].tolist() == [[1], [1]]
    with pytest.raises(ValueError, match="2 as do not go with 3 bs"):
        columns_of(1, a=[1, 2], b=[1, 2, 3])
