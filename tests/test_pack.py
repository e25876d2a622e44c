"""`unidiff pack`: the geometry and the tasks are those of training; flags only fill in what nobody noted."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from folder_trees import tree
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_pipeline import GRID, TEXT_LENGTH, tiny_parts, tiny_pipeline

from unidiff.models.trained_on import TASKS as TRAINING_TASKS
from unidiff.models.trained_on import TrainedOn, read_trained_on
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.decode import UntrainedTask
from unidiff.pipelines.pack import pack_pipeline, settings_after, tasks_taught
from unidiff.pipelines.settings import TASKS, PipelineSettings

SIZE = (GRID[0] * 8, GRID[1] * 8)
TRAINED = TrainedOn(GRID, TEXT_LENGTH, ("generate", "answer"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Path]:
    """Folders of a transformer as a run exports it, an image tokenizer and a text tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    transformer, image, text, made = tiny_parts()
    for part, name in ((transformer, "t"), (image, "i"), (text, "x")):
        part.save_pretrained(folder / name)
    TRAINED.save(folder / "t")
    (folder / "t" / "vocabulary.json").write_text(json.dumps(made.vocabulary.to_dict()))
    transformer.save_pretrained(folder / "bare")
    return [folder / "t", folder / "i", folder / "x"]


@pytest.fixture
def bare(parts) -> list[Path]:
    """The same from somewhere else: nobody noted what its rows were."""
    return [parts[0].parent / "bare", *parts[1:]]


def test_the_run_knows_its_rows(parts, tmp_path):
    pack_pipeline(*parts, tmp_path / "out")
    pipe = UniDiffPipeline.from_pretrained(tmp_path / "out")
    assert pipe.settings.text_length == TEXT_LENGTH and pipe.settings.grid == GRID and pipe.image_size == SIZE
    assert pipe.settings.tasks == TASKS
    pack_pipeline(*parts, tmp_path / "again", text_length=TEXT_LENGTH, image_size=SIZE)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.none() | st.integers(1, 10**30),
    size=st.none() | st.tuples(st.integers(1, 20).map(lambda n: 8 * n), st.integers(1, 20).map(lambda n: 8 * n)),
)
def test_a_contradiction_is_refused(parts, tmp_path, length, size):
    assume(length not in (None, TEXT_LENGTH) or size not in (None, SIZE))
    with pytest.raises(ValueError) as caught:
        pack_pipeline(*parts, tmp_path / "out", text_length=length, image_size=size)
    said = str(caught.value)
    assert "\n" not in said and ("text_length" in said or "image size" in said) and not (tmp_path / "out").exists()


def test_what_nobody_noted_has_to_be_said(bare, tmp_path):
    for given_values, words in (
        ({}, "give text_length and image_size as in training"),
        ({"text_length": 10}, "give image_size"),
        ({"image_size": SIZE}, "give text_length"),
    ):
        with pytest.raises(ValueError, match=words):
            pack_pipeline(*bare, tmp_path / "out", **given_values)
    assert pack_pipeline(*bare, tmp_path / "out", text_length=10, image_size=SIZE).settings.tasks is None


WRONG = [
    {"text_length": value} for value in (0, -1, 2, 2**63, 10**30, 1.5, float("nan"), True, "10", [10], 2**21)
] + [
    {"image_size": value}
    for value in ((20, 24), (0, 8), (-8, 8), (8,), (8, 8, 8), 64, "64", (8.0, 8), (float("nan"), 8), (2**40, 8), (True, 8))
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_values_that_are_none_are_refused(bare, tmp_path, wrong):
    with pytest.raises(ValueError) as caught:
        pack_pipeline(*bare, tmp_path / "out", **{"text_length": 10, "image_size": SIZE, **wrong})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trained_on.json", "[]"),
        ("trained_on.json", "{"),
        ("trained_on.json", '{"grid": [2, 3], "text_length": 10}'),
        ("trained_on.json", '{"grid": [2, 3.5], "text_length": 10, "tasks": []}'),
        ("trained_on.json", '{"grid": [2, 0], "text_length": 10, "tasks": []}'),
        ("trained_on.json", '{"grid": [2, 3], "text_length": 1e3, "tasks": []}'),
        ("trained_on.json", '{"grid": [2, 3], "text_length": 10, "tasks": ["paint"]}'),
        ("trained_on.json", '{"grid": [2, 3], "text_length": 10, "tasks": "generate"}'),
        ("trained_on.json", '{"grid": [2, 3], "text_length": 10, "tasks": [], "more": 1}'),
        ("vocabulary.json", "[]"),
        ("vocabulary.json", "{}"),
        ("vocabulary.json", '{"size": "big"}'),
    ],
)
def test_damaged_notes_are_named(parts, tmp_path, name, text):
    whole = (parts[0] / name).read_text()
    try:
        (parts[0] / name).write_text(text)
        with pytest.raises(ValueError, match=name) as caught:
            pack_pipeline(*parts, tmp_path / "out")
        assert "\n" not in str(caught.value)
    finally:
        (parts[0] / name).write_text(whole)


def test_tokenizers_that_did_not_encode_the_data_are_refused(parts, tmp_path):
    from unidiff.tokens.image.vq import CellVQModel
    from unidiff.tokens.text import TextTokenizer

    CellVQModel(8, 8, 4, 16, 1, (16,), (1,)).save_pretrained(tmp_path / "i")
    TextTokenizer.train(["other words"], 300).save_pretrained(tmp_path / "x")
    TextTokenizer.train(["a b"], 300, specials=("eos",)).save_pretrained(tmp_path / "bare")
    for others, words in (
        ((tmp_path / "i", parts[2]), "8 image codes, but .* was trained with 16"),
        ((parts[1], tmp_path / "x"), "text ids, but .* was trained with"),
        ((parts[1], tmp_path / "bare"), "no special token 'caption'"),
    ):
        with pytest.raises(ValueError, match=words):
            pack_pipeline(parts[0], *others, tmp_path / "out")
    note = parts[0] / "vocabulary.json"
    whole = note.read_text()
    try:
        changed = json.loads(whole)
        changed["specials"] |= {"eos": 3, "answer": 0}
        note.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="as id of 'eos', but"):
            pack_pipeline(*parts, tmp_path / "out")
    finally:
        note.write_text(whole)
    assert not (tmp_path / "out").exists()


def test_tasks_follow_from_training():
    for training, expected in {
        (): (),
        ("generate",): ("text_to_image", "caption", "inpaint", "generate"),
        ("text_to_image",): ("text_to_image", "inpaint"),
        ("caption",): ("caption",),
        ("answer",): ("answer",),
        ("text",): (),
        ("text_to_image", "text"): ("text_to_image", "inpaint", "generate"),
        TRAINING_TASKS: TASKS,
    }.items():
        assert tasks_taught(training) == expected


def test_an_untrained_task_says_so_once(tmp_path):
    pipe = tiny_pipeline()
    pipe = UniDiffPipeline.from_pipe(
        pipe, settings=PipelineSettings.from_dict({**pipe.settings.to_dict(), "tasks": ["caption"]})
    )
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UntrainedTask, match="not trained for text_to_image, .* it was trained for caption") as caught:
        result = pipe.text_to_image("a dog", steps=1, generator=0)
    assert len([w for w in caught if w.category is UntrainedTask]) == 1
    assert any("not trained for text_to_image" in note for note in result.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedTask)
        assert not any("not trained" in note for note in tiny_pipeline().text_to_image("a dog", steps=1).notes)


def test_tasks_are_kept_in_the_folder_and_absent_ones_mean_all(tmp_path):
    pipe = tiny_pipeline()
    assert pipe.settings.tasks is None and pipe.settings.trained == TASKS and "tasks" not in pipe.settings.to_dict()
    some = PipelineSettings.from_dict({**pipe.settings.to_dict(), "tasks": ["answer", "caption"]})
    UniDiffPipeline.from_pipe(pipe, settings=some).save_pretrained(tmp_path / "m")
    assert UniDiffPipeline.from_pretrained(tmp_path / "m").settings.trained == ("caption", "answer")
    for wrong in (["paint"], "caption", [1], {"caption": 1}, 3, [None]):
        with pytest.raises(ValueError, match="tasks"):
            PipelineSettings.from_dict({**pipe.settings.to_dict(), "tasks": wrong})


def test_a_pipeline_after_further_training_has_the_rows_of_that(tmp_path):
    base = tiny_pipeline().settings
    TrainedOn((4, 4), 32, ("answer",)).save(tmp_path)
    changed = settings_after(base, tmp_path)
    assert (changed.grid, changed.text_length, changed.tasks) == ((4, 4), 32, None)  # the base could do all already
    some = PipelineSettings.from_dict({**base.to_dict(), "tasks": ["text_to_image"]})
    assert settings_after(some, tmp_path).trained == ("text_to_image", "answer")
    assert settings_after(base, tmp_path / "none") == base


def test_a_record_with_former_names_of_tasks_is_read(tmp_path):
    (tmp_path / "trained_on.json").write_text(
        '{"grid": [2, 2], "text_length": 8, "tasks": ["joint", "t2i", "caption", "vqa"]}'
    )
    assert read_trained_on(tmp_path) == TrainedOn((2, 2), 8, ("generate", "text_to_image", "caption", "answer"))


def test_what_a_start_knew_counts_too(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    TrainedOn((2, 2), 8, ("text_to_image",)).save(tmp_path / "a")
    TrainedOn((4, 4), 16, ("answer",)).save(tmp_path / "b", started_from=tmp_path / "a")
    assert read_trained_on(tmp_path / "b") == TrainedOn((4, 4), 16, ("text_to_image", "answer"))
    assert read_trained_on(tmp_path) is None
    TrainedOn((4, 4), 16, ("answer",)).save(tmp_path / "b", started_from=tmp_path / "nowhere")
    assert read_trained_on(tmp_path / "b") == TrainedOn((4, 4), 16, ("answer",))


def test_other_folders_are_refused_before_anything_is_read(parts, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("mine")
    for out in (tmp_path / "photos", parts[0], parts[1], parts[2], tmp_path / "photos" / "a.png"):
        before = tree(out) if out.is_dir() else out.read_bytes()
        with pytest.raises(ValueError, match=r"would be lost|is a file"):
            pack_pipeline("none", "none", "none", out)
        assert (tree(out) if out.is_dir() else out.read_bytes()) == before
    with pytest.raises(FileNotFoundError):
        pack_pipeline("none", "none", "none", tmp_path / "out")


def test_a_pipeline_can_be_packed_from_its_own_parts(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "p")
    inside = [tmp_path / "p" / name for name in ("transformer", "image_tokenizer", "text_tokenizer")]
    pack_pipeline(*inside, tmp_path / "p", text_length=TEXT_LENGTH, image_size=SIZE)
    assert UniDiffPipeline.from_pretrained(tmp_path / "p").settings == pipe.settings


def test_parts_of_a_pipeline_keep_its_rows_and_tasks(parts, tmp_path):
    transformer = parts[0]
    TrainedOn(GRID, TEXT_LENGTH, ("caption",)).save(transformer)
    try:
        pack_pipeline(*parts, tmp_path / "made")
    finally:
        TRAINED.save(transformer)
    inside = [tmp_path / "made" / name for name in ("transformer", "image_tokenizer", "text_tokenizer")]
    pack_pipeline(*inside, tmp_path / "again")
    assert UniDiffPipeline.from_pretrained(tmp_path / "again").settings.tasks == ("caption",)
    with pytest.raises(ValueError, match="was trained on"):
        pack_pipeline(*inside, tmp_path / "wide", image_size=(SIZE[0], 2 * SIZE[1]))
    assert not (tmp_path / "wide").exists()


def test_the_folder_above_a_transformer_is_no_transformer(parts, tmp_path):
    pack_pipeline(*parts, tmp_path / "made")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; did you mean '.*made/transformer'\?"):
        pack_pipeline(tmp_path / "made", *parts[1:], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="name a folder with a saved MaskedTransformer"):
        pack_pipeline(tmp_path / "gone", *parts[1:], tmp_path / "out")
