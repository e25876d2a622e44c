"""What people type reaches the embedded model in the words of its grammar, and texts of the grammar stay as they are."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from unidiff.evaluation.metrics.base import METRICS
from unidiff.tokens.text import LONGEST_TYPED, TextTokenizer, unknown_words
from unidiff.worlds.emoji import EMOJI
from unidiff.worlds.emoji.cases import phrasings
from unidiff.worlds.emoji.evaluation import captions
from unidiff.worlds.emoji.language import caption_distribution, draw_question, parse_caption
from unidiff.worlds.emoji.phrasing import SYNONYMS, normaliser, understood_words
from unidiff.worlds.emoji.scenes import SceneGenerator, default_atlas, get_profile, render_batch

PROFILE = get_profile("cpu")
FOLDER = (EMOJI.model or Path()) / "text_tokenizer"
SAID = {
    "apple": "a red apple",
    "A FOX ON A GREEN BACKGROUND": "a fox on a green background",
    "three lemons, one fox": "three lemons and a fox",
    "blue background, fox": "a fox on a blue background",
    "Fox, blue background.": "a fox on a blue background",
    "2 dogs in front of a grey background!": "two dog faces on a gray background",
    "kitty": "a cat face",
    "a slice of pizza": "a pizza",
    "puppy next to a car": "a dog face and an automobile",
    "a big fox in the upper left corner": "a large fox in the top left corner",
    "Draw me a fox over an owl": "a fox above an owl",
    "fox, lemon, owl on white": "a fox, a lemon and an owl on white",
    "\U0001f98a": "a fox",
    "\U0001f98a\U0001f34b on red": "a fox and a lemon on red",
    "\U0001f34b\U0001f34b\U0001f34b": "three lemons",
    "\u26f5\ufe0f and \u2615": "a sailboat and a hot beverage",
    "a cherry": "cherries",
    "4 fox": "four foxes",
    "kitties on the purple background": "two cat faces on a purple background",
    "an orange cat sitting on a table": "a cat face",
    "a bunny and a fox": "a fox",
    "an astronaut riding a horse": "an astronaut riding a horse",
    "what's in the image": "what is in the picture?",
    "How many cats are there in the picture?": "how many cat faces are there?",
    "are there any bees?": "is there a honeybee?",
    "Where is the kitten": "where is the cat face?",
    "what is the background color?": "what colour is the background?",
    "is the dog left of the cat?": "is the dog face left of the cat face?",
    "a <mask> FOX on red": "a <mask> fox on red",
    "<mask:2> lemons <mask> grey": "<mask:2> lemons <mask> gray",
    "": "",
    "...": "",
}


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return TextTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize("said", SAID)
def test_what_people_type(words, said):
    assert words.normalised(said) == SAID[said]


def test_the_grammar_stays_as_it_is(words):
    scenes, rng = SceneGenerator(PROFILE, seed=77, split="all"), random.Random(1)
    for number in range(150):
        scene = scenes.scene(number)
        captions = list(caption_distribution(scene))
        for text in (*rng.sample(captions, min(5, len(captions))), draw_question(scene, PROFILE, rng)[0]):
            assert words.normalised(text) == text
            assert words.normalised(text.upper()) == text


@pytest.mark.parametrize("name", PROFILE.names)
def test_every_other_name(words, name):
    for other in SYNONYMS[name]:
        assert words.normalised(f"A {other} on red") == words.normalised(f"a {name} on red")
        assert not unknown_words([other], words), other


def test_other_names_are_of_one_object_and_no_name_of_another():
    every = [other for others in SYNONYMS.values() for other in others]
    assert set(SYNONYMS) == set(PROFILE.names)
    assert len(set(every)) == len(every) and not set(every) & set(PROFILE.names)


@pytest.mark.parametrize(
    "said", [" and \U0001f98a", "with lemon .is ", "grapes ? ,, the at the top", ". ,fox left of ?"]
)
def test_what_comes_out_stays_as_it_is(words, said):
    assert words.normalised(once := words.normalised(said)) == once


def test_private_characters_mean_no_object(words):
    for sign in ("\ue000", "\ue400 on red", "a \uf8ff"):
        assert words.normalised(sign) == sign
        assert unknown_words([sign], words) == re.findall("[\ue000-\uf8ff]", sign)


@pytest.mark.parametrize("unit", ["\U0001f98a", "\U0001f98a\U0001f34b", ",", "a ", "a fox, ", "and ", "x-"])
def test_long_texts(words, unit):
    """The patterns have a limit of their own, at which the library ends the process's call with no plain error."""
    assert isinstance(words.normalised((unit * LONGEST_TYPED)[:LONGEST_TYPED]), str)
    long = unit * 10_000
    assert words.normalised(long) == long


def test_text_is_stored_as_it_is(words):
    for text in ("fox", "red apple", "A Fox!"):  # answers, and what decoding gives back
        assert words.decode(words.encode(text)) == text


def test_unknown_words_are_named(words):
    assert unknown_words(["an astronaut and a KITTY \U0001f98a, please draw 2 \U0001f984"], words) == [
        "astronaut",
        "\U0001f984",
    ]


def test_the_shipped_tokenizer_holds_this_normaliser(words, tmp_path):
    made = normaliser(PROFILE.names, default_atlas().characters[: len(PROFILE.names)])
    assert words.known_words is not None and understood_words() < words.known_words
    kept = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
    assert json.loads(made.__getstate__()) == kept
    words.save_pretrained(tmp_path / "copy")
    again = TextTokenizer.from_pretrained(tmp_path / "copy")
    assert all(again.normalised(said) == SAID[said] for said in SAID)


def test_phrasings_say_what_can_be_drawn(words):
    every = phrasings()
    assert len(every) >= 400
    for text, facts in every.items():
        assert facts and all(of.total >= 1 for of in facts), text
        assert all(name in PROFILE.names for of in facts for name, _ in of.counts), text
    read = [any(parse_caption(words.normalised(text)) == of for of in facts) for text, facts in every.items()]
    assert sum(read) > 0.85 * len(read)  # to the letter; other orders of the same objects count as pictures only


def test_the_metric_asks_for_pictures_of_phrasings():
    scenes = SceneGenerator(PROFILE, seed=3)
    said = list(phrasings())[:3]

    class Fake:
        def text_to_image(self, texts, generator, output_type):
            assert texts == said and len(generator) == 3
            return SimpleNamespace(images=render_batch([scenes.scene(0)] * 3, PROFILE))

    found = METRICS["free_phrasing"].measure(Fake(), captions(3, 0, PROFILE))
    assert found["free_phrasing"].value == 0 and found["free_phrasing"].n == 3
