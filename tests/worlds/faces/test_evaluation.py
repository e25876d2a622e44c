"""The evaluation of faces: a perfect model gets everything, a confused one does not, and an untrained pipeline goes through it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens.text import TextTokenizer
from unidiff.world import WORLDS
from unidiff.worlds.asked import Drawn
from unidiff.worlds.faces.cases import (
    FaceHole,
    case_faces,
    held_out_cases,
    hole,
    hole_cases,
    holes,
    prompt_cases,
    question_cases,
    wrong_captions,
)
from unidiff.worlds.faces.cells import face_tokenizer
from unidiff.worlds.faces.evaluation import reader_reward, run_faces_eval
from unidiff.worlds.faces.judge import TASKS, FacesEval
from unidiff.worlds.faces.language import QUESTION_KINDS, draw_caption, facts_hold, parse_caption
from unidiff.worlds.faces.reader import read_faces
from unidiff.worlds.faces.scenes import FaceGenerator, render_batch
from unidiff.worlds.faces.table import FaceScenes
from unidiff.worlds.scene_rows import corpus, scene_vocabulary

SEED, N = 4, 24


class PerfectModel:
    """Knows the cases: draws a face that has what the prompt says, and says what is there."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def reconstruct(self, images: Tensor) -> Tensor:
        return images

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        held_out = {case.prompt for case in held_out_cases(N, SEED)}
        task, split = ("held out", "held_out") if set(prompts) == held_out else ("prompt", "train")
        return render_batch(case_faces(task, len(prompts), SEED, split)).roll(self.shift, 0)

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        faces = [reading.nearest for reading in read_faces(images.roll(self.shift, 0))]
        return [draw_caption(face, random.Random(i)) for i, face in enumerate(faces)]

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        answers = [case.answer for case in question_cases(len(questions), SEED)]
        return [*answers[self.shift :], *answers[: self.shift]]

    def inpaint(self, images: Tensor, masks: Tensor, cases: Sequence[FaceHole], seeds: Sequence[int]) -> Drawn:
        return Drawn(images.roll(self.shift, 0), [case.caption for case in cases], [not self.shift] * len(cases))

    def generate(self, seeds: Sequence[int]) -> Drawn:
        pictures = render_batch(case_faces("joint", len(seeds), SEED))
        return Drawn(pictures, self.caption(pictures, seeds), [True] * len(seeds))


def judged(shift: int) -> dict[str, float]:
    return FacesEval(PerfectModel(shift), SEED, N).run(TASKS).values


def test_a_perfect_model_gets_everything_and_a_shuffled_one_does_not():
    best, worst = judged(0), judged(1)
    headlines = ("text_to_image", "held_out_pairs", "caption_exact", "answer_accuracy", "inpainting", "joint_agreement")
    assert all(best[key] == 1 for key in (*headlines, "all_attributes", "whole_pictures", "joint_distinct"))
    assert best["reader_true"] == best["reconstruction_exact"] == best["joint_entropy"] == 1
    assert all(worst[key] < 0.5 for key in headlines)
    attributes = [key for key in best if key.startswith("attributes.")]
    assert len(attributes) == 12 and all(best[key] == 1 for key in attributes)
    assert worst["holes.hat"] == 0 and worst["inpainting_untouched"] == 0


def test_cases_are_fixed_by_the_seed_and_say_what_is_true():
    assert prompt_cases(5, 1) == prompt_cases(5, 1) != prompt_cases(5, 2)
    for case, face in zip(held_out_cases(24, 1), case_faces("held out", 24, 1, "held_out"), strict=True):
        assert face.shows(case.pair) and facts_hold(case.facts, face)
        assert case.facts[case.pair[0]] == case.pair[1] and case.facts[case.pair[2]] == case.pair[3]
    cases = question_cases(3 * len(QUESTION_KINDS), 1)
    yes = [case.answer for case in cases if case.kind == "hat there"]
    assert yes == ["yes", "no", "yes"]


def test_holes_hide_the_cells_and_the_words_of_one_facet():
    words = TextTokenizer.train(corpus(FaceScenes(FaceGenerator(0)), 300), 700)
    for case in hole_cases(28, 3):
        assert case.before + case.name + case.after == case.caption
        start, _, rest = case.template(words.encode).partition("<mask:")
        count, _, end = rest.partition(">")
        assert start == case.before and end == case.after and int(count) >= 1
        there = hole(case.facet)
        assert there.any() and not there.all()
        bare = case.face.altered(hat="none", glasses="none", beard="none")
        changed = (render_batch([bare]) - render_batch([case.face]))[0].abs().amax(0) > 0
        allowed = hole("hat") | hole("glasses") | hole("beard")
        assert not (changed & ~allowed).any()
    assert holes(hole_cases(3, 3)).shape == (3, 64, 64)


def test_wrong_captions_do_not_hold():
    for i, face in enumerate(case_faces("wrong", 30, 0)):
        caption = draw_caption(face, random.Random(i))
        wrong = wrong_captions(caption, face, 6, random.Random(i))
        assert len(set(wrong)) == 6 and caption not in wrong
        assert all(parse_caption(text) is not None and not facts_hold(parse_caption(text), face) for text in wrong)


@pytest.fixture(scope="module")
def pipe() -> UniDiffPipeline:
    torch.manual_seed(0)
    words = TextTokenizer.train(corpus(FaceScenes(FaceGenerator(0)), 300), 700)
    image = face_tokenizer()
    vocabulary = scene_vocabulary(words, image.codebook_size)
    model = MaskedTransformer(vocab_size=vocabulary.size, hidden_size=32, num_layers=1, num_heads=2)
    return UniDiffPipeline(model, image, words.tokenizer, PipelineSettings(vocabulary, text_length=40, grid=(8, 8)))


def test_an_untrained_pipeline_goes_through_all_tasks(pipe: UniDiffPipeline):
    report = run_faces_eval(pipe, seed=1, n=3, batch_size=3, steps=1)
    assert report.values["reader_true"] == report.values["reconstruction_exact"] == 1
    assert report.values["inpainting_untouched"] == 1 and report.values["caption_exact"] == 0
    assert report.values["caption_nelbo"] > report.values["caption_entropy"] > 0
    assert report.measures["text_to_image"].headline and report.about["yardstick"]
    with pytest.raises(ValueError, match="unknown task 'drawing'; expected some of reader, text_to_image"):
        run_faces_eval(pipe, tasks=["drawing"])


def test_the_world_has_what_the_commands_ask_for(pipe: UniDiffPipeline, tmp_path: Path):
    world = WORLDS["faces"]
    assert all(parse_caption(prompt) is not None for prompt in world.prompts())
    tasks = {example.task for example in world.examples(pipe)}
    assert tasks == {"text_to_image", "caption", "answer", "inpaint", "generate"}
    reward, prompts = reader_reward(pipe, 3)
    faces = [FaceGenerator(3).face(i) for i in range(3)]
    said = [prompts(i) for i in range(3)]
    assert reward(said, render_batch(faces)).tolist() == [1, 1, 1]
    assert reward([*said[1:], said[0]], render_batch(faces)).sum() < 3
    cells, flat = world.cells("cpu", 8)
    assert cells.shape[1:] == (6, 3, 8, 8) and flat.shape == (6, 3, 8, 8)
    assert cells.shape[0] + 6 == face_tokenizer().codebook_size
    with pytest.raises(ValueError, match="factor is 4"):
        world.cells("cpu", 4)
    tasks = world.benchmark()
    assert set(tasks.usual) < set(tasks.quality)
    decoded: list[int] = []
    for task in tasks.quality:
        tasks.decode(pipe, task, 2, 0, 2, lambda out: decoded.append(len(out.texts)), steps=1)
    assert decoded == [2] * len(tasks.quality)


def test_the_demo_of_a_model_of_another_size_is_refused():
    class Wide:
        image_size = (128, 128)

    with pytest.raises(ValueError, match="faces are 64x64 pictures, this model makes 128x128"):
        WORLDS["faces"].demo(Wide(), "out", 0)
