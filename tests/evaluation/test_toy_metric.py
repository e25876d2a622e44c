"""A metric is one module: nothing of unidiff names it, and `unidiff eval` measures it on the cases of a world."""

from __future__ import annotations

from toy_packages import run_with

PACKAGE = """
from unidiff.evaluation.metrics.base import Metric
from unidiff.evaluation.report import Estimate


def codes_used(pipe, cases):
    codes = pipe.images.encode(cases.pictures(0, len(cases.captions)))
    words = Estimate.mean([len(caption.split()) for caption in cases.captions])
    return {"toy.codes": len(codes.unique()), "toy.words": words}


TOY = Metric("toy", codes_used)
"""

RUN = """
import json
import sys

from unidiff import cli

out = sys.argv[1] + "/out.json"
sys.argv = ["unidiff", "eval", "emoji", "--task", "toy", "--n", "5", "--json", out]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
data = json.load(open(out))
assert data["toy"]["codes"] > 5 and data["intervals"]["toy.words"]["n"] == 5
assert set(data) == {"toy", "seconds", "intervals", "about"}
"""


def test_a_metric_of_another_package(tmp_path):
    run_with(tmp_path, "metrics", PACKAGE, RUN)
