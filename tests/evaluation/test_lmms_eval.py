"""lmms-eval with a unidiff model: its own program finds it by its entry point and gets what direct calls give."""

from __future__ import annotations

import json
import tomllib
from types import SimpleNamespace

import pytest
from harness_tasks import ROOT, one, run_program, samples, write_task
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from unidiff.evaluation.harness.asked import Context
from unidiff.evaluation.harness.model import HarnessModel
from unidiff.evaluation.harness.settings import HarnessSettings
from unidiff.pipeline import UniDiffPipeline
from unidiff.worlds.emoji.cases import question_cases
from unidiff.worlds.emoji.scenes import get_profile, render_batch

pytest.importorskip("lmms_eval")

FUNCTIONS = """
from PIL import Image

def shown(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def words(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def judged(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Questions about emoji scenes, as texts and as choices, and what an installed package says about itself."""
    home = tmp_path_factory.mktemp("home")
    (home / "tasks").mkdir()
    cases = question_cases(7, 0, get_profile("cpu"))
    rows = []
    for number, case in enumerate(cases):
        path = home / f"{number}.png"
        to_pil_image(render_batch([case.scene], get_profile("cpu"))[0]).save(path)
        other = {"yes": "no", "no": "yes"}.get(case.answer, "blue" if case.answer != "blue" else "red")
        choices = [other, case.answer] if number % 2 else [case.answer, other]
        row = {"picture": str(path), "question": case.question, "answer": case.answer, "choices": choices}
        rows.append({**row, "right": choices.index(case.answer)})
    (home / "tasks" / "functions.py").write_text(FUNCTIONS)
    shown = {"doc_to_visual": "!function functions.shown", "doc_to_text": "!function functions.words"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    told = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "num_beams": 1}
    write_task(
        home / "tasks",
        "tiny_answers",
        "generate_until",
        rows,
        **shown,
        doc_to_target="answer",
        generation_kwargs=told,
        process_results="!function functions.judged",
        metric_list=[{"metric": "right", **mean}],
    )
    choice = {"doc_to_choice": "choices", "doc_to_target": "right", "metric_list": [{"metric": "acc", **mean}]}
    write_task(home / "tasks", "tiny_choice", "multiple_choice", rows, **shown, **choice)
    about = home / "installed" / "unidiff_here-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: unidiff-here\nVersion: 0\n")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    lines = [f"{name} = {target}" for name, target in declared.items()]
    (about / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines]) + "\n")
    return home, rows


@pytest.mark.slow
def test_the_command_line_gives_what_direct_calls_give(place, tmp_path):
    (home, rows), out = place, tmp_path / "out"
    given = ["--model", "unidiff", "--model_args", "pretrained=emoji,draws=4,seed=2", "--batch_size", 4]
    given += ["--tasks", "tiny_answers,tiny_choice", "--include_path", home / "tasks", "--output_path", out]
    run_program(home, "lmms_eval", *given, "--log_samples", path=[home / "installed"])
    pipe = UniDiffPipeline.from_pretrained("emoji")
    pictures = [Image.open(row["picture"]).convert("RGB") for row in rows]
    questions = [row["question"] for row in rows]
    seeds = [Context(q, (p,)).seed(2) for q, p in zip(questions, pictures, strict=True)]
    own = pipe.answer(pictures, questions, 16, temperature=0.0, generator=seeds)
    assert [sample["filtered_resps"] for sample in samples(out, "tiny_answers")] == own.texts
    plain = HarnessModel(HarnessSettings.of(pretrained="emoji", draws=4, seed=2))
    asked = [(Context(r["question"], (p,)), c) for r, p in zip(rows, pictures, strict=True) for c in r["choices"]]
    scored = [value for _, (value, _) in sorted(plain.log_likelihoods(asked))]
    losses = [float(pair[0]) for sample in samples(out, "tiny_choice") for pair in sample["filtered_resps"]]
    assert losses == pytest.approx([-value for value in scored], rel=1e-3, abs=1e-4)
    results = json.loads(one(out, "*results.json").read_text())["results"]
    right = [text == row["answer"] for text, row in zip(own.texts, rows, strict=True)]
    assert results["tiny_answers"]["right,none"] == pytest.approx(sum(right) / len(right))
    assert results["tiny_answers"]["right,none"] > 0.8 and results["tiny_choice"]["acc,none"] > 0.8


def test_losses_are_given_and_further_rounds_refused(tmp_path):
    from tiny_pipeline import SIZE, tiny_pipeline

    from unidiff.evaluation.harness.lmms_eval import UniDiffLMM

    pipe, shown = tiny_pipeline(), Image.new("RGB", SIZE[::-1], "red")
    lmm = UniDiffLMM(pipe, draws=4)
    lmm.task_dict = {"task": {"test": [shown]}}
    ask = lambda second, see=lambda doc: [doc]: SimpleNamespace(args=("a dog?", second, see, 0, "task", "test"))  # noqa: E731
    loss, greedy = lmm.loglikelihood([ask(" two")])[0].text
    plain = HarnessModel(HarnessSettings.of(pretrained="tiny", draws=4), pipe)
    [(_, (value, _))] = plain.log_likelihoods([(Context("a dog?", (shown,)), " two")])
    assert loss == -value > 0 and greedy is False
    told = lmm.generate_until([ask({"max_new_tokens": 4})])
    own = pipe.answer(shown, "a dog?", 4, temperature=0.0, generator=[Context("a dog?", (shown,)).seed(0)])
    assert told == own.texts
    with pytest.raises(ValueError, match="one question at a time"):
        lmm.generate_until_multi_round([])
    with pytest.raises(ValueError, match="draws no pictures on the way"):
        lmm.generate_visual_cot([])
    with pytest.raises(ValueError, match="shows a str, and a unidiff model reads still pictures"):
        lmm.generate_until([ask({}, lambda doc: ["film.mp4"])])
