"""Forms: which tabs a model has, what a filled-in form means, and what is refused."""

from __future__ import annotations

import pytest
from all_pipelines import FAMILIES, make_pipelines
from PIL import Image
from studio_cases import events

from unidiff.studio.session import Form, Studio
from unidiff.studio.snippets import png
from unidiff.studio.tasks import BY_NAME, PRESETS, Dial, about_model, call_arguments, tasks_of
from unidiff.studio.uploads import Sent


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("families"))


def test_a_model_has_the_tabs_that_its_family_can_do(pipelines):
    tabs = {family: [task.name for task in tasks_of(pipe)] for family, pipe in pipelines.items()}
    assert tabs["native"] == ["text_to_image", "caption", "answer", "inpaint", "generate"]
    assert tabs["llada"] == tabs["dream"] == ["chat", "complete", "infill"]
    assert tabs["mdlm"] == ["complete", "infill"]
    assert "edit" in tabs["lumina"] and all(set(names) <= set(pipelines[f].layout.tasks) for f, names in tabs.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tab_of_every_family_gives_a_result(pipelines, family):
    pipe = pipelines[family]
    studio = Studio(pipe, family)
    picture = b"" if pipe.images is None and not pipe.layout.reads_pixels else png(Image.new("RGB", (40, 40), "red"))
    layer = Image.new("RGBA", (40, 40))
    layer.paste("white", (0, 0, 20, 40))
    for task in studio.tasks:
        words = "a <mask:2> fox" if task.name == "infill" else "a fox"
        painted = (png(layer),) if task.mask else ()
        form = Form(words, Sent(picture, painted) if task.picture else Sent(), longest=4 if task.writes else 0, steps=2)
        last = events(studio, task.name, form)[-1]
        assert last.record is not None, (task.name, last.status)
        assert (
            last.number == last.last
            and last.last >= 1
            and "ud-chip" in last.stage + "ud-chip" * (pipe.images is not None)
        )
        first = studio.show("ann", 0)
        assert 'data-pass="0"' in first.stage and "nothing computed yet" in first.stage
    studio.worker.close()


def test_the_dial(pipelines):
    pipe = pipelines["native"]
    assert Dial().options(pipe, "text_to_image") == {}
    told = Dial(6, 0.5, "auto", 2).options(pipe, "text_to_image")
    assert told == {"steps": 6, "threshold": 0.5, "cache": "auto", "num_candidates": 2}
    assert Dial(candidates=3).options(pipelines["llada"], "chat") == {}
    for preset in PRESETS.values():
        Dial(*preset)
    for bad, words in (
        ({"steps": -1}, "steps is -1; expected a whole number from 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"candidates": 99}, "candidates is 99"),
        ({"cache": "/etc/passwd"}, "cache is '/etc/passwd'; expected one of auto"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": "x"}, "threshold is 'x'"),
    ):
        with pytest.raises(ValueError, match=words):
            Dial(**bad)


def test_a_form_that_lacks_something_says_what(pipelines):
    pipe = pipelines["native"]
    picture = Image.new("RGB", (24, 16))
    for task, told, words in (
        ("text_to_image", {"words": "  "}, "Prompt is empty"),
        ("text_to_image", {"words": "x" * 5000}, "5000 characters; expected at most 4000"),
        ("text_to_image", {"words": ["a"]}, "expected a text"),
        ("text_to_image", {"words": "a fox", "seed": -3}, "the seed is -3"),
        ("text_to_image", {"words": "a fox", "seed": None}, "the seed is None"),
        ("caption", {}, "there is no picture yet"),
        ("answer", {"picture": picture}, "Question is empty"),
        ("inpaint", {"picture": picture}, "nothing is left open; paint over a part"),
    ):
        with pytest.raises(ValueError, match=words):
            call_arguments(pipe, BY_NAME[task], **told)
    assert call_arguments(pipe, BY_NAME["generate"], "", seed=4) == {"generator": 4}
    chat = call_arguments(
        pipelines["llada"], BY_NAME["chat"], "and?", longest=8, said=[{"role": "user", "content": "a"}]
    )
    assert [turn["content"] for turn in chat["messages"]] == ["a", "and?"] and chat["max_text_tokens"] == 8
    with pytest.raises(ValueError, match="the longest text is 100000"):
        call_arguments(pipelines["llada"], BY_NAME["chat"], "and?", longest=100_000)


def test_a_model_is_described_in_a_line(pipelines):
    assert "24 x 16 pixels" in about_model(pipelines["native"], "mine")
    assert (
        "pixels" not in about_model(pipelines["llada"], "mine")
        and "llada" in about_model(pipelines["llada"], "x").lower()
    )
