"""EmojiEval of a dual model: what it can do is measured, the rest is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_fixtures import TINY

from unidiff import UniDiffPipeline
from unidiff.evaluation.benchmark.measure import model_hash
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import read_config
from unidiff.train.data.source import TokenTable
from unidiff.train.pretrain import pretrain
from unidiff.worlds.emoji import EMOJI
from unidiff.worlds.emoji.evaluation import ALL_TASKS, run_emoji_eval
from unidiff.worlds.emoji.scenes import SceneGenerator, get_profile
from unidiff.worlds.emoji.table import EmojiScenes, QuestionMix
from unidiff.worlds.judging import usual_tasks
from unidiff.worlds.scene_rows import scene_vocabulary, token_rows

SIZES = (
    "model={num_layers: 1, num_heads: 2, head_dim: 8, text_size: 8, text_layers: 1, text_heads: 2, text_ffn_size: 8}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of a run of one step on emoji scenes."""
    out = tmp_path_factory.mktemp("dual")
    parts = Path(EMOJI.model) / "image_tokenizer", Path(EMOJI.model) / "text_tokenizer"
    images, words = VQImageTokenizer.from_pretrained(parts[0]), TextTokenizer.from_pretrained(parts[1])
    for name, seed in (("train", 0), ("validation", 1)):
        scenes = EmojiScenes(SceneGenerator(get_profile("cpu"), seed), QuestionMix(1, 0, 0))
        rows = token_rows(scenes, 0, 16, images, words, 24, 1)
        TokenTable(rows, scene_vocabulary(words, images.codebook_size)).save(out / f"{name}.safetensors")
    own = [line for line in TINY if not line.startswith("model=")]
    own += [
        "network=dual",
        SIZES,
        "tasks.generate.weight=1",
        "tasks.answer.weight=1",
        "logging.sample_every=0",
        "steps=1",
    ]
    own += [f"data.{name}={out / name}.safetensors" for name in ("train", "validation")]
    own += [f"tokenizer.image={parts[0]}", f"tokenizer.text={parts[1]}", f"output={out / 'run'}"]
    assert pretrain(read_config(None, own), {}) == 0
    return out / "run" / "pipeline"


@pytest.mark.slow
def test_the_command_measures_what_a_dual_model_can_do(run, folder: Path, tmp_path: Path):
    asked = ["eval", folder, "--suite", "emoji", "--n", 1, "--steps", 2]
    status, out, error = run(*asked, "--out", tmp_path / "out", "--json", tmp_path / "a.json", "--outcomes")
    assert status == 0 and "left out, as this model cannot do it: likelihood" in out + error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["about"]["left_out"] == "likelihood"
    assert {"text_to_image", "caption_exact", "answer_accuracy", "inpainting", "joint_agreement"} <= report.keys()
    assert "joint_nelbo" not in report and report["inpainting_untouched"] == 1.0
    status, out, _ = run(*asked, "--task", "caption", "--against", tmp_path / "a.json")
    assert status == 0 and "0.000" in out


def test_what_a_pipeline_can_do(folder: Path):
    dual, masked = UniDiffPipeline.from_pretrained(folder), UniDiffPipeline.from_pretrained("emoji")
    assert usual_tasks(masked, ALL_TASKS) == ALL_TASKS
    assert usual_tasks(dual, ALL_TASKS) == tuple(task for task in ALL_TASKS if task != "likelihood")


def test_the_encoder_that_was_trained_too_counts(folder: Path):
    pipe = UniDiffPipeline.from_pretrained(folder)
    before, parts = model_hash(pipe), (pipe.transformer, pipe.text_encoder)
    report = run_emoji_eval(pipe, n=1, tasks=("caption",), steps=1)
    assert report.about["parameters"] == sum(p.numel() for part in parts for p in part.parameters())
    next(pipe.text_encoder.parameters()).data.add_(1)
    assert model_hash(pipe) != before


def test_likelihoods_of_a_dual_model_are_refused(folder: Path):
    with pytest.raises(ValueError, match="likelihoods are of unidiff's own masked models"):
        run_emoji_eval(UniDiffPipeline.from_pretrained(folder), n=1, tasks=("likelihood",))


def test_what_stays_of_a_picture_of_latents(folder: Path):
    """Outside the hole the codes of a repainted picture are those that were given."""
    pipe = UniDiffPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[:, :32, 16:] = True
    out = pipe.inpaint(list(pictures), list(mask), ["a fox", "a <mask>"], generator=[1, 2], steps=2, output_type="pt")
    given = pipe.images.codes(pipe.images.encode(pictures))
    kept = ~pipe.image_inputs.cells(mask)
    assert kept.any() and torch.equal(out.codes[kept], given[kept])
