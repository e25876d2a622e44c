"""Faces: generator and splits, the exact image tokenizer, the reader, and the exact distribution of captions."""

from __future__ import annotations

import itertools
import math
import random
import shutil

import pytest
import torch

from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.worlds.faces import language
from unidiff.worlds.faces.cells import face_tokenizer
from unidiff.worlds.faces.reader import read_faces
from unidiff.worlds.faces.scenes import (
    ATTRIBUTES,
    HELD_OUT,
    LAYERS_FOLDER,
    NONE,
    FaceGenerator,
    Layers,
    default_layers,
    render,
    render_batch,
)
from unidiff.worlds.faces.table import FaceScenes, picture_source


@pytest.fixture(scope="module")
def tokenizer() -> VQImageTokenizer:
    return VQImageTokenizer(face_tokenizer())


def faces_of(count: int, seed: int = 3, split: str = "all"):
    generator = FaceGenerator(seed, split)
    return [generator.face(i) for i in range(count)]


def test_faces_are_a_function_of_seed_and_number():
    assert faces_of(20) == faces_of(20) != faces_of(20, seed=4)
    assert all(face.possible() for face in faces_of(300))
    for name, values in ATTRIBUTES.items():
        assert {getattr(face, name) for face in faces_of(600)} == set(values), name
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of train, held_out, all"):
        FaceGenerator(0, "test")


def test_held_out_pairs_are_in_their_split_only():
    shown = lambda split: {p for face in faces_of(400, split=split) for p in HELD_OUT if face.shows(p)}  # noqa: E731
    assert shown("train") == set() and shown("held_out") == set(HELD_OUT)
    assert all(any(face.shows(p) for p in HELD_OUT) for face in faces_of(100, split="held_out"))
    for first, value, second, other in HELD_OUT:
        assert value in ATTRIBUTES[first] and other in ATTRIBUTES[second]


def test_layers_that_are_not_whole_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"layers\.json is missing; make it with"):
        Layers(tmp_path)
    for name in ("layers.json", "layers.png"):
        shutil.copy(LAYERS_FOLDER / name, tmp_path)
    (tmp_path / "layers.json").write_text('{"columns": 16, "layers": [{"layer": "hat"}]}')
    with pytest.raises(ValueError, match=r"layers\.json.*make it with"):
        Layers(tmp_path)


def test_pictures_are_flat_squares_of_the_artwork():
    faces = faces_of(5)
    large, small = render_batch(faces), default_layers().compose(faces)
    assert large.shape == (5, 3, 64, 64) and torch.equal(large[:, :, ::4, ::4], small)
    assert torch.equal(large[:, :, 3::4, 1::4], small)
    assert torch.equal(picture_source("cpu", (1.0,) * 4, 3)(2), large[2])
    assert render(faces[0]).size == (64, 64)


def test_the_tokenizer_is_exact_for_every_face(tokenizer, tmp_path):
    assert tokenizer.codebook_size <= 2048 and tokenizer.factor == 8
    pictures = render_batch(faces_of(500, seed=8))
    codes = tokenizer.encode(pictures)
    assert torch.equal((tokenizer.decode(codes) * 255).round(), (pictures * 255).round())
    tokenizer.save_pretrained(tmp_path / "cells")
    assert torch.equal(VQImageTokenizer.from_pretrained(tmp_path / "cells").encode(pictures), codes)


def test_codes_do_not_depend_on_the_background(tokenizer):
    face = faces_of(1)[0]
    grounds = [face.altered(background=name) for name in ATTRIBUTES["background"]]
    codes = tokenizer.encode(render_batch(grounds))
    ground = len(grounds)
    assert all((row[row < ground] == i).all() for i, row in enumerate(codes))
    assert all(torch.equal(row[codes[0] >= ground], codes[0][codes[0] >= ground]) for row in codes)


def test_held_out_faces_have_no_codes_of_their_own(tokenizer):
    seen = tokenizer.encode(render_batch(faces_of(6000, split="train"))).unique()
    held_out = tokenizer.encode(render_batch(faces_of(1500, split="held_out"))).unique()
    assert torch.isin(held_out, seen).float().mean() > 0.995  # rare cells may be missing from so few


def test_any_picture_has_codes(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for picture in (torch.rand(2, 3, 64, 64, generator=generator), torch.zeros(1, 3, 128, 64), torch.ones(1, 3, 8, 8)):
        codes = tokenizer.encode(picture)
        assert int(codes.min()) >= 0 and int(codes.max()) < tokenizer.codebook_size
        assert tokenizer.decode(codes).shape == picture.shape


def test_the_reader_reads_every_face():
    faces = [*faces_of(150, seed=5), *faces_of(50, seed=5, split="held_out")]
    readings = read_faces(render_batch(faces))
    assert [reading.face for reading in readings] == faces
    assert not any(reading.unread or reading.wrong for reading in readings)


def test_the_reader_says_what_it_cannot_read():
    faces = [face for face in faces_of(40) if face.beard == NONE]
    pictures = render_batch(faces)
    pictures[:, :, 36:44, 24:40] = 0.5  # over the mouth
    for face, reading in zip(faces, read_faces(pictures), strict=True):
        assert reading.face is None and reading.wrong > 0 and reading.value("mouth") is None
        assert reading.value("background") == face.background and reading.value("clothing") == face.clothing
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert all(len(reading.unread) > 6 for reading in read_faces(noise))


def test_captions_say_what_is_there_and_nothing_else():
    for i, face in enumerate(faces_of(400)):
        caption = language.draw_caption(face, random.Random(i))
        facts = language.parse_caption(caption)
        assert facts is not None and language.facts_hold(facts, face)
        assert language.LEAST <= len(facts) <= language.MOST
        name = random.Random(i).choice(list(facts))
        wrong = next(value for value in ATTRIBUTES[name] if value != facts[name])
        assert not language.facts_hold({**facts, name: wrong}, face)
    for text in (
        "",
        "a person",
        "a person with no hat",
        "a person with no hat, no beard, no glasses, light skin, a frown",
    ):
        assert language.parse_caption(text) is None  # too little, or out of order
    assert not language.facts_hold(None, faces_of(1)[0])


def test_no_phrase_means_two_things():
    seen: dict[str, set] = {}
    for face in faces_of(3000):
        for facet in language.FACETS:
            stated = tuple((name, getattr(face, name)) for name in language.attributes_of(facet, face))
            for phrase in language.phrases(facet, face):
                seen.setdefault(phrase, set()).add(stated)
    assert len(seen) == 200 and all(len(meanings) == 1 for meanings in seen.values())


@pytest.mark.parametrize("bald", [True, False])
def test_the_distribution_of_captions_is_exact(bald):
    face = next(face for face in faces_of(200) if (face.hair == NONE) == bald)
    total = entropy = 0.0
    for facets in language.choices(face):
        options = [language.phrases(facet, face) for facet in facets]
        p = math.exp(-language.caption_surprise(f"{language.OPENERS[0]} {', '.join(o[0] for o in options)}", face))
        ways = len(language.OPENERS) * math.prod(map(len, options))
        total, entropy = total + ways * p, entropy - ways * p * math.log(p)
    assert total == pytest.approx(1) and language.caption_entropy(face) == pytest.approx(entropy)
    drawn = {language.draw_caption(face, random.Random(i)) for i in range(300)}
    assert all(math.isfinite(language.caption_surprise(caption, face)) for caption in drawn) and len(drawn) > 280
    other = face.altered(background=next(v for v in ATTRIBUTES["background"] if v != face.background))
    named = next(caption for caption in drawn if "background" in language.parse_caption(caption))
    assert language.caption_surprise(named, other) == math.inf


def test_answers_are_right_and_balanced():
    counts = {"yes": 0, "no": 0}
    for i, face in enumerate(faces_of(600)):
        question, answer = language.draw_question(face, random.Random(i), "yes or no")
        phrase = question.removeprefix("does the picture show ").removesuffix("?")
        own = [p for facet in language.FACETS for p in language.phrases(facet, face)]
        assert answer == ("yes" if phrase in own else "no")
        counts[answer] += 1
        assert language.draw_question(face, random.Random(i), "hat")[1] == face.hat
        bald = language.draw_question(face, random.Random(i), "hair there")
        assert bald == ("is the person bald?", "yes" if face.hair == NONE else "no")
    assert min(counts.values()) > 240
    kinds = {language.draw_question(face, random.Random(i))[0] for i, face in enumerate(faces_of(600))}
    assert len(kinds) > 50


def test_texts_of_a_scene_are_fixed_and_fit():
    scenes = FaceScenes(FaceGenerator(2), questions=3)
    captions, questions = scenes.texts(5, 4)
    assert (captions, questions) == scenes.texts(5, 4) and len(captions) == 4 and len(questions) == 3
    assert {scenes.level(i) for i in range(200)} == {1, 2, 3, 4}
    longest = max(len(text.replace(",", " ,").split()) for i in range(500) for text in scenes.texts(i, 4)[0])
    assert longest < 32
    with pytest.raises(ValueError, match="questions is -1"):
        FaceScenes(FaceGenerator(2), -1)
    assert list(itertools.islice((s for i in range(50) for s in scenes.texts(i, 1)[0]), 2))
