"""Pictures that people send: what is refused, and that what is taken fits the model exactly."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from studio_cases import HOSTILE, png
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.errors import DamagedFile
from unidiff.studio.uploads import MAX_BYTES, Sent, brushed, fitted, fitted_mask, sent_picture, stored_bytes


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(name, pipe):
    make, words = HOSTILE[name]
    with pytest.raises(DamagedFile, match=words) as refused:
        Sent(make()).opened(pipe)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_file_is_told_by_its_bytes_and_turned_upright():
    file = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20), "green").save(file, "JPEG", exif=turned)
    assert sent_picture(file.getvalue()).size == (20, 30)


def test_only_files_in_the_folder_of_the_server_are_read(tmp_path):
    inside, outside = tmp_path / "sent", tmp_path / "secret.png"
    inside.mkdir()
    (inside / "own.png").write_bytes(png())
    outside.write_bytes(png())
    (inside / "link.png").symlink_to(outside)
    assert stored_bytes(inside / "own.png", inside) == png()
    for path in (
        outside,
        inside / "link.png",
        inside / ".." / "secret.png",
        inside,
        inside / "gone.png",
        "/etc/passwd",
    ):
        with pytest.raises(ValueError, match="was not sent to this server"):
            stored_bytes(path, inside)
    (inside / "large.png").write_bytes(b"\0" * (MAX_BYTES + 1))
    with pytest.raises(DamagedFile, match="larger than 8 MB"):
        stored_bytes(inside / "large.png", inside)


def test_a_picture_that_was_made_larger_comes_back_exactly(pipe):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    large = small.resize((SIZE[1] * 6, SIZE[0] * 6), Image.Resampling.NEAREST)
    assert fitted(large, pipe).tobytes() == small.tobytes() and fitted(small, pipe) is small
    assert fitted(Image.new("RGB", (500, 90)), pipe).size == SIZE[::-1]
    assert fitted(Image.new("RGB", (3, 2)), pipe).size == SIZE[::-1]


def layer(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> bytes:
    image, file = Image.new("RGBA", size), io.BytesIO()
    for box in boxes:
        image.paste("#ff2d78", box)
    image.save(file, "PNG")
    return file.getvalue()


def test_a_mask_is_what_was_painted_on_any_layer(pipe):
    height, width = SIZE
    large = (width * 4, height * 4)
    layers = [layer(large, (0, 0, 8, 4)), layer(large, (40, 20, 41, 21))]
    picture = Image.new("RGB", large)
    mask = fitted_mask(brushed(layers), picture, pipe)
    assert mask is not None and mask.size == (width, height)
    white = np.asarray(mask) > 0
    wanted = np.zeros(SIZE, bool)
    wanted[0, :2] = wanted[5, 10] = True  # one painted pixel of sixteen counts
    assert (white == wanted).all()
    assert brushed([]) is None and brushed([layer(large)]) is None
    assert fitted_mask(None, picture, pipe) is None


def test_paintings_that_make_no_sense_are_refused(pipe):
    with pytest.raises(DamagedFile, match="9 layers; expected at most 8"):
        brushed([layer((4, 4))] * 9)
    with pytest.raises(DamagedFile, match="differ in size"):
        brushed([layer((4, 4)), layer((5, 4))])
    with pytest.raises(DamagedFile, match="more than the 16000000"):
        brushed([HOSTILE["bomb.png"][0]()])
    sent = Sent(png((600, 16)), (layer((600, 16), (0, 0, 4, 4)),))
    with pytest.raises(ValueError, match="lies outside the centre"):
        sent.opened(pipe)


def test_a_painting_of_another_size_is_brought_to_the_picture(pipe):
    picture, mask = Sent(png((48, 32)), (layer((24, 16), (0, 0, 12, 16)),)).opened(pipe)
    assert picture is not None and mask is not None and picture.size == mask.size == SIZE[::-1]
    assert (np.asarray(mask)[:, :12] == 255).all() and not np.asarray(mask)[:, 12:].any()
