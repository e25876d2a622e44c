"""Words that a model was never taught are named: in the result, as a warning once, and where a prompt is too long."""

from __future__ import annotations

import warnings

import pytest
from tiny_pipeline import tiny_parts, tiny_pipeline

from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.text import TextTokenizer, UnknownWords, notes_on, unknown_words, words_of

WORDS = ["a", "dog", "cat", "on", "the", "fox's", "what"]


@pytest.fixture(scope="module")
def pipe():
    transformer, image, text, settings = tiny_parts()
    text.known_words = WORDS
    made = UniDiffPipeline(transformer, image, text, settings)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    "text, words",
    [
        ("a dog, on the cat!", ["a", "dog", "on", "the", "cat"]),
        ("A fox's T-Rex", ["A", "fox's", "T-Rex"]),
        ("3 na\u00efve\u2019s", ["3", "na\u00efve\u2019s"]),
        ("\U0001f98a on \u72d0", ["\U0001f98a", "on", "\u72d0"]),
        ("\u2026 \u2014 .,;:?!()", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_every_task_notes_unknown_words(pipe, recwarn):
    picture = pipe.text_to_image("a dog", generator=0).images[0]
    known = [
        pipe.text_to_image(["a dog", "the cat"], negative_prompt="a cat", guidance_scale=2.0),
        pipe.caption(picture),
        pipe.answer(picture, "what?"),
        pipe.inpaint(picture, None, "a <mask>"),
        pipe.generate("a <mask:2>"),
        pipe.generate(),
    ]
    assert not any(result.notes for result in known)
    assert not [w for w in recwarn if issubclass(w.category, UnknownWords)]
    calls = [
        lambda: pipe.text_to_image(["a owl", "a dog"]),
        lambda: pipe.text_to_image("a dog", negative_prompt="owl", guidance_scale=2.0),
        lambda: pipe.answer(picture, "owl?"),
        lambda: pipe.inpaint(picture, None, "a owl <mask>"),
        lambda: pipe.generate("<mask> owl"),
        lambda: pipe("a owl"),
    ]
    for call in calls:
        with pytest.warns(UnknownWords, match="the word 'owl'"):
            assert len(call().notes) == 1 and "'owl'" in call().notes[0]


def test_the_same_warning_shows_once(pipe):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            pipe.text_to_image("a ox")
        pipe.text_to_image("a hen")
    assert ["'ox'" in str(w.message) for w in seen] == [True, False]


def test_a_warning_points_at_the_line_that_called(pipe):
    calls = (lambda: pipe.text_to_image("a owl"), lambda: pipe("a owl"), lambda: notes_on(["a owl"], pipe.texts))
    for call in calls:
        with pytest.warns(UnknownWords) as seen:
            call()
        assert [warning.filename for warning in seen] == [__file__]


def test_capitals_are_named_as_such(pipe):
    with pytest.warns(UnknownWords):
        note = pipe.text_to_image("A DOG").notes[0]
    assert note == "the model knows the words 'A', 'DOG' in small letters only"
    with pytest.raises(ValueError, match=r"tokens, but .*; shorten it \(the model knows the words 'A', 'DOG'"):
        pipe.text_to_image("A DOG ON THE CAT ON THE CAT")
    with pytest.raises(ValueError, match=r"does not know the words 'hippopotamus' and|the word 'hippopotamus'"):
        pipe.answer(pipe.text_to_image("a dog").images, "hippopotamus hippopotamus?")


def test_a_model_of_free_text_notes_nothing():
    assert tiny_pipeline().texts.known_words is None
    assert tiny_pipeline().text_to_image("an owl").notes == []


def test_known_words_travel_with_the_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    assert UniDiffPipeline.from_pretrained(tmp_path / "model").texts.known_words == frozenset(WORDS)
    pipe.texts.save_pretrained(tmp_path / "words")
    assert TextTokenizer.from_pretrained(tmp_path / "words").known_words == frozenset(WORDS)


def test_words_without_ids_are_found_too():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<|eos|>": 1, "a": 2, "dog": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|eos|>")
    assert unknown_words(["a dog", "an owl, a dog"], TextTokenizer(fast)) == ["an", "owl"]


def test_long_lists_are_cut(pipe):
    with pytest.warns(UnknownWords):
        note = notes_on([" ".join(f"w{i}" for i in range(30)), "x" * 500], pipe.texts)[0]
    assert "and 23 more" in note and len(note) < 300


@pytest.mark.slow
def test_the_embedded_model_knows_its_language(run):
    from unidiff.worlds.emoji.scenes import SceneGenerator, get_profile
    from unidiff.worlds.emoji.table import EmojiScenes
    from unidiff.worlds.scene_rows import corpus

    pipe = UniDiffPipeline.from_pretrained("emoji")
    assert not unknown_words(corpus(EmojiScenes(SceneGenerator(get_profile("cpu"), 9)), 5000), pipe.texts)
    assert unknown_words(["a chair beside A fox"], pipe.texts) == ["chair", "beside", "A"]
    status, out, _ = run("info")
    assert status == 0 and "knows:" in out and " octopuses, " in out


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a dog # cat", "the word '#'"),
        ("a_dog", "the word '_'"),
        ("dog/cat", "the word '/'"),
        ("a\x00dog", r"the word '\\x00'"),
        ("...", "'...' holds no words, so the result may show anything"),
        (" \u2014 ", "holds no words"),
    ],
)
def test_signs_that_no_sentence_has_are_named_too(pipe, text, note):
    with pytest.warns(UnknownWords):
        notes = notes_on([text], pipe.texts)
    assert len(notes) == 1 and note.replace("\\\\", "\\") in notes[0]


def test_signs_between_holes_are_no_words(pipe):
    assert pipe.generate("a <mask>, <mask>!", steps=1).notes == []
