"""The whole evaluation on a small untrained pipeline: it runs, fills every key, and given tokens stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from emoji_fakes import tiny_emoji_pipeline

from unidiff.evaluation.paired import compare_reports
from unidiff.evaluation.report import EvaluationReport
from unidiff.families.layout import hidden_words
from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.asked import PipelineModel
from unidiff.worlds.emoji.cases import inpaint_cases, prompt_cases
from unidiff.worlds.emoji.evaluation import profile_of, run_emoji_eval
from unidiff.worlds.emoji.scenes import get_profile, render_batch

CPU = get_profile("cpu")
KEYS = [
    "reconstruction_psnr",
    "sprite_psnr",
    "oracle_true",
    "oracle_reconstruction",
    "text_to_image",
    "categories",
    "held_out_composition",
    "caption_exact",
    "answer_accuracy",
    "inpainting",
    "joint_agreement",
    "joint_distinct",
    "joint_nelbo",
    "caption_nelbo",
    "caption_entropy",
    "seconds",
    "joint_nelbo_text",
    "joint_nelbo_image",
    "joint_nelbo_words",
    "caption_nelbo_words",
    "answer_baseline",
    "shuffled_composition",
    "readers",
]


@pytest.fixture(scope="module")
def pipe() -> UniDiffPipeline:
    return tiny_emoji_pipeline()


@pytest.fixture(scope="module")
def report(pipe: UniDiffPipeline) -> EvaluationReport:
    return run_emoji_eval(pipe, seed=1, n=4, batch_size=3, steps=2, profile=get_profile("cpu", num_objects=12))


def test_report_has_all_keys(report: EvaluationReport) -> None:
    data = report.to_dict()
    assert not [key for key in KEYS if key not in data]
    assert len(data["categories"]) == 6 and len(data["captions"]) == 4
    assert data["about"]["seed"] == 1 and data["about"]["n"] == 4 and data["about"]["parameters"] > 0
    json.dumps(data)


def test_an_untrained_model_scores_nothing_but_keeps_given_tokens(report: EvaluationReport) -> None:
    assert report.values["oracle_true"] == 1.0
    assert report.values["text_to_image"] <= 0.2 and report.values["inpainting"] == 0.0
    assert report.values["inpainting_untouched"] == 1.0
    assert report.values["caption_gap"] > 10
    assert report.values["joint_nelbo"] > report.values["caption_nelbo"] > report.values["caption_entropy"]


def test_results_do_not_depend_on_the_batch(pipe: UniDiffPipeline) -> None:
    prompts = [c.prompt for c in prompt_cases("composition", 3, 0, CPU)]
    one, many = (PipelineModel(pipe, size, steps=3).text_to_image(prompts, [5, 6, 7]) for size in (1, 3))
    assert torch.allclose(one, many, atol=1.01 / 255)  # pictures have 256 steps


def test_holes_have_room_for_the_name_exactly(pipe: UniDiffPipeline) -> None:
    for case in inpaint_cases(40, 3, CPU):
        template = case.template(pipe.texts.encode)
        ids = hidden_words(template, pipe.texts.encode)
        full = pipe.texts.encode(case.caption)
        assert len(ids) == len(full) and all(a in (b, None) for a, b in zip(ids, full, strict=True))
        hidden = [b for a, b in zip(ids, full, strict=True) if a is None]
        assert pipe.texts.decode(hidden).strip() == case.name


def test_a_touched_token_is_noticed(pipe: UniDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = inpaint_cases(2, 0, CPU)
    pictures = render_batch([c.scene for c in cases], CPU)
    masks = torch.stack([CPU.boxes([c.hole]) for c in cases])
    assert PipelineModel(pipe, steps=2).inpaint(pictures, masks, cases, [1, 2]).untouched == [True, True]
    inpaint = pipe.inpaint

    def careless(*args, **kwargs):
        out = inpaint(*args, **kwargs)
        outside = next((r, c) for r in range(8) for c in range(8) if not masks[0, 8 * r, 8 * c])
        out.codes[0, outside[0], outside[1]] += 1
        return out

    monkeypatch.setattr(pipe, "inpaint", careless)
    assert PipelineModel(pipe, steps=2).inpaint(pictures, masks, cases, [1, 2]).untouched == [False, True]


def test_progress_is_told_and_the_bar_is_given_back(pipe: UniDiffPipeline, tmp_path: Path) -> None:
    said: list[tuple[int, int | None, str]] = []
    pipe.set_progress_bar_config(desc="mine")
    tasks = ("text_to_image", "caption", "answer", "inpaint", "generate", "likelihood", "retrieval")
    report = run_emoji_eval(pipe, n=1, tasks=tasks, steps=1, tick=lambda more, total=None, what="": said.append((more, total, what)))  # fmt: skip
    assert [what for *_, what in said if what][-3:] == ["joint generation", "likelihood", "retrieval"]
    totals = {total for _, total, _ in said if total is not None}
    assert len(totals) == 1 and sum(more for more, *_ in said) == totals.pop()  # so the time left is right
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert "oracle_true" not in report.values and "joint_agreement" in report.values
    report.save(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["joint_agreement"] == 0.0


def test_cases_per_task_are_spread_over_the_categories(pipe: UniDiffPipeline) -> None:
    tasks = ("text_to_image", "caption", "answer")
    report = run_emoji_eval(pipe, per_task=9, tasks=tasks, steps=1)
    counts = {key: e.n for key, e in report.intervals.items()}
    assert counts["categories.counting"] == counts["held_out_composition"] == 2  # 7 categories
    assert counts["captions.pair"] == 3 and counts["caption_exact"] == 12
    assert counts["answer_accuracy"] == 9
    assert report.about["per_task"] == 9 and report.about["n"] is None
    whole = run_emoji_eval(pipe, n=2, tasks=tasks[:1], steps=1)
    with pytest.raises(ValueError, match="differ in n "):
        compare_reports(report, whole)


def test_metrics_alone_are_of_a_seed_too(pipe: UniDiffPipeline) -> None:
    one, other = (run_emoji_eval(pipe, seed, n=2, tasks=("retrieval",)) for seed in (1, 2))
    assert one.about["seed"] == 1 and one.about["profile"] == "cpu" and one.about["yardstick"]
    with pytest.raises(ValueError, match="differ in seed "):
        compare_reports(one, other)


def test_bad_input_is_named(pipe: UniDiffPipeline) -> None:
    with pytest.raises(ValueError, match="unknown task 'dancing'"):
        run_emoji_eval(pipe, tasks=("dancing",))
    with pytest.raises(ValueError, match="n is 0"):
        run_emoji_eval(pipe, n=0)
    with pytest.raises(ValueError, match="ask for both"):
        run_emoji_eval(pipe, tasks=("second_reader",))
    with pytest.raises(ValueError, match="per_task is 0"):
        run_emoji_eval(pipe, per_task=0)
    with pytest.raises(ValueError, match="64x64 or 128x128 pictures, this one makes 32x32"):
        profile_of(tiny_emoji_pipeline(32))
