"""Paired differences of two evaluations: exact values, coverage, files, mistakes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emoji_fakes import PerfectModel, ShuffledModel
from rich.console import Console

from unidiff.evaluation.paired import compare_reports, paired_interval
from unidiff.evaluation.report import Estimate, EvaluationReport
from unidiff.worlds.emoji.judge import EmojiEval
from unidiff.worlds.emoji.scenes import get_profile

SMALL = get_profile("cpu", num_objects=12)
TASKS = ("text_to_image", "caption", "answer")


class Worse(PerfectModel):
    """Right, but for the first picture of every call and one answer."""

    def text_to_image(self, prompts, seeds):
        images = super().text_to_image(prompts, seeds)
        images[0] = 0.5
        return images

    def answer(self, images, questions, seeds):
        return ["", *super().answer(images, questions, seeds)[1:]]


@pytest.fixture(scope="module")
def reports() -> dict[str, EvaluationReport]:
    models = {m.__name__: m(SMALL, 0, 5) for m in (PerfectModel, ShuffledModel, Worse)}
    return {name: EmojiEval(model, SMALL, 0, 5).run(TASKS) for name, model in models.items()}


def test_an_evaluation_keeps_the_outcome_of_every_case(reports):
    for report in reports.values():
        for key, estimate in report.intervals.items():
            assert sum(map(len, estimate.cases)) == estimate.n, key
            assert np.mean([part.mean() for part in estimate.cases]) == pytest.approx(report.values[key])
    drawn = reports["Worse"].intervals["text_to_image"].cases
    assert [part.tolist() for part in drawn] == [[False, True, True, True, True]] * 6


def test_differences_of_evaluations(reports):
    found = compare_reports(reports["PerfectModel"], reports["Worse"]).differences
    assert set(found) == set(reports["Worse"].values)
    drawn, said, told = (found[key] for key in ("text_to_image", "caption_exact", "answer_accuracy"))
    assert drawn.difference == pytest.approx(-0.2) and drawn.n == 30 and drawn.low < -0.2 < drawn.high <= 0
    assert (said.difference, said.low, said.high) == (0, 0, 0)  # the same in every case
    assert told.before == 1 and told.after == pytest.approx(0.8)
    assert found["answer_baseline"].low is None and found["seconds"].n == 0
    back = compare_reports(reports["Worse"], reports["PerfectModel"]).differences["text_to_image"]
    assert back.difference == -drawn.difference
    again = compare_reports(reports["PerfectModel"], reports["Worse"]).differences["text_to_image"]
    assert again == drawn


def test_saved_evaluations_compare_alike(reports, tmp_path: Path):
    report = reports["ShuffledModel"]
    report.add("nelbo", Estimate.mean([1.25, 3.5, 9.0]))
    report.add("lost", math.nan)
    report.save(tmp_path / "made" / "a.json", outcomes=True)
    loaded = EvaluationReport.load(tmp_path / "made" / "a.json")
    assert loaded.values.keys() == report.values.keys() and loaded.about == report.about
    assert all(loaded.values[k] == v for k, v in report.values.items() if k != "lost")
    for key, estimate in report.intervals.items():
        assert loaded.intervals[key] == estimate
        pairs = zip(loaded.intervals[key].cases, estimate.cases, strict=True)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    other = reports["PerfectModel"]
    assert compare_reports(other, loaded) == compare_reports(other, report)
    found = compare_reports(loaded, report)
    found.save(tmp_path / "made" / "d.json")
    data = json.loads((tmp_path / "made" / "d.json").read_text())
    assert data["differences"]["text_to_image"]["difference"] == 0 and data["about"]["seed"] == 0
    assert data["differences"]["lost"]["difference"] is None
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["a.json", "d.json"]
    del report.values["lost"], report.values["nelbo"], report.intervals["nelbo"]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for shares in (True, False):
        hits = 0
        for trial in range(400):
            before, after = [], []
            for level in (0.2, 0.5, 0.8):  # parts of different difficulty, as the categories are
                hard = rng.random(60)
                x, y = (hard + 0.3 * rng.random(60) < level for _ in range(2))
                y |= rng.random(60) < 0.1
                before.append(x if shares else x + hard)
                after.append(y if shares else y + hard)
            truth = np.mean([0.1 * (1 - _reached(level)) for level in (0.2, 0.5, 0.8)])
            low, high = paired_interval(before, after, 500, trial)
            hits += low <= truth <= high
        assert 0.91 < hits / 400 < 0.985


def _reached(level: float) -> float:
    """Chance that u + .3 v < level for uniform u and v."""
    v = (np.arange(10_000) + 0.5) / 10_000
    return float(np.clip(level - 0.3 * v, 0, 1).mean())


def test_intervals_are_those_of_a_direct_bootstrap():
    rng = np.random.default_rng(4)
    before, after = ([rng.random(n) < share for n in (30, 50)] for share in (0.5, 0.7))
    means = []
    for _ in range(4000):
        drawn = [rng.integers(n, size=n) for n in (30, 50)]
        both = [np.mean([p[d].mean() for p, d in zip(parts, drawn, strict=True)]) for parts in (before, after)]
        means.append(both[1] - both[0])  # the same cases of both
    direct = np.quantile(means, (0.025, 0.975))
    assert paired_interval(before, after, 20_000) == pytest.approx(direct, abs=0.012)


def test_counts_and_cases_are_resampled_alike():
    x = np.repeat(np.array([0.0, 1.0]), 40)
    nudged = x + np.arange(80) * 1e-9  # many different values: the other way to draw
    zero = np.zeros(80)
    one, other = (paired_interval([zero], [y], 20_000) for y in (x, nudged))
    assert one == pytest.approx(other, abs=0.01) and one == pytest.approx((0.39, 0.61), abs=0.02)


def test_pairing_gains_where_cases_are_hard_for_both():
    rng = np.random.default_rng(1)
    before = rng.random(500) < 0.6
    after = before.copy()
    after[:10] = ~after[:10]
    low, high = paired_interval([before], [after])
    apart = [Estimate.share(x) for x in (before, after)]
    assert high - low < 0.5 * math.hypot(*(e.high - e.low for e in apart))


def test_mistakes_are_one_sentence(reports, tmp_path: Path):
    report = reports["PerfectModel"]
    for name, value in (("seed", 1), ("n", 6), ("yardstick", "ab")):
        with pytest.raises(ValueError, match=f"differ in {name} .*cannot be paired"):
            compare_reports(report, replace(report, about={**report.about, name: value}))
    with pytest.raises(ValueError, match="resamples is 0"):
        compare_reports(report, report, 0)
    report.save(tmp_path / "plain.json")
    assert "outcomes" not in json.loads((tmp_path / "plain.json").read_text())
    with pytest.raises(ValueError, match="second evaluation was saved without the outcome of each case"):
        compare_reports(report, EvaluationReport.load(tmp_path / "plain.json"))
    with pytest.raises(ValueError, match="no number in common"):
        compare_reports(report, replace(report, values={"other": 1.0}))
    shorter = dict(report.intervals, caption_exact=Estimate.share([True] * 3))
    with pytest.raises(ValueError, match="caption_exact has 20 cases in one evaluation and 3 in the other"):
        compare_reports(report, replace(report, intervals=shorter))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "text.json").write_text("{")
    for name in ("list", "text"):
        with pytest.raises(ValueError, match=rf"{name}\.json' cannot be read as an evaluation"):
            EvaluationReport.load(tmp_path / f"{name}.json")
    with pytest.raises(FileNotFoundError):
        EvaluationReport.load(tmp_path / "none.json")


def test_table_stars_what_changed(reports):
    console = Console(width=110, record=True, quiet=False)
    with console.capture() as capture:
        console.print(compare_reports(reports["PerfectModel"], reports["ShuffledModel"]).table())
    lines = {line.split("│")[1].strip(): line for line in capture.get().splitlines() if line.count("│") > 5}
    assert "*" in lines["caption_exact"] and "*" not in lines["answer_accuracy"]
    assert "+0.000 to +0.000" in lines["answer_accuracy"]
