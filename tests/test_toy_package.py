"""One new file of every kind: `toy_package` is installed beside unidiff, and its names work in every place that takes one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from train_fixtures import TINY

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(__file__).resolve().parent / "toy_package"
FILES = sorted((PACKAGE / "lab").glob("[a-z]*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_entry_takes_about_thirty_lines(file: Path):
    code = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(code) <= 33


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder with the installed package."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(PACKAGE / "lab", folder / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    groups = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    about = folder / "lab-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run(lab: Path, *words: object) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(lab), str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=lab, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


PYTHON = """
import torch
from unidiff import Modality, ModalityDecoding, SamplerConfig, UniDiffPipeline
from unidiff.decoding.cache.config import CacheConfig

pipe = UniDiffPipeline.from_pretrained("emoji")
pipe.set_progress_bar_config(disable=True)
codes = ModalityDecoding(rule="apart", schedule="quartic", steps=6, block_length=16)
sampler = SamplerConfig(image=codes)
plain = pipe.text_to_image("a fox", sampler=sampler, generator=0, num_candidates=1, record_trajectory=True)
ids = plain.trajectory.ids[:, 0, -64:]
for before, after in zip(ids, ids[1:]):
    filled = before != after
    assert not (filled[1:] & filled[:-1]).any()  # the rule kept neighbours apart
quota = SamplerConfig(image=ModalityDecoding(schedule="quartic", steps=4))
drawn = pipe.text_to_image("a fox", sampler=quota, generator=0, num_candidates=1, record_trajectory=True)
left = [int((step == pipe.settings.vocabulary.image_mask).sum()) for step in drawn.trajectory.ids[:, 0]]
assert left == [64, 20, 4, 1, 0]  # 64 (1 - done)^4, and one for each pass to come
always = pipe.text_to_image("a fox", sampler=quota, generator=0, num_candidates=1, cache=CacheConfig("every-nth", {"interval": 1}))
assert torch.equal(always.ids, drawn.ids)
seldom = pipe.text_to_image("a fox", sampler=quota, generator=0, num_candidates=1, cache="every-nth")
assert seldom.stats.partial_passes > 0
"""


def test_a_rule_a_schedule_and_a_cache_by_name_in_the_pipeline(lab):
    run(lab, "-c", PYTHON)


def test_a_cache_a_metric_and_a_world_on_the_command_line(lab):
    run(lab, "-m", "unidiff", "generate", "a fox", "--cache", "every-nth", "-o", "fox.png")
    assert (lab / "fox.png").is_file()
    out = run(lab, "-m", "unidiff", "eval", "emoji", "--task", "words", "--n", 1, "--json", "words.json")
    assert json.loads((lab / "words.json").read_text())["words"] > 0, out
    run(lab, "-m", "unidiff", "eval", "dots", "--n", 1, "--json", "dots.json")
    assert 0 <= json.loads((lab / "dots.json").read_text())["colour"] <= 1
    run(lab, "-m", "unidiff", "demo", "--world", "dots", "--out", "shown")
    assert (lab / "shown" / "dots.png").is_file()


def test_a_cache_in_the_benchmark(lab):
    out = run(
        lab, ROOT / "inference" / "benchmark.py", "--suite", "smoke", "--only", "every-nth", "--runs", 1,
        "--json", "bench.json",
    )  # fmt: skip
    rows = json.loads((lab / "bench.json").read_text())["rows"]
    assert any("every-nth" in row.values() for row in rows), out


TRAIN = """
import sys
from train_fixtures import tiny_table
from unidiff.train.config import read_config
from unidiff.train.trainer import Trainer
config = read_config(None, sys.argv[2:] + [f"output={sys.argv[1]}"])
assert config.tasks.caption.rate == "quartic"
Trainer(config, tiny_table()).train()
"""


def test_a_schedule_in_a_training_config(lab):
    run(lab, "-c", TRAIN, lab / "run", *TINY, "steps=2", "tasks.caption={weight: 1, rate: quartic, loss: elbo}")
    assert (lab / "run").is_dir()


TOKENIZER = """
import sys, torch
from unidiff.tokens.image.vq import VQImageTokenizer
from lab.tokenizer import Mosaic

Mosaic(factor=8, levels=2).save_pretrained(sys.argv[1])
tokenizer = VQImageTokenizer.from_pretrained(sys.argv[1])
codes = torch.arange(8).view(1, 2, 4)
assert torch.equal(tokenizer.encode(tokenizer.decode(codes)), codes) and tokenizer.codebook_size == 8
"""


def test_an_image_tokenizer_by_its_folder(lab):
    run(lab, "-c", TOKENIZER, lab / "mosaic")


FAMILY = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from unidiff.families import FAMILIES
from unidiff.families.checkpoint.verify import formula_weights
from released_parts import word_tokenizer

folder, lab = Path(sys.argv[1]), FAMILIES["lab"]
folder.mkdir()
save_file(formula_weights(lab), folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps(lab.tiny.config))
"""


def test_a_family_through_info_verify_and_convert(lab):
    run(lab, "-c", FAMILY.replace("from released_parts import word_tokenizer\n", ""), lab / "released")
    assert "lab" in run(lab, "-m", "unidiff", "info", "released")
    run(lab, "-m", "unidiff", "convert", "released", "own")
    assert (lab / "own" / "config.json").is_file()


def test_nothing_of_it_is_known_without_it():
    code = "from unidiff.families import FAMILIES; from unidiff.world import WORLDS; print('lab' in FAMILIES, 'dots' in WORLDS)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"]
