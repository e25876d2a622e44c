"""Recorded decodes, sheets, and files that are whole or absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.pipelines.sheet import Cell, draw_sheet, save_image, stack


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def recorded(pipe):
    return pipe.text_to_image(["a dog", "two cats"], steps=4, generator=0, record_trajectory=True)


def test_trajectory_goes_from_hidden_to_the_result(pipe, recorded):
    steps = recorded.trajectory
    mask = pipe.settings.vocabulary.mask_id
    assert steps.ids.shape == (5, 2, 16) and steps.frames.shape == (5, 2, *SIZE, 3)
    left = (steps.ids == mask).sum((1, 2)).tolist()
    assert left[0] == 12 and left[-1] == 0 and left == sorted(left, reverse=True)
    assert torch.equal(steps.ids[-1], recorded.ids)
    for frame, image in zip(steps.frames[-1], recorded.images, strict=True):
        assert np.abs(frame.numpy().astype(int) - np.asarray(image).astype(int)).max() <= 1
    first = steps.frames[0]
    assert (first[..., 0] == first[..., 1]).all() and first.float().std() < 12  # all under a grey cover
    assert steps.texts == [["a dog", "two cats"]] * 5


def test_a_result_prints_as_one_line(pipe, recorded):
    line = repr(recorded)
    assert line.startswith(f"UniDiffOutput(images=[2 of {SIZE[1]}x{SIZE[0]}], texts=['a dog', 'two cats'], nfe=")
    assert "\n" not in line and len(line) < 200 and "notes" not in line
    shape = list(recorded.codes.shape)
    assert f"images=Tensor{shape}" in repr(pipe("a dog", output_type="codes")).replace("[1, ", "[2, ")


def test_recording_changes_nothing(pipe, recorded):
    plain = pipe.text_to_image(["a dog", "two cats"], steps=4, generator=0)
    assert torch.equal(plain.ids, recorded.ids) and plain.trajectory is None


def test_text_trajectory_shows_open_words(pipe, recorded):
    result = pipe.inpaint(recorded.images[0], None, "a <mask:2>", generator=0, steps=2, record_trajectory=True)
    texts = [row[0] for row in result.trajectory.texts]
    assert texts[0] == "a _ _" and texts[-1] == result.texts[0] and "_" not in texts[-1].replace(result.texts[0], "")


def test_gif_and_filmstrip(recorded, tmp_path):
    recorded.save_gif(tmp_path / "new" / "decode.gif", milliseconds=100)
    with Image.open(tmp_path / "new" / "decode.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == 5 and gif.info["duration"] == 100
    recorded.save_filmstrip(tmp_path / "strip.png", count=3)
    recorded.save_filmstrip(tmp_path / "long.png", count=50)
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "long.png") as long:
        assert strip.format == "PNG" and strip.width < long.width and strip.height == long.height
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.png", "new", "strip.png"]


def test_results_without_a_trajectory_say_so(pipe, recorded, tmp_path):
    plain = pipe.text_to_image("a dog", steps=1, generator=0)
    for save in (plain.save_gif, plain.save_filmstrip):
        with pytest.raises(ValueError, match="record_trajectory=True"):
            save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="count is 1"):
        recorded.save_filmstrip(tmp_path / "x.png", count=1)
    with pytest.raises(ValueError, match="does not end in"):
        recorded.save_filmstrip(tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    old = Image.new("RGB", (4, 4), "red")
    save_image(old, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


def test_sheets_hold_all_pictures_and_wrap_words():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    short = draw_sheet([[Cell((red,), "a"), Cell((red, red), "b")]], side=40)
    colours = np.asarray(short).reshape(-1, 3)
    assert (colours == (255, 0, 0)).all(1).sum() == 3 * 40 * 40
    long = draw_sheet([[Cell((red,), "words " * 20, "a note", "heading")]], side=40, title="title")
    assert long.height > short.height + 100
    endless = np.asarray(draw_sheet([[Cell((red,), "x" * 60)]], side=40))
    assert (endless[:, -8:] == 255).all()  # a word without spaces stays inside its cell
    both = stack([short, long])
    assert both.size == (max(short.width, long.width), short.height + long.height)
