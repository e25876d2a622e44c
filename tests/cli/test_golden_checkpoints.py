"""Every family with a checkpoint in the golden sets runs a task from the command line on it: words or pictures, of random weights."""

from __future__ import annotations

import json

import pytest
from golden import golden_folders
from golden_pipelines import write_golden_pipeline
from PIL import Image
from released_parts import GoldenCheckpoint, golden_checkpoints

from unidiff.pipeline import UniDiffPipeline

# folders of more than a network, networks that are no pipeline, and a layout whose mark of pictures the set does not have
WHOLE = {"muddit", "llamagen_vq", "magvitv2", "llada_v", "interleaved"}
NO_QUESTIONS = {"m"}  # sets without the marks of questions


def cases() -> list:
    """One checkpoint of each set that is there."""
    found = {c.path.parent.name: c for c in golden_checkpoints() if c.path.parent.name not in WHOLE}
    found |= {c.path.parent.name: c for c in with_experts()}
    params = [pytest.param(c, id=name) for name, c in found.items()]
    return params or [pytest.param(None, marks=pytest.mark.skip(reason="no golden set is there"))]


def with_experts() -> list[GoldenCheckpoint]:
    """LLaDA-MoE's and LLaDA2's checkpoints, whose sets hold other weights besides."""
    found = []
    for name in ("llada_moe", "llada2_mini"):
        for folder in golden_folders(name):
            if (folder / "weights.safetensors").exists():
                stored = json.loads((folder / "config.json").read_text())
                more = {key: stored[key] for key in ("mask_token_id", "block_length") if key in stored}
                config = {**stored["model"], **stored.get("token_ids", {}), **more}
                found.append(GoldenCheckpoint(folder / "weights.safetensors", config))
    return found


def interleaved() -> list:
    """UniDisc's checkpoint of packed samples."""
    found = [
        pytest.param(c, id=c.path.parent.name) for c in golden_checkpoints() if c.path.parent.name == "interleaved"
    ]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="no golden set is there"))]


@pytest.mark.golden
@pytest.mark.parametrize("checkpoint", cases())
def test_a_family_runs_a_task(checkpoint, tmp_path, run):
    own = checkpoint.vocabulary, checkpoint.words
    write_golden_pipeline(tmp_path / "model", checkpoint.path, checkpoint.config, *own)
    few = ("--model", tmp_path / "model", "--steps", 2)
    tasks = UniDiffPipeline.from_pretrained(tmp_path / "model").layout.tasks
    if "text_to_image" in tasks:
        status, _, error = run("generate", "w1 w2", *few, "--out", tmp_path / "drawn.png")
        assert status == 0, error
        assert min(Image.open(tmp_path / "drawn.png").size) > 1
        if "caption" in tasks and checkpoint.path.parent.name not in NO_QUESTIONS:
            status, _, error = run("caption", tmp_path / "drawn.png", *few, "--max-text-tokens", 2)
            assert status == 0, error
        return
    rows = [{"prompt": "w1 w2", "task": "complete"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, error = run("generate", "--prompts", tmp_path / "rows.jsonl", *few, "--out", tmp_path / "out")
    assert status == 0, error
    assert "error" not in (tmp_path / "out" / "manifest.jsonl").read_text()


@pytest.mark.golden
@pytest.mark.parametrize("checkpoint", interleaved())
def test_rows_without_a_mark_of_pictures_are_refused_in_a_sentence(checkpoint, tmp_path, run):
    write_golden_pipeline(tmp_path / "model", checkpoint.path, checkpoint.config, checkpoint.vocabulary)
    status, _, error = run("generate", "w1", "--model", tmp_path / "model", "--out", tmp_path / "drawn.png")
    assert status == 1 and error.startswith("unidiff: the ids of this unidisc name no mark of pictures")
