"""`pipe(...)` finds the task or says what is missing, for every family; unknown arguments name the public method."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from all_pipelines import EVERY, make_pipelines
from PIL import Image

from unidiff.decoding import ModalityDecoding, SamplerConfig
from unidiff.families.layout import TaskNeeds
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines import decode
from unidiff.pipelines.latents import decode as latents
from unidiff.tokens.text import MOST_TOKENS, all_have_holes, split_holes


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("calls"))


def test_words_with_holes_are_filled_not_drawn(pipes):
    for family in ("native", "unidisc"):
        result = pipes[family]("a <mask>", generator=1, steps=2)
        assert result.ids.equal(pipes[family].generate("a <mask>", generator=1, steps=2).ids)
    assert "letters" in pipes["llada"]("a <mask>?", max_text_tokens=2).notes[0]
    assert pipes["llada"]("a <mask>", task="infill").notes == []


def test_conversations_with_holes_are_noted_as_questions_are(pipes):
    said = [{"role": "user", "content": "a <mask>?"}]
    for family in ("llada", "dream"):
        assert "letters" in pipes[family].chat(said, max_text_tokens=2).notes[0]


def test_a_negative_prompt_of_muddit_is_read_as_a_prompt_is(pipes):
    pipe, picture = pipes["muddit"], Image.new("RGB", (8, 8))
    calls = [
        lambda **more: pipe.text_to_image("a", steps=1, **more),
        lambda **more: pipe.inpaint(picture, steps=1, **more),
    ]
    for call in calls:
        assert any("\U0001f98a" in note for note in call(negative_prompt="\U0001f98a").notes)
        with pytest.raises(ValueError, match="negative_prompt 'a <mask>' holds"):
            call(negative_prompt="a <mask>")
        with pytest.raises(ValueError, match="changes nothing at guidance_scale 1"):
            call(negative_prompt="b", guidance_scale=1.0)
        assert call(negative_prompt="", guidance_scale=1.0).notes == []


@pytest.mark.parametrize("value", [b"x", [1], np.zeros(3), 5, object()], ids=lambda value: type(value).__name__)
def test_a_wrong_cache_or_task_is_one_sentence_that_lists_all(pipes, value):
    for call in (pipes["native"].text_to_image, pipes["llada"].complete):
        with pytest.raises(ValueError, match=r"cache is .*; expected one of auto, .*none, .* or a CacheConfig"):
            call("a", cache=value)
    for family in ("native", "llada", "lumina"):
        with pytest.raises(ValueError, match=r"task is .*; expected one of"):
            pipes[family]("a", task=value)


@pytest.mark.parametrize("value", [0, -1, 2**70, 1.5, "3", True, 10_001, [1]])
def test_counts_have_the_same_bounds_in_every_message(pipes, value):
    for name in ("steps", "num_candidates", "num_images_per_prompt"):
        with pytest.raises(ValueError, match=f"{name} is .*; expected a whole number from 1 to 10000"):
            pipes["native"].text_to_image("a", **{name: value})
    with pytest.raises(ValueError, match=r"max_text_tokens is .*; expected a whole number from 1 to 9"):
        pipes["native"].generate(max_text_tokens=value)


BAD = [
    ("native", (["a <mask>", "a dog"],), {}, "some prompts have <mask> holes and some have none"),
    ("native", (), {"text": "a <mask>", "max_text_tokens": 3}, "leave one of them out"),
    ("unidisc", (), {"text": "a <mask>", "max_text_tokens": 3}, "leave one of them out"),
    ("native", ("a",), {"task": "nope"}, "task is 'nope'; expected one of"),
    ("native", ("a",), {"task": "captions"}, "did you mean 'caption'"),
    ("native", ("a",), {"task": 5}, "task is 5"),
    ("native", ("a",), {"task": []}, "task is a list"),
    ("native", ("a",), {"task": "caption"}, "it needs ['image']"),
    ("native", (), {"task": "text_to_image"}, "it needs ['prompt']"),
    ("native", ("a",), {"image": Image.new("RGB", (24, 16))}, "no task takes image and prompt together"),
    ("native", ("a <mask>",), {"text": "b"}, "prompt and text both hold words"),
    ("native", (["a <mask>", 3],), {}, "the prompt is an int (number 2 of 2)"),
    ("native", ("a <mask>",), {"task": "text_to_image"}, "holes are not filled there"),
    ("mmada", ("a <mask>",), {"task": "text_to_image"}, "holes are not filled there"),
    ("mmada", ("a",), {"height": 8}, "leave height and width out"),
    ("lumina", ("a",), {"height": 7.5}, "height is 7.5"),
    ("lumina", ("a",), {"height": 10**9}, "height is 1000000000"),
    ("lumina", ("a",), {"task": "edit"}, "task 'edit' was given ['prompt']; it needs ['image', 'prompt']"),
    ("lumina", (), {"task": "edit"}, "task 'edit' was given []; it needs ['image', 'prompt']"),
    ("llada", (), {"task": "chat"}, "task 'chat' was given []; it needs ['prompt']"),
    ("llada", ("a",), {"max_text_tokens": 10**6}, "max_text_tokens is 1000000"),
    ("dream", ("<mask:4096>" * 2,), {"task": "infill"}, "hides 8192 tokens in all"),
]


@pytest.mark.parametrize("family, words, more, sentence", BAD, ids=[f"{b[0]}: {b[3]}" for b in BAD])
def test_one_sentence_for_a_call_that_cannot_be(pipes, family, words, more, sentence):
    with pytest.raises(ValueError) as caught:
        pipes[family](*words, **more)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "family, task, wrong, near",
    [
        ("native", "text_to_image", "guidance", "guidance_scale"),
        ("native", "caption", "max_tokens", "max_text_tokens"),
        ("native", "inpaint", "mask", "mask_image"),
        ("native", "generate", "seeds", "generator"),
        ("native", "caption", "max_denoising_steps", "steps"),
        ("unidisc", "text_to_image", "num_images", "num_images_per_prompt"),
        ("lumina", "edit", "promt", "prompt"),
        ("llada", "chat", "max_text_token", "max_text_tokens"),
        ("muddit", "text_to_image", "temprature", "temperature"),
    ],
)
def test_unknown_arguments_name_the_method_and_the_nearest_name(pipes, family, task, wrong, near):
    with pytest.raises(TypeError) as caught:
        getattr(pipes[family], task)(**{wrong: 3})
    kind = type(pipes[family]).__name__
    assert str(caught.value) == f"{kind}.{task}() has no argument {wrong!r}; did you mean {near!r}?"


@pytest.mark.parametrize(
    ("family", "task", "wrong", "near"),
    [
        ("native", "text_to_image", "text", "prompt"),
        ("native", "inpaint", "mask", "mask_image"),
        ("muddit", "inpaint", "mask", "mask_image"),
        ("llada", "chat", "prompt", "messages"),
    ],
)
def test_names_of_other_tasks_are_understood(pipes, family, task, wrong, near):
    with pytest.raises(TypeError, match=f"has no argument '{wrong}'; did you mean '{near}'"):
        getattr(pipes[family], task)(**{wrong: "a"})


def test_loading_names_the_nearest_argument():
    for wrong, near in (("dtyp", "dtype"), ("revison", "revision"), ("torch_type", "torch_dtype")):
        with pytest.raises(TypeError, match=rf"UniDiffPipeline.from_pretrained\(\) has no .*; did you mean '{near}'"):
            UniDiffPipeline.from_pretrained("emoji", **{wrong: "float32"})
    with pytest.raises(ValueError, match=r"dtype is float32 and torch_dtype bfloat16, .* give one of them"):
        UniDiffPipeline.from_pretrained("emoji", "float32", "bfloat16")
    with pytest.raises(FileNotFoundError, match="model folder '' does not exist"):
        UniDiffPipeline.from_pretrained("")


def test_pipelines_and_vocabularies_can_be_copied(pipes):
    pipe = pipes["native"]
    again = copy.deepcopy(pipe)
    assert pickle.loads(pickle.dumps(pipe.settings)) == pipe.settings == again.settings
    assert again.text_to_image("a dog", generator=1).ids.equal(pipe.text_to_image("a dog", generator=1).ids)


PICTURES = {"native": (24, 16), "muddit": (8, 8), "ddit": (8, 8)}
CALLS = {  # of each task that writes words
    "caption": lambda pipe, picture, **more: pipe.caption(picture, 3, **more),
    "answer": lambda pipe, picture, **more: pipe.answer(picture, "a", 3, **more),
    "inpaint": lambda pipe, picture, **more: pipe.inpaint(picture, None, "a <mask>", **more),
    "generate": lambda pipe, picture, **more: (
        pipe.generate(prompt="a", max_text_tokens=3, **more)
        if pipe.layout.words_beside
        else pipe.generate("a <mask>", **more)
    ),
    "edit": lambda pipe, picture, **more: pipe.edit(
        picture, "a", max_text_tokens=3 if "edit" in pipe.layout.words_beside else None, **more
    ),
    "chat": lambda pipe, picture, **more: pipe.chat("a", 3, **more),
    "complete": lambda pipe, picture, **more: pipe.complete("a", 3, **more),
    "infill": lambda pipe, picture, **more: pipe.infill("a <mask>", **more),
}


@pytest.mark.parametrize("family", EVERY)
def test_a_callers_sampler_keeps_what_each_task_needs(pipes, family, monkeypatch):
    """Forbidden ids, ends, fill and stopping come after the caller's settings."""
    pipe, asked, needed = pipes[family], [], []
    make, keep = decode.Sampler, TaskNeeds.keep_in

    def watched(model, ids, config, *rest, **more):
        asked.append(config)
        return make(model, ids, config, *rest, **more)

    for path in (decode, latents):
        monkeypatch.setattr(path, "Sampler", watched)
    monkeypatch.setattr(TaskNeeds, "keep_in", lambda self, config: needed.append(self) or keep(self, config))
    few = ModalityDecoding(steps=2, forbid=(3,))
    own = SamplerConfig(few, ModalityDecoding(steps=2), ends=(4,), stop_at_eos=False)
    for task in set(CALLS) & set(pipe.layout.tasks):
        picture = Image.new("RGB", PICTURES.get(family, (6, 6)))
        result = CALLS[task](pipe, picture, sampler=own, generator=1)
        config, needs = asked[-1], needed[-1]
        assert {3, *needs.forbid} == set(config.text.forbid) and {4, *needs.ends} == set(config.ends), task
        assert config.stop_at_eos == needs.stop_at_eos and config.fill == needs.fill, task
        assert not set(needs.forbid) & set(result.text_ids[0]), task


def test_an_argument_far_from_all_lists_them(pipes):
    with pytest.raises(
        TypeError, match=r"has no argument 'xyzzy'; it has prompt, num_images_per_prompt, negative_prompt"
    ):
        pipes["native"].text_to_image("a", xyzzy=1)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a <mask> b", ["a", 1, " b"]),
        ("<mask:3>", [3]),
        ("a<mask:2><mask>", ["a", 2, 1]),
        ("a  <mask: 4 >.", ["a ", 4, "."]),
        ("no holes", ["no holes"]),
        (f"<mask:{MOST_TOKENS}>", [MOST_TOKENS]),
    ],
)
def test_holes(text, parts):
    assert split_holes(text) == parts


MALFORMED = (
    *(
        "<mask:x>",
        "<mask:0>",
        "<mask:-1>",
        "<mask:1.5>",
        "<mask:>",
        "<mask red",
        "<mask",
        "<MASK>",
        "< mask>",
        "</mask>",
    ),
    *(
        "[MASK]",
        "<masked>",
        "<mask/>",
        "<mask::2>",
        "<mask:\u00b2>",
        "<mask:\u0663>",
        f"<mask:{MOST_TOKENS + 1}>",
        "<mask:2 2>",
    ),
)


@pytest.mark.parametrize(
    "text",
    MALFORMED,
)
@pytest.mark.parametrize("family, task", [("native", "generate"), ("unidisc", "generate"), ("llada", "infill")])
def test_malformed_holes_have_one_sentence_everywhere(pipes, text, family, task):
    with pytest.raises(ValueError, match="write <mask> or <mask:n>"):
        getattr(pipes[family], task)(f"a {text} b <mask>")


def test_texts_with_and_without_holes_do_not_mix():
    assert all_have_holes(["a <mask>", "<mask>"]) and not all_have_holes(["a", "b"])
    with pytest.raises(ValueError, match="run them apart"):
        all_have_holes(["a", "<mask>"])


def test_results_are_written_where_and_as_asked(pipes, tmp_path):
    result = pipes["native"].text_to_image("a dog", record_trajectory=True)
    for call, sentence in (
        (lambda: result.save_gif(5), "the file to write is a int"),
        (lambda: result.save_gif(tmp_path / "x.png"), "does not end in .gif"),
        (lambda: result.save_gif(tmp_path / "x.gif", 2.5), "milliseconds is 2.5"),
        (lambda: result.save_filmstrip(tmp_path / "x.png", 10**9), "count is 1000000000"),
        (lambda: result.save_filmstrip(None), "the file to write is a NoneType"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())
