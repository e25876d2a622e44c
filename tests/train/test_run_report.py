"""The page of a run, and runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from unidiff.train.run.logs import RunLog
from unidiff.train.run.report import REPORT, RunRecord, differing, find_runs


def a_run(folder: Path, rate: float, steps: int = 80) -> Path:
    """The folder of a run that was stopped, without any training."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"output: {folder}\nsteps: 100\noptimiser: {{lr: {rate}}}\n")
    (folder / "skipped.json").write_text('{"counts": {"bad_caption": 3}}')
    (folder / "samples").mkdir()
    for step in range(0, steps, 4):
        Image.new("RGB", (8, 8)).save(folder / "samples" / f"step-{step:08d}.png")
    log = RunLog(folder, 0)
    for step in range(1, steps + 1):
        log.write(step, "train", {"loss": 5 / step, "nll/caption/text": 3.0, "lr_factor": 1.0, "share/caption": 0.5})
    log.write(steps, "skipped", {"loss": float("nan"), "sample_count": 8.0})
    log.write(steps, "validation", {"joint_nelbo": 20 + rate, "caption_nelbo": 3.0, "joint_nelbo_error": 0.1})
    log.write(steps, "training <of> others", {"<b>": 1.0})
    log.close()
    return folder


def test_a_page_shows_all_of_a_run_by_itself(tmp_path):
    page = (a_run(tmp_path / "run", 0.5) / REPORT).read_text()
    for words in ("train: loss", "NLL of hidden tokens", "joint NELBO", "Learning rate", "80 of 100", "bad_caption"):
        assert words in page, words
    assert "optimiser.lr: 0.5" in page and "skipped steps" in page and "share/caption" not in page
    assert page.count("<svg") == 6 and "<b>" not in page.replace("&lt;b&gt;", "")
    assert page.count("data:image/png;base64,") == 12 and "step-00000000" in page and "step-00000076" in page
    assert 'src="http' not in page and "<script" not in page and "<link" not in page


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / REPORT).mkdir()  # in the way
    log = RunLog(tmp_path / "run", 0)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert "cannot be written" in caplog.text
    quiet = RunLog(tmp_path / "run", 1, report=False)
    quiet.write(2, "train", {"loss": 1.0})
    quiet.close()
    assert caplog.text.count("cannot be written") == 1


def test_runs_are_listed_and_compared(run, tmp_path):
    first, second = a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 0.25, 40)
    with open(second / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "kind": "tr')  # killed while it wrote
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("no json\n")
    found = find_runs([tmp_path])
    assert [r.folder for r in found] == [first, second] and [r.step for r in found] == [80, 40]
    assert found[0].best() == ("joint_nelbo", 20.5) and differing(found) == {"optimiser.lr": [0.5, 0.25]}
    assert RunRecord.read(first).series["train", "loss"][-1] == (80, 5 / 80)
    status, said, _ = run("runs", tmp_path, "--html", tmp_path / "all.html")
    assert status == 0 and "joint_nelbo 20.25" in said and "optimiser.lr" in said
    page = (tmp_path / "all.html").read_text()
    assert "a loss" in page and "b loss" in page and json.dumps(0.25) in page
    status, _, err = run("runs", tmp_path / "nothing")
    assert status == 1 and "is no folder" in err
