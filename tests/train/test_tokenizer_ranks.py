"""Two processes train the image tokenizer that one trains, and its run goes on in one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_samples import write_samples

from unidiff.tokens.image.vq import VQImageTokenizer

pytestmark = [pytest.mark.training, pytest.mark.slow]
SETTINGS = [
    *("data.image_size=16", "model.codebook_size=16", "model.encoder_width=8", "model.encoder_depth=1"),
    *(
        "model.decoder_widths=[8]",
        "model.decoder_depths=[1]",
        "batch_size=4",
        "warmup_steps=1",
        "threads=1",
        "bf16=false",
    ),
    *("validate_every=4", "checkpoint_every=4", "log_every=2", "device=cpu", "learning_rate=1e-3"),
]
CLOCKS = ("time", "seconds")


def train(folder: Path, out: str, processes: int, steps: int) -> None:
    words = ["-m", "unidiff", "tokenizer", "image", "own_tokenizer", f"out={out}", "data.shards=[raw]", *SETTINGS]
    alone = [sys.executable]
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*(alone if processes == 1 else together), *words, f"steps={steps}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_and_one_goes_on(tmp_path):
    write_samples(tmp_path / "raw", 24)
    train(tmp_path, "one", 1, 8)
    train(tmp_path, "two", 2, 8)
    weights = [
        VQImageTokenizer.from_pretrained(tmp_path / name / "model").model.state_dict() for name in ("one", "two")
    ]
    assert weights[0].keys() == weights[1].keys() and all(bool(v.isfinite().all()) for v in weights[1].values())
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, rtol=0, atol=5e-6), name
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, two in zip(*lines):  # numbers of the whole batch, whichever process writes them
        kept = {key: value for key, value in one.items() if isinstance(value, float | int) and key not in CLOCKS}
        assert {key: two[key] for key in kept} == pytest.approx(kept, rel=1e-4)
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 2 and (tmp_path / "two" / "report.html").is_file()
    train(tmp_path, "two", 1, 9)  # by one process, where two have stopped
    assert json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 9
