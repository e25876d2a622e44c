"""Intervals, JSON and hashes of the report."""

from __future__ import annotations

import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from unidiff.evaluation.paired import compare_reports
from unidiff.evaluation.report import Estimate, EvaluationReport, sources_hash


def test_wilson_interval_of_known_cases() -> None:
    half = Estimate.share([True, False] * 50)  # Wilson (1927); e.g. R's binom.confint gives .4038, .5962
    assert (half.value, half.n) == (0.5, 100)
    assert half.low == pytest.approx(0.40383, abs=1e-5) and half.high == pytest.approx(0.59617, abs=1e-5)
    none = Estimate.share([False] * 10)
    assert none.low == 0.0 and none.high == pytest.approx(0.27753, abs=1e-5)
    assert Estimate.share([True] * 10).high == 1.0


def test_wilson_interval_covers() -> None:
    rng = np.random.default_rng(0)
    hits = [e.low <= 0.8 <= e.high for e in (Estimate.share(rng.random(60) < 0.8) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97


def test_mean_interval_and_average() -> None:
    mean = Estimate.mean([1.0, 2.0, 3.0, 4.0])
    assert mean.value == 2.5 and mean.high - mean.value == pytest.approx(1.96 * math.sqrt(5 / 3) / 2, rel=1e-4)
    assert Estimate.mean([7.0]).high == math.inf
    both = Estimate.average([Estimate(0.4, 0.3, 0.5, 10), Estimate(0.8, 0.7, 0.9, 30)])
    assert both.value == pytest.approx(0.6) and both.n == 40
    assert both.high - both.value == pytest.approx(0.1 * math.sqrt(2) / 2)


def test_no_cases_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one case"):
        Estimate.share([])
    with pytest.raises(ValueError, match="at least one value"):
        Estimate.mean([])


def test_report_nests_keys_and_is_written_whole(tmp_path: Path) -> None:
    report = EvaluationReport(about={"seed": 3})
    report.add("psnr", 24.5)
    report.add("categories.counting", Estimate(0.5, 0.4, 0.6, 9))
    report.add("lost", math.nan)
    path = tmp_path / "deep" / "report.json"
    report.save(path)
    assert json.loads(path.read_text()) == {
        "psnr": 24.5,
        "categories": {"counting": 0.5},
        "lost": None,
        "intervals": {"categories.counting": {"low": 0.4, "high": 0.6, "n": 9}},
        "about": {"seed": 3},
    }
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_what_is_not_finite_is_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        report = EvaluationReport(about={"n": 3})
        report.add("a", Estimate.mean([1.0, math.nan, 3.0]))
        report.add("b", Estimate.mean([1.0, math.inf, 3.0]))
        report.add("whole", Estimate.mean([1.0, 2.0, 3.0]))
        report.save(tmp_path / "report.json", outcomes=True)
        again = EvaluationReport.load(tmp_path / "report.json")
        compare_reports(report, again, 10).save(tmp_path / "change.json")
    for name in ("report.json", "change.json"):
        text = (tmp_path / name).read_text()
        assert "NaN" not in text and "Infinity" not in text
    assert [math.isnan(x) for x in again.intervals["b"].cases[0]] == [False, True, False]
    assert again.intervals["whole"].cases[0].tolist() == [1.0, 2.0, 3.0]


def test_table_shows_every_number() -> None:
    report = EvaluationReport()
    report.add("oracle_true", Estimate(0.998, 0.99, 1.0, 1200))
    report.add("seconds", 12.0)
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert (
        "oracle_true" in text and "0.998" in text and "0.990 to 1.000" in text and "1200" in text and "12.000" in text
    )


def test_hash_depends_on_names_and_contents(tmp_path: Path) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("x")
    b.write_text("x")
    assert sources_hash([a]) != sources_hash([b])
    before = sources_hash([a, b])
    b.write_text("y")
    assert sources_hash([a, b]) != before


def test_names_of_measures_are_whole_on_a_narrow_terminal() -> None:
    console = Console(width=50, record=True, file=io.StringIO())
    name = "unreadable.held_out_composition_with_a_long_name"
    console.print(EvaluationReport(values={name: 0.5}, intervals={name: Estimate.share([True, False])}).table("t"))
    lines = console.export_text().splitlines()
    assert "…" not in "".join(lines)
    assert "".join(line.split("│")[1].strip() for line in lines if "│" in line) == name
