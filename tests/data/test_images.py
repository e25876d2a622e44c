import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, v2

from unidiff.data.shards import ImagePreprocess


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def same(pixels, image):
    """Exactly the 8-bit picture."""
    return torch.allclose(pixels * 255, image.float(), atol=1e-4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 16, 24]))
def test_any_picture_becomes_the_square(height, width, size):
    out = ImagePreprocess(size, 8)(noise(height, width))
    assert out.shape == (3, size, size) and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (33, 33), (20, 30), (10, 15)])
def test_shorter_side_is_resized_then_the_centre_kept(height, width):
    image = noise(height, width)
    resized = v2.Resize(16, InterpolationMode.BICUBIC, antialias=True)(image)
    expected = v2.functional.to_dtype(v2.CenterCrop(16)(resized), torch.float32, scale=True)
    assert (ImagePreprocess(16)(image) - expected).abs().mean() < 0.02


def test_a_picture_of_the_right_size_is_unchanged():
    image = noise(16, 16)
    assert same(ImagePreprocess(16, 8)(image), image)
    assert same(ImagePreprocess(16, 8)(noise(16, 20)), noise(16, 20)[:, :, 2:18])


def test_own_size_is_cropped_to_multiples_of_the_factor():
    image = noise(21, 34)
    out = ImagePreprocess(None, 8)(image)
    assert out.shape == (3, 16, 32)
    assert same(out, v2.functional.center_crop(image, [16, 32]))
    with pytest.raises(ValueError, match="smaller than the tokenizer factor"):
        ImagePreprocess(None, 8)(noise(7, 30))


def test_long_strips_stay_small():
    assert ImagePreprocess(64)(noise(1, 60_000)).shape == (3, 64, 64)


@pytest.mark.parametrize(("size", "factor"), [(12, 8), (0, 8), (-8, 8), (8, 0)])
def test_sizes_that_do_not_fit(size, factor):
    with pytest.raises(ValueError, match="multiple of the tokenizer factor"):
        ImagePreprocess(size, factor)


def test_other_tensors_are_refused():
    for bad in (torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 image"):
            ImagePreprocess(8)(bad)
