"""Every family with a checkpoint in the golden sets runs a task from the command line on it: words or pictures, of random weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from golden import golden_folders, golden_root
from golden_pipelines import (
    write_golden_ddit,
    write_golden_interleaved,
    write_golden_llada_v,
    write_golden_muddit,
    write_golden_pipeline,
)
from PIL import Image
from released_parts import GoldenCheckpoint, golden_checkpoints
from released_pipelines import write_chat

from unidiff.families.family import FAMILIES
from unidiff.pipeline import UniDiffPipeline

NO_QUESTIONS = {"m"}  # sets without the marks of questions
# folders of more than a network, networks that are no pipeline, and ids without a mark of pictures; see `FAMILIES_RUN`
WHOLE = {"muddit", "llamagen_vq", "magvitv2", "llada_v", "interleaved"}
Write = Callable[[Path], None]


def of_set(name: str) -> Write:
    """Writes the pipeline of the checkpoint in the golden folder of this name."""

    def write(folder: Path) -> None:
        found = {c.path.parent.name: c for c in (*golden_checkpoints(), *with_experts())}[name]
        write_golden_pipeline(folder, found.path, found.config, found.vocabulary, found.words)

    return write


def of_folder(name: str, write: Callable[..., None], *more: str) -> Write:
    """Writes the pipeline of a golden folder of several parts."""
    return lambda folder: write(folder, golden_root() / name, *more)


# by the README's name: the family, its folder, and whether only this table runs it
FAMILIES_RUN: dict[str, tuple[str, Write, bool]] = {
    "UniDisc": ("unidisc", of_set("static"), False),
    "UniDisc, interleaved": ("unidisc", of_folder("unidisc/interleaved", write_golden_interleaved), True),
    "MDLM": ("mdlm", of_set("mdlm"), False),
    "LLaDA": ("llada", of_set("llada"), False),
    "LLaDA-MoE": ("llada-moe", of_set("llada_moe"), False),
    "LLaDA2": ("llada2", of_set("llada2_mini"), False),
    "LLaDA2.0-Uni": ("llada2-uni", of_set("llada2_uni"), False),
    "LLaDA-V": ("llada-v", of_folder("llada_v", write_golden_llada_v), True),
    "Dream": ("dream", lambda folder: write_chat(folder, "dream") and None, True),  # no set: its tiny model
    "MMaDA": ("mmada", of_set("mmada"), False),
    "MMaDA-Parallel": ("lumina", of_set("a"), False),
    "Dynin-Omni": ("dynin", of_set("dynin"), False),
    "Lumina-DiMOO": ("lumina", of_set("ml_cache"), False),
    "Muddit": ("muddit", of_folder("muddit", write_golden_muddit, "transformer"), True),
    "Meissonic": ("meissonic", of_folder("muddit", write_golden_muddit, "transformer_meissonic"), True),
    "D-DiT": ("ddit", of_folder("ddit", write_golden_ddit), True),
}


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


@pytest.mark.golden
@pytest.mark.parametrize("checkpoint", cases())
def test_a_family_runs_a_task(checkpoint, tmp_path, run):
    own = checkpoint.vocabulary, checkpoint.words
    write_golden_pipeline(tmp_path / "model", checkpoint.path, checkpoint.config, *own)
    check_task(tmp_path, run, asks=checkpoint.path.parent.name not in NO_QUESTIONS)


def check_task(folder: Path, run: Callable[..., tuple[int, str, str]], asks: bool = True) -> None:
    """A picture and with `asks` its caption, the caption of a given picture, or the end of a text, by the pipeline in `model`."""
    few, drawn = ("--model", folder / "model", "--steps", 2), folder / "drawn.png"
    tasks = UniDiffPipeline.from_pretrained(folder / "model").layout.tasks
    if "text_to_image" in tasks:
        status, _, error = run("generate", "w1 w2", *few, "--out", drawn)
        assert status == 0, error
        assert min(Image.open(drawn).size) > 1
    elif "caption" in tasks:
        Image.linear_gradient("L").convert("RGB").save(drawn)
    if "caption" in tasks:
        if asks:
            status, _, error = run("caption", drawn, *few, "--max-text-tokens", 2)
            assert status == 0, error
        return
    if "text_to_image" in tasks:
        return
    rows = [{"prompt": "w1 w2", "task": "complete"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, error = run("generate", "--prompts", folder / "rows.jsonl", *few, "--out", folder / "out")
    assert status == 0, error
    assert "error" not in (folder / "out" / "manifest.jsonl").read_text()


def command(*arguments: object) -> tuple[int, str, str]:
    """A command in a process of its own: (exit status, stdout, stderr)."""
    line = [sys.executable, "-m", "unidiff", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=550)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.golden
@pytest.mark.parametrize("name", [name for name, (_, _, only) in FAMILIES_RUN.items() if only])
def test_a_family_of_several_parts_runs_a_task(name, tmp_path, run):
    write(tmp_path, name)
    check_task(tmp_path, run)


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES_RUN)
def test_every_family_runs_a_task_as_a_program(name, tmp_path):
    write(tmp_path, name)
    check_task(tmp_path, command)


def write(folder: Path, name: str) -> None:
    if not golden_root().is_dir():
        pytest.skip("no golden set is there")
    FAMILIES_RUN[name][1](folder / "model")


def test_every_family_of_the_readme_and_of_the_library_has_its_row():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"\| ([^|]*) in one pipeline", readme)
    assert set(re.split(r", | and ", line)) <= set(FAMILIES_RUN)
    assert {name for name, family in FAMILIES.items() if family.layout} == {row[0] for row in FAMILIES_RUN.values()}


@pytest.mark.golden
def test_rows_without_a_mark_of_pictures_are_refused_in_a_sentence(tmp_path, run):
    if not (golden_root() / "unidisc" / "interleaved").is_dir():
        pytest.skip("golden set unidisc/interleaved is not there")
    of_set("interleaved")(tmp_path / "model")
    status, _, error = run("generate", "w1", "--model", tmp_path / "model", "--out", tmp_path / "drawn.png")
    assert status == 1 and error.startswith("unidiff: the ids of this unidisc name no mark of pictures")
