"""The files of an evaluation, what is on its page, and how the page looks in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from unidiff.evaluation.report import Estimate, EvaluationReport, JudgedCase, Measure
from unidiff.evaluation.report_page import FILES, write_files

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def a_report() -> EvaluationReport:
    """Numbers of two tasks, and 40 cases of one, of which every third is wrong."""
    report = EvaluationReport(about={"model": "toy <b>", "seed": 3, "n": 20, "samplers": {"text": {"steps": 4}}})
    rng, shares = np.random.default_rng(0), []
    for category in ("one_fox", "two_foxes"):
        right = [number % 3 > 0 for number in range(20)]
        shares.append(Estimate.share(right))
        report.add(f"categories.{category}", shares[-1])
        for number, value in enumerate(right):
            picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            asked = f"a fox & <i>{number}</i> {'on a very long background ' * (number == 0)}"
            shots = (("given", picture), ("drawn", picture))
            case = JudgedCase("draw", category, number, value, asked, "a fox", "nothing", "", shots, f"draw/{number}")
            report.cases.append(case)
    report.add("mean", Estimate.average(shares))
    report.add("nats", 4.25)
    report.add("seconds", 12.5)
    report.measures = {key: Measure("draw", key.replace("categories.", ""), key == "mean") for key in report.values}
    report.measures["nats"] = Measure("likelihood", "NELBO, nats", better="lower")
    return report


def test_all_files_say_the_same_and_are_the_same_again(tmp_path):
    report = a_report()
    first = write_files(report, tmp_path / "a", "toy on toys")
    report.add("seconds", 99.0)  # how long it took is in no file
    second = write_files(report, tmp_path / "b", "toy on toys")
    assert [path.name for path in first] == list(FILES) == sorted(FILES, key=FILES.index)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    data = json.loads((tmp_path / "a" / "report.json").read_text())
    loaded = EvaluationReport.load(tmp_path / "a" / "report.json")
    assert "seconds" not in data and loaded.intervals["mean"] == report.intervals["mean"] and data["outcomes"]["mean"]
    with open(tmp_path / "a" / "numbers.csv", newline="") as file:
        numbers = {row["measure"]: row for row in csv.DictReader(file)}
    assert float(numbers["mean"]["low"]) == report.intervals["mean"].low and numbers["nats"]["low"] == ""
    with open(tmp_path / "a" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["asked"] for row in rows] == [case.asked for case in report.cases]
    assert [row["right"] == "True" for row in rows] == [case.right for case in report.cases]


def test_a_page_shows_failures_first_and_needs_no_other_file(tmp_path):
    page = write_files(a_report(), tmp_path, "toy & toys")[0].read_text()
    assert page.count("<h1>toy &amp; toys</h1>") == 1 and "<i>" not in page and "toy &lt;b&gt;" in page
    assert page.index("Failures: 14 of 40") < page.index("Right: 12 of 26")
    wrong, right = page[page.index("Failures: 14") : page.index("Right: 12")], page[page.index("Right: 12") :]
    assert wrong.count("<b>wrong</b>") == 12 and "<b>right</b>" not in wrong and right.count("<b>right</b>") == 12
    assert wrong.index("one fox 0") < wrong.index("two foxes 0") < wrong.index("one fox 3")  # in turn
    assert page.count("<svg") == 1 and 'role="img"' in page and "two_foxes 0.650" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page) and "<script" not in page
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', page))
    assert "<summary>Samplers</summary><pre>text.steps: 4</pre>" in page
    assert "lower is better" in page and "4.250" in page and "seconds" not in page


def test_words_on_a_page_are_escaped_once(tmp_path):
    hostile = "<script>'&\"=1\n"
    report = a_report()
    picture = np.zeros((4, 4, 3), np.uint8)
    report.cases = [JudgedCase(*[hostile] * 2, 1, False, *[hostile] * 4, ((hostile, picture),), hostile)]
    report.measures = {key: Measure(hostile, hostile, True) for key in report.values}
    report.about = {hostile: hostile, "suite": hostile}
    write_files(report, tmp_path, hostile)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&amp;lt;" not in page and "&amp;amp;" not in page
    with open(tmp_path / "cases.csv", newline="") as file:
        assert next(csv.DictReader(file))["wrote"] == hostile


def test_a_page_without_cases_or_failures(tmp_path):
    report = a_report()
    report.cases = [replace(case, right=True) for case in report.cases[:3]]
    page = write_files(report, tmp_path / "right", "toy")[0].read_text()
    assert "No failure among 3 cases" in page and "<details open>" in page
    bare = EvaluationReport({"share": 0.5}, about={"seed": 0})
    page = write_files(bare, tmp_path / "bare", "toy")[0].read_text()
    assert "0.500" in page and "<h3>" not in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_into_a_browser_in_light_and_dark(tmp_path, width):
    api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no browser is installed")
    path = write_files(a_report(), tmp_path, "toy on toys")[0]
    asked: list[str] = []
    papers = set()
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=QUIET, timeout=300_000)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(300_000)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth && i.alt)")
            beyond = (
                "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
            )
            assert page.evaluate(f"{beyond}.length") == 0
            papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            assert ink == page.evaluate("getComputedStyle(document.body).color")
        browser.close()
    assert len(papers) == 2
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
