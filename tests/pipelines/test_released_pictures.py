"""`UniDiffPipeline.from_pretrained` on MMaDA and Lumina-DiMOO: pictures, captions, answers, inpainting, edits, any size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from released_pipelines import write_pictures

from unidiff.decoding import CacheConfig
from unidiff.decoding.cache import IntervalCache
from unidiff.families.checkpoint.convert import convert
from unidiff.pipeline import UniDiffPipeline

FAMILIES = ("mmada", "lumina")
QUICK = {"steps": 2, "generator": 5}


def _left(width: int = 6, height: int = 6) -> Image.Image:
    """White in the left two columns of pixels, one of codes."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, 2, height))
    return mask


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """By family; converted, since no released config holds the id layout of a tiny model."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        vocabulary = write_pictures(folder / "theirs", family)
        convert(folder / "theirs", folder / "ours", vocabulary=vocabulary)
        parts = {f"{kind}_tokenizer": folder / "theirs" / name for kind, name in PLACES.items()}
        made[family] = UniDiffPipeline.from_pretrained(folder / "ours", **parts)
    small = replace(made["lumina"].layout, pixels=64)  # 4 x 4 codes where nothing else is asked for
    made["any size"] = UniDiffPipeline.from_pipe(made["lumina"], layout=small)
    made["lumina"] = made["any size"].sized(6, 6)
    return made


PLACES = {"image": "image_tokenizer", "text": "tokenizer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_from_words(pipes, family):
    pipe = pipes[family]
    drawn = pipe.text_to_image(["a fox", "two owls on a hill"], 2, **QUICK)
    assert drawn.codes.shape == (4, 3, 3) and [i.size for i in drawn.images] == [(6, 6)] * 4
    assert len({str(codes.tolist()) for codes in drawn.codes}) == 4 and drawn.nfe == 4  # two passes, two streams
    assert drawn.texts == ["a fox"] * 2 + ["two owls on a hill"] * 2 and drawn.text_ids[0] == pipe.texts.encode("a fox")
    alone = pipe.text_to_image("two owls on a hill", steps=2, generator=[int(drawn.seeds[2])], output_type="codes")
    assert torch.equal(alone.images[0], drawn.codes[2])
    assert pipe.text_to_image("a fox", guidance_scale=1.0, **QUICK).nfe == 2
    cached = [
        pipe.text_to_image(["a fox", "two owls on a hill"], **choice, **QUICK)
        for choice in ({}, {"cache": CacheConfig("interval", {"interval": 1})}, {"policy": IntervalCache(1)})
    ]
    assert all(torch.equal(cached[0].codes, other.codes) for other in cached[1:])
    assert cached[1].cache.policy == "interval" and cached[2].cache is None
    with pytest.raises(ValueError, match="num_images_per_prompt is 0"):
        pipe.text_to_image("a fox", 0)
    with pytest.raises(ValueError, match="prompt is empty"):
        pipe.text_to_image(["a fox", " "])


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_and_answers(pipes, family):
    pipe = pipes[family]
    images = pipe.text_to_image(["a fox", "two owls"], **QUICK).images
    told = pipe.caption(images, 4, generator=1)
    assert len(told.texts) == 2 and max(map(len, told.text_ids)) <= 4 and len(told.images) == 2
    asked = pipe.answer(images[0], ["what is it?", "is it on a hill, or not?"], 4, generator=1)
    alone = pipe.answer(images[0], "what is it?", 4, generator=[int(asked.seeds[0])])
    assert len(asked.texts) == 2 and alone.text_ids[0] == asked.text_ids[0]
    called = pipe(image=images[0], question="what is it?", max_text_tokens=4, generator=[int(asked.seeds[0])])
    assert called.text_ids == alone.text_ids
    assert torch.equal(asked.codes[0], pipe.images.encode(pipe.image_inputs.images(images[0]))[0])
    with pytest.raises(ValueError, match=r"(prompt|question) is empty"):
        pipe.answer(images[0], " ")


@pytest.mark.parametrize("family", FAMILIES)
def test_holes_are_filled_and_the_rest_stays(pipes, family):
    pipe = pipes[family]
    picture = Image.new("RGB", (6, 6), (200, 30, 40))
    codes = pipe.images.encode(pipe.image_inputs.images(picture))[0]
    for words in ("a fox", "a <mask> fox"):
        painted = pipe.inpaint(picture, _left(), words, num_images_per_prompt=2, **QUICK)
        assert all(torch.equal(row[:, 1:], codes[:, 1:]) for row in painted.codes)
        assert not torch.equal(painted.codes[0], painted.codes[1])
        alone = pipe.inpaint(picture, _left(), words, steps=2, generator=[int(painted.seeds[1])])
        assert torch.equal(alone.codes[0], painted.codes[1]) and alone.text_ids[0] == painted.text_ids[1]
    first, last = pipe.texts.encode("a"), pipe.texts.encode(" fox")
    assert painted.text_ids[0][: len(first)] == first and painted.text_ids[0][len(first) + 1 :] == last
    told = pipe.inpaint(picture, None, "a <mask:2> fox", **QUICK)  # words alone
    assert torch.equal(told.codes[0], codes)
    pasted = pipe.inpaint(picture, _left(), "a fox", paste_back=True, output_type="pt", **QUICK)
    assert torch.equal(pasted.images[0, :, :, 2:], pipe.image_inputs.images(picture)[0, :, :, 2:])
    assert not torch.equal(pasted.images[0, :, :, :2], pipe.image_inputs.images(picture)[0, :, :, :2])
    with pytest.raises(ValueError, match=f"{family} needs the caption of the picture"):
        pipe.inpaint(picture, _left())
    with pytest.raises(ValueError, match=r"some texts have <mask> holes and some have none"):
        pipe.inpaint(picture, _left(), ["a fox", "a <mask> fox"], **QUICK)
    with pytest.raises(ValueError, match="known in full"):
        pipe.inpaint(picture, None, "a fox", **QUICK)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_unidiffs_own_models_do_with_options(pipes, family, tmp_path):
    """Candidates, negative prompts, what guidance hides, the recorded way."""
    pipe, words = pipes[family], ["a fox", "two owls on a hill"]
    best = pipe.text_to_image(words, num_candidates=3, generator=[5, 6], steps=2, record_trajectory=True)
    assert len(best.images) == 2 and best.trajectory.frames.shape[1:] == (2, 6, 6, 3)
    assert best.trajectory.texts[0] == words and torch.equal(best.trajectory.ids[-1], best.ids)
    best.save_gif(tmp_path / "way.gif")
    alone = pipe.text_to_image(words[1], generator=[int(best.seeds[1])], steps=2)
    assert torch.equal(alone.codes[0], best.codes[1])
    plain, away, hidden, text = (
        pipe.text_to_image(words, generator=[5, 6], steps=2, **more)
        for more in ({}, {"negative_prompt": "owls"}, {"negative_prompt": ""}, {"guidance_hides": "text"})
    )
    assert torch.equal(plain.ids, hidden.ids)
    assert not torch.equal(plain.confidences, away.confidences)
    assert not torch.equal(plain.confidences, text.confidences)
    with pytest.raises(ValueError, match="give one of them"):
        pipe.text_to_image(words, negative_prompt="owls", guidance_hides="text")
    with pytest.raises(ValueError, match="changes nothing at guidance_scale 1"):
        pipe.text_to_image(words, negative_prompt="owls", guidance_scale=1.0)


def test_what_a_family_cannot_do(pipes):
    can = {
        "mmada": "text_to_image, caption, answer, inpaint, edit, generate, chat",
        "lumina": "text_to_image, caption, answer, inpaint, edit, generate",
    }
    for family, tasks in (("mmada", ("complete", "infill")), ("lumina", ("chat", "complete", "infill"))):
        for task in tasks:
            with pytest.raises(ValueError, match=f"^{family} cannot do '{task}'; it does {can[family]}$"):
                getattr(pipes[family], task)("a fox")
        with pytest.raises(ValueError, match=f"{family} makes a picture and words together as a prompt tells"):
            pipes[family].generate()
    with pytest.raises(ValueError, match="mmada draws pictures of 6x6 pixels only"):
        pipes["mmada"].text_to_image("a fox", height=8, width=8)


def test_mmada_answers_without_a_picture(pipes):
    pipe = pipes["mmada"]
    told = pipe.chat(["a fox?", "two owls on a hill?"], 4, generator=1)
    assert told.images is None and told.codes.shape == (2, 0, 0) and max(map(len, told.text_ids)) <= 4
    assert pipe.chat("a fox?", 4, generator=[int(told.seeds[0])]).text_ids[0] == told.text_ids[0]
    talk = pipe.chat([{"role": "user", "content": "a fox?"}], 4, generator=[int(told.seeds[0])])
    assert talk.text_ids[0] == told.text_ids[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_and_words_answer_together(pipes, family):
    """Of a picture and a prompt, or of a prompt alone; each row by itself; with a cache for each segment."""
    pipe, prompts = pipes[family], ["make it red", "a red fox on a hill, and two owls"]
    picture = Image.new("RGB", (6, 6), (200, 30, 40))
    parts = CacheConfig("interval", segments={"text": "dual", "prompt": "interval"})
    for more in ({}, {"cache": parts}, {"guidance_scale": 2.0}):
        for call in (partial(pipe.edit, picture), lambda prompts, **own: pipe.generate(prompt=prompts, **own)):
            both = call(prompts, max_text_tokens=5, steps=4, generator=3, **more)
            assert len(both.texts) == len(both.images) == 2 and both.codes.shape == (2, 3, 3)
            assert max(map(len, both.text_ids)) <= 5 and both.texts[0] not in prompts
            alone = call(prompts[1], max_text_tokens=5, steps=4, generator=[int(both.seeds[1])], **more)
            assert torch.equal(alone.codes[0], both.codes[1]) and alone.text_ids[0] == both.text_ids[1]
    again = pipe("make it red", task="generate", max_text_tokens=5, steps=4, generator=1)
    assert again.codes.shape == (1, 3, 3) and len(again.text_ids[0]) <= 5
    painted = pipe.edit(picture, prompts, mask_image=_left(), max_text_tokens=5, **QUICK)
    codes = pipe.images.encode(pipe.image_inputs.images(picture))[0]
    assert all(torch.equal(row[:, 1:], codes[:, 1:]) for row in painted.codes)
    best = pipe.generate(prompt="a fox", max_text_tokens=4, num_candidates=3, **QUICK)
    assert len(best.texts) == 1
    if family == "lumina":
        assert pipe.edit(picture, "make it red", **QUICK).texts == ["make it red"]  # as Lumina-DiMOO does


@pytest.mark.parametrize("family", FAMILIES)
def test_defects_are_asked_for_by_name(pipes, family):
    pipe = pipes[family]
    wrong = pipe.from_pipe(pipe, layout=replace(pipe.layout, compat="upstream"))
    wrong.set_progress_bar_config(disable=True)
    one, other = (p.generate(prompt="a fox", max_text_tokens=4, steps=4, generator=2) for p in (pipe, wrong))
    assert one.codes.shape == other.codes.shape and not torch.equal(one.confidences, other.confidences)
    assert len(other.texts) == 1


def test_lumina_draws_and_reads_any_size(pipes):
    pipe = pipes["any size"]
    assert pipe.image_size == (8, 8)
    wide = pipe.text_to_image(["a fox", "owls"], height=4, width=10, **QUICK)
    assert wide.codes.shape == (2, 2, 5) and [i.size for i in wide.images] == [(10, 4)] * 2
    assert pipe.text_to_image("a fox", height=4, **QUICK).codes.shape == (1, 2, 4)
    assert pipe.caption(wide.images, 3, generator=1).codes.shape == (2, 2, 5)
    assert pipe.answer(wide.images[0], "what?", 3, generator=1).codes.shape == (1, 2, 5)
    painted = pipe.inpaint(wide.images[0], _left(10, 4), "a fox", **QUICK)
    codes = pipe.sized(4, 10).images.encode(pipe.sized(4, 10).image_inputs.images(wide.images[0]))[0]
    assert torch.equal(painted.codes[0][:, 1:], codes[:, 1:])
    odd = Image.new("RGB", (21, 7), "red")
    with pytest.raises(ValueError, match="image size 7x21 must be a positive multiple of 2"):
        pipe.caption(odd)
    rows, columns = pipe.layout.fit(7, 21)
    assert columns > rows  # the shape of the picture is kept
    assert pipe.caption(odd, 3, resize=True, generator=1).codes.shape == (1, rows, columns)
    assert pipe.sized(6, 6).caption(odd, 3, resize=True, generator=1).codes.shape == (1, 3, 3)  # a size asked for
    with pytest.raises(ValueError, match="give those of one size at a time"):
        pipe.caption([wide.images[0], odd])
    with pytest.raises(ValueError, match="image is an int"):
        pipe.caption(3)


def test_lumina_edits_with_references_masks_and_two_scales(pipes):
    pipe = pipes["any size"]
    pictures = pipe.text_to_image(["a fox", "owls"], height=4, width=6, **QUICK).images
    edited = pipe.edit(pictures, ["make it red", "on a hill, please"], **QUICK)
    assert edited.codes.shape == (2, 2, 3) and edited.nfe == 6  # two passes, three streams
    alone = pipe.edit(pictures[1], "on a hill, please", steps=2, generator=[int(edited.seeds[1])])
    assert torch.equal(alone.codes[0], edited.codes[1])
    again = {"steps": 2, "generator": edited.seeds.tolist()}
    for change in ({"image_guidance_scale": 1.0}, {"guidance_scale": 1.0}, {"reference": pictures[0]}):
        other = pipe.edit(pictures, ["make it red", "on a hill, please"], **change, **again)
        assert other.codes.shape == edited.codes.shape and not torch.equal(other.confidences, edited.confidences)
    several = pipe.edit(pictures[0], "make it red", height=6, width=8, num_images_per_prompt=2, **QUICK)
    assert several.codes.shape == (2, 3, 4)
    kept = pipe.edit(pictures[0], "make it red", mask_image=_left(6, 4), **QUICK)
    given = pipe.sized(4, 6).images.encode(pipe.sized(4, 6).image_inputs.images(pictures[0]))[0]
    assert torch.equal(kept.codes[0][:, 1:], given[:, 1:])
    with pytest.raises(ValueError, match="give either the size"):
        pipe.edit(pictures[0], "make it red", mask_image=_left(6, 4), height=8, width=8)
    with pytest.raises(ValueError, match="does not suit edit, which is guided in 2 directions"):
        pipe.edit(pictures[0], "make it red", guidance_hides="text")
    with pytest.raises(ValueError, match="2 prompts do not go with 3"):
        pipe.edit(pictures + pictures[:1], ["a", "b"])
