"""The benchmark of caches on a trained model: settings, kept measurements, contrasts, files."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from emoji_fakes import vocabulary_words
from PIL import Image
from rich.console import Console
from tiny_pipeline import tiny_pipeline

from unidiff.decoding import CacheConfig
from unidiff.evaluation.benchmark import trained
from unidiff.evaluation.benchmark.measure import Cells, model_hash
from unidiff.evaluation.benchmark.result import write
from unidiff.evaluation.benchmark.trained import TrainedOptions, run_trained
from unidiff.evaluation.benchmark.trials import KINDS, Decode, Setting, Trial, contrast_tables, contrasts, decodes
from unidiff.evaluation.report import Estimate
from unidiff.pipelines.settings import default_samplers
from unidiff.worlds.emoji.evaluation import QUALITY, SWEEP, ask, cases_per_part, judged_tasks
from unidiff.worlds.emoji.scenes import get_profile

RECIPE = Path(__file__).resolve().parents[2] / "inference" / "benchmark.py"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(text_length=40, grid=(8, 8), corpus=vocabulary_words(get_profile("cpu")) * 2)


def test_settings_change_what_a_task_decodes():
    samplers = default_samplers()
    drawn, said, torn = (samplers[task] for task in ("text_to_image", "caption", "inpaint"))
    eight = Setting.parse("passes-8")
    assert eight.config(drawn, "text_to_image").image.steps == 8
    assert eight.config(drawn, "text_to_image").text == drawn.text
    text = eight.config(said, "caption").text
    assert (text.steps, text.rule) == (8, "quota") and eight.config(said, "caption").image == said.image
    both = Setting.parse("passes-8/4").config(torn, "inpaint")
    assert (both.image.steps, both.text.steps, both.image.block_length, both.text.block_length) == (8, 8, 4, 4)
    sure = Setting.parse("threshold-0.7").config(torn, "inpaint")
    assert (sure.text.threshold, sure.text.rule, sure.image) == (0.7, "threshold", torn.image)
    assert Setting.parse("factor-1").config(said, "caption").text.rule == "factor"
    assert Setting.parse("model").config(said, "caption") == said
    for name in ("model", "passes-8/4", "threshold-0.7", "factor-1"):
        assert Setting.parse(name).name == name
    for name, words in {
        "passes": "has the value None",
        "model-3": "has the value 3",
        "steps-3": "expected one of model, passes",
        "passes-x": "could not convert",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            Setting.parse(name)


def test_settings_that_are_the_same_are_measured_once():
    for task in QUALITY:
        found = decodes(task, default_samplers()[task], SWEEP[task])
        assert sorted(s.name for d in found for s in d.settings) == sorted(SWEEP[task])
        assert len({d.config for d in found}) == len(found) and [d.is_reference for d in found].count(True) == 1
    names = [d.name for d in decodes("caption", default_samplers()["caption"], (*SWEEP["caption"], "threshold-0.9"))]
    assert names[0] == "model = threshold-0.9" and len(names) == len(SWEEP["caption"])
    assert (
        decodes("text_to_image", default_samplers()["text_to_image"], SWEEP["text_to_image"])[0].name
        == "model = passes-16"
    )
    assert [cases_per_part(task, 2000) for task in QUALITY] == [334, 500, 2000, 2000, 2000]


def test_kept_measurements(tmp_path):
    cells, calls = Cells(tmp_path / "cells"), []

    def measure():
        calls.append(1)
        return {"seconds": 2.5}

    key = {"task": "caption", "grid": (8, 8)}
    assert cells.load("a", key) is None
    assert cells.measured("a", key, measure) == cells.measured("a", key, measure) == {"seconds": 2.5}
    assert len(calls) == 1 and cells.load("a", {**key, "task": "answer"}) is None
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text(json.dumps({"key": {}, "found": {}}))
    with pytest.raises(ValueError, match="not the measurement that its name says; remove it"):
        cells.load("a", key)


def test_the_hash_of_a_model_is_that_of_its_weights():
    small = tiny_pipeline()
    before = model_hash(small)
    assert model_hash(tiny_pipeline()) == before != model_hash(tiny_pipeline(seed=1))
    small.transformer.register_to_config(_name_or_path="somewhere else")
    assert model_hash(small) == before
    next(small.transformer.parameters()).data.view(-1)[0] += 1
    assert model_hash(small) != before


class Listener:
    """Notes what it is asked."""

    def __getattr__(self, name):
        return lambda *rows: (name, [len(part) for part in rows])


def test_timed_rows_are_as_many_as_asked_for(pipe):
    for rows in (1, 5):
        for task in QUALITY:
            name, sizes = ask(Listener(), pipe, task, rows, 0)
            assert name == task and set(sizes) == {rows}


SETTINGS = ("model", "passes-2", "passes-64")


def test_suite_is_measured_kept_and_taken_up_again(pipe, tmp_path, monkeypatch):
    counts = {"quality": 0, "seconds": 0}
    for name in counts:
        original = getattr(trained, f"measure_{name}")

        def counted(*args, name=name, original=original):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(trained, f"measure_{name}", counted)
    options = dict(cells=tmp_path / "cells", caches=("interval", "dual"), tasks=("caption",), settings=SETTINGS)
    options |= dict(batches=(1, 3), cases=4, rows=1, runs=2, quality_batch=4)

    def interrupted(what):
        if what.endswith("run 2 of 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trained("emoji", judged_tasks(), pipe, TrainedOptions(**options), interrupted)
    # three caches of two settings and one of the reference, the same for both batches; a warm-up and a run
    assert counts == {"quality": 7, "seconds": 2}
    said: list[str] = []
    result = run_trained("emoji", judged_tasks(), pipe, TrainedOptions(**options), said.append)
    assert counts == {"quality": 7, "seconds": 2 + 2 + 3}
    assert [r.to_dict() for r in run_trained("emoji", judged_tasks(), pipe, TrainedOptions(**options)).rows] == [
        r.to_dict() for r in result.rows
    ]
    assert counts["seconds"] == 7 and "timing of caption, 3 rows at once, run 1 of 2" in said
    assert not [p for p in (tmp_path / "cells").iterdir() if p.suffix != ".json"]

    assert [(r.workload["batch"], r.workload["setting"], r.policy) for r in result.rows] == [
        (batch, name, policy)
        for batch in (1, 3)
        for name in SETTINGS
        for policy in (("none",) if name == "passes-64" else ("none", "interval", "dual"))
    ]
    cached = [row for row in result.rows if row.workload["setting"] != "passes-64"]
    for plain, auto, dual in zip(cached[::3], cached[1::3], cached[2::3], strict=True):
        assert plain.speedup == plain.bound == plain.bound_corrected == 1 and plain.stats["partial_passes"] == 0
        assert dual.bound == pytest.approx(plain.stats["flops"] / dual.stats["flops"]) and len(dual.seconds_all) == 2
        assert auto.stats["cache"] == CacheConfig("interval").to_dict() and auto.stats["note"] == ""
        assert 0 <= dual.quality_low <= dual.quality <= dual.quality_high <= 1
    assert {r.nfe for r in result.rows if r.workload["setting"] == "passes-2"} == {2}
    found = result.about["contrasts"]
    assert {c["kind"] for c in found} == set(KINDS) and len([c for c in found if c["kind"] == "cache"]) == 8
    assert len([c for c in found if c["kind"] == "passes"]) == 8 and result.about["cases"] == 4

    files = write(result, tmp_path / "e.json")
    assert [p.suffix for p in files] == [".json", ".csv", ".png"]
    assert json.loads(files[0].read_text())["about"]["contrasts"] == found
    with files[1].open() as file:
        assert [line["setting"] for line in csv.DictReader(file)] == [r.workload["setting"] for r in result.rows]
    with Image.open(files[2]) as image:
        assert image.width > image.height  # the batches side by side
    console = Console(width=180, record=True, quiet=False)
    with console.capture() as capture:
        console.print(contrast_tables(result))
    assert "caption, 3 rows at once, float32" in capture.get() and "fastest without a cache" in capture.get()


def measured(policy, name, seconds, right, task="caption"):
    setting = Setting.parse(name)
    decode = Decode(task, (setting,), setting.config(default_samplers()[task], task))
    outcomes = np.arange(1000) < right
    quality = Estimate.share(outcomes)
    return Trial(decode, policy, 1, CacheConfig("none"), seconds=tuple(seconds), quality=quality)


def test_contrasts_keep_caches_and_passes_apart():
    ways = [
        measured("none", "passes-64", (8, 8, 12), 900),
        measured("auto", "passes-64", (4, 5, 4), 898),
        measured("none", "passes-8", (1.0, 1.0, 1.0), 880),  # too much is lost
        measured("auto", "passes-8", (0.5, 0.5, 0.5), 870),
        measured("none", "passes-16", (2, 2, 2), 895),
        measured("auto", "passes-16", (1, 1, 1), 892),
    ]
    found = {(c.kind, c.after): c for c in contrasts(ways)}
    cache = found["cache", "auto, passes-64"]
    assert cache.before == "none, passes-64" and (cache.speedup, cache.speedup_low, cache.speedup_high) == (2, 1.6, 3)
    assert cache.difference == pytest.approx(-0.002) and cache.low < -0.002 < cache.high <= 0
    passes = found["passes", "auto, passes-16"]
    assert passes.before == "auto, passes-64" and passes.speedup == 4 and passes.difference == pytest.approx(-0.006)
    last = {c.kind: (c.before, c.after, c.speedup) for c in found.values() if c.kind not in ("cache", "passes")}
    assert last == {
        "plain": ("none, passes-64", "none, passes-16", 4),
        "loss": ("none, passes-64", "auto, passes-16", 8),
        "equal": ("none, passes-16", "auto, passes-16", 2),
        "as good": ("none, passes-16", "auto, passes-16", 2),
        "reference": ("none, passes-64", "auto, passes-16", 8),
    }
    lost = [ways[0], measured("none", "passes-8", (1, 1, 1), 500), measured("auto", "passes-8", (0.5, 0.5, 0.5), 500)]
    assert [c.kind for c in contrasts(lost)] == ["cache", "passes", "plain"]  # nothing with a cache is good enough


def test_mistakes_are_one_sentence(pipe, tmp_path):
    folder = tmp_path / "cells"
    for options, words in (
        ({"caches": ("dua",)}, "unknown policy 'dua'; expected some of adaptive"),
        ({"parts": ("all",)}, "unknown part 'all'"),
        ({"cases": 0}, "cases is 0"),
        ({"batches": (0,)}, "batches"),
        ({"batches": ()}, r"batches are \[\]"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainedOptions(folder, **options)
    with pytest.raises(ValueError, match="steps is 0"):
        run_trained("emoji", judged_tasks(), pipe, TrainedOptions(folder, settings=("passes-0",)))
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        run_trained("emoji", judged_tasks(), pipe, TrainedOptions(folder, tasks=("sing",)))
    assert not folder.exists()


def test_recipe_takes_the_options_of_the_suite(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    line = ["--suite", "emoji", "--json", str(tmp_path / "e.json")]
    given = lambda *more: recipe.options_of(TrainedOptions, recipe.arguments().parse_args([*line, *more]))  # noqa: E731
    plain = given()
    assert plain == TrainedOptions(tmp_path / "e.cells")
    more = [
        "--task",
        "answer",
        "--task",
        "caption",
        "--only",
        "dual",
        "--batch",
        "4",
        "--cases",
        "9",
        "--part",
        "timing",
    ]
    own = given(*more, "--large", "5", "--setting", "passes-4")
    assert (own.tasks, own.caches, own.batches, own.cases) == (("answer", "caption"), ("dual",), (4,), 9)
    assert (own.parts, own.quality_batch, own.settings) == (("timing",), 5, ("passes-4",))
    assert plain != given("--seed", "1")
