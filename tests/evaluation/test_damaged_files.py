"""Kept evaluations and measurements whose content is damaged: one sentence that names the file, never a wrong number."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unidiff.evaluation.benchmark.measure import Cells
from unidiff.evaluation.benchmark.random_weights import SuiteOptions
from unidiff.evaluation.benchmark.result import check_path
from unidiff.evaluation.benchmark.trained import TrainedOptions
from unidiff.evaluation.benchmark.trials import Setting
from unidiff.evaluation.paired import compare_reports
from unidiff.evaluation.report import Estimate, EvaluationReport

WRONG: tuple[Any, ...] = (
    None,
    True,
    3,
    -1,
    2.5,
    "x",
    "01",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    10**30,
    [[]],
    [None],
    {"n": []},
)


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def replaced(data: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(data)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def saved(folder: Path) -> dict[str, Any]:
    report = EvaluationReport(about={"yardstick": "ab", "profile": "cpu", "seed": 0, "n": 4})
    report.add("caption_exact", Estimate.share([True, False, True, True]))
    report.add("parts.mean", Estimate.mean(np.array([1.0, 2.0, 4.0])))
    report.add("seconds", 3.0)
    report.save(folder / "whole.json", outcomes=True)
    return json.loads((folder / "whole.json").read_text())


def test_every_value_of_a_report_replaced_by_every_wrong_type(tmp_path):
    data, cases, refused = saved(tmp_path), 0, 0
    whole, path = EvaluationReport.load(tmp_path / "whole.json"), tmp_path / "r.json"
    for place in places(data):
        for value in WRONG:
            path.write_text(json.dumps(replaced(data, place, value)))
            cases += 1
            try:
                compare_reports(whole, EvaluationReport.load(path), 10).table()
                EvaluationReport.load(path).table()
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
                refused += 1
    assert cases > 300 and refused > cases / 2
    for key in ("intervals", "about"):
        path.write_text(json.dumps({k: v for k, v in data.items() if k != key}))
        with pytest.raises(ValueError, match=r"r\.json"):
            EvaluationReport.load(path)
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN', b"null", b"3"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.json"):
            EvaluationReport.load(path)
    with pytest.raises(ValueError, match="folder"):
        EvaluationReport.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        EvaluationReport.load(tmp_path / "gone.json")


def test_a_kept_measurement_that_was_changed_is_refused(tmp_path):
    cells, key = Cells(tmp_path), {"model": "ab", "rows": [1, 4]}
    found = {"trials": {"none": {"seconds": 0.5, "nfe": 8.0}}, "code": "cd"}
    assert cells.measured("timing", key, lambda: found) == found
    path = cells.path("timing", key)
    data, cases = json.loads(path.read_text()), 0
    for place in places(data):
        for value in WRONG:
            changed = replaced(data, place, value)
            if changed == data:
                continue
            path.write_text(json.dumps(changed))
            cases += 1
            with pytest.raises(ValueError) as error:
                cells.load("timing", key)
            assert path.name in str(error.value)
    assert cases > 150
    path.write_text(json.dumps(data))
    assert cells.load("timing", key) == found
    assert cells.load("timing", {**key, "rows": [1]}) is None  # other settings are another measurement


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: SuiteOptions(runs=0), "runs is 0"), (lambda: SuiteOptions(seed=-1), "seed is -1"), (lambda: SuiteOptions(blocks=1.5), "whole number"),
     (lambda: SuiteOptions(only="none"), "a list"), (lambda: TrainedOptions(Path("c"), cases=10**30), "whole number"),
     (lambda: TrainedOptions(Path("c"), batches=(True,)), "whole number"), (lambda: TrainedOptions(Path("c"), runs=10**9), "from 1 to"),
     (lambda: Setting.parse("passes-nan"), "cannot be read"), (lambda: Setting.parse("passes-1.5"), "whole number"),
     (lambda: Setting.parse("passes-inf"), "cannot be read"), (lambda: Setting.parse("passes-8/0"), "blocks of 0"),
     (lambda: Setting.parse("passes-8/x"), "cannot be read"), (lambda: check_path(Path("/dev/full")), "must end in .json"),
     (lambda: check_path(Path("/dev/full/x.json")), "lies under"), (lambda: check_path(Path("a.txt")), "must end in .json")],
)  # fmt: skip
def test_settings_are_refused_before_any_work(make, words):
    with pytest.raises(ValueError, match=words):
        make()
