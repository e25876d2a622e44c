"""What a run of a dual model would cost: operations by hand, weights and what autograd keeps as in a real pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unidiff.families.family import named_vocabulary
from unidiff.models import block
from unidiff.models.dual_transformer import DualTransformer
from unidiff.tokens.image.vq import CellVQModel
from unidiff.train.config import read_config
from unidiff.train.cost.dual import dual_size, plan_dual, task_shares, watch
from unidiff.train.cost.report import measure_training

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "text_size": 12, "text_layers": 2, "text_heads": 2}
ARGUMENTS = {"vocab_size": 40, "codebook_size": 16, "code_dim": 4, "grid": 4, "text_ffn_size": 20, **SIZES}
TEXT = 64
SMALL = [
    "network=dual",
    "data.vocabulary=unidisc-magvit",
    "data.text_length=32",
    "data.grid=4",
    "steps=100",
    "logging.sample_every=0",
]
MODEL = "model={num_layers: 2, num_heads: 2, head_dim: 8, text_size: 12, text_heads: 2, text_ffn_size: 20}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of as many codes as the declared vocabulary has."""
    folder, codes = tmp_path_factory.mktemp("codes"), named_vocabulary("unidisc-magvit").image_size
    widths = {"encoder_width": 8, "encoder_depth": 1, "decoder_widths": (8,), "decoder_depths": (1,)}
    CellVQModel(2, codebook_size=codes, code_dim=4, **widths).save_pretrained(folder)
    return folder


def test_operations_by_hand():
    d, t, ffn, layers, image = 16, 12, 20, 2, 16
    found = watch(ARGUMENTS, TEXT, 1.0, False, False)
    encoder = 2 * (4 * t * t + 3 * t * ffn) + t * d  # two layers, and into the network
    blocks = layers * 12 * d * d
    once = 256 * d + d * d  # the time
    once += 2 * layers * 6 * d * d + 2 * d * d  # of both streams, and the output
    products = TEXT * (encoder + blocks) + image * (4 * d + blocks + d * 4) + once
    assert found.linear == 2 * products
    assert found.attention == 4 * t * TEXT**2 * 2 + 4 * d * (TEXT + image) ** 2 * layers


@pytest.mark.parametrize("bf16", [False, True])
def test_kept_bytes_are_those_of_a_real_pass(bf16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block, "SCORES", 0)  # attention in one kernel, which keeps no scores
    model, found = DualTransformer(**ARGUMENTS), []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for rows in (4, 12):
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(x, kept=kept):
            place = x.untyped_storage()
            if place.data_ptr() not in weights:
                kept[place.data_ptr()] = place.nbytes(), x
            return x

        latents = torch.zeros(rows, 4, 4, 4)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=bf16):
            model.hidden(torch.zeros(rows, TEXT, dtype=torch.long), latents, torch.zeros(rows))
        found.append(sum(size for size, _ in kept.values()))
    planned = watch(ARGUMENTS, TEXT, 1.0, bf16, False)
    assert planned.kept == pytest.approx((found[1] - found[0]) / 8, rel=0.02)
    again = watch(ARGUMENTS, TEXT, 1.0, bf16, True)
    assert again.kept < planned.kept and again.linear == planned.linear


def test_a_plan_of_a_dual_model(tokenizer: Path):
    config = read_config(None, [*SMALL, MODEL, f"tokenizer.image={tokenizer}", "batch_size=8", "optimiser.name=muon"])
    plan = plan_dual(config, gpus=2)
    model = DualTransformer(**{**ARGUMENTS, "vocab_size": named_vocabulary("unidisc-magvit").text_size + 1})
    assert plan.size.total == sum(p.numel() for p in model.parameters())
    assert (plan.row.text, plan.row.image, plan.rows_per_gpu) == (32, 16, 4)
    plain, again = plan.layouts
    assert plain.mode == again.mode == "ddp" and again.activations < plain.activations
    assert plan.state_bytes == 20 * plan.size.total - 4 * plan.size.matrices
    assert any("TFLOP per step" in line for line in plan.lines(2, 8.0, 1.0))
    with pytest.raises(ValueError, match=r"needs tokenizer\.image"):
        plan_dual(read_config(None, [*SMALL, MODEL]), 1)
    with pytest.raises(ValueError, match="multiple of the 3 GPUs"):
        plan_dual(config, 3)


def test_rows_without_a_picture_and_hidden_words():
    mix = ["tasks.generate.weight=1", "tasks.text_to_image.weight=2", "tasks.caption={weight: 1, dropout: 0.5}"]
    shown, hidden = task_shares(read_config(None, [*SMALL, *mix, "tasks.text.weight=1"]))
    assert shown == pytest.approx(1 - 1.5 / 5) and hidden == pytest.approx(0.5 * 3 / 5)
    both, pictures, words = (watch(ARGUMENTS, TEXT, share, False, False) for share in (0.25, 1.0, 0.0))
    assert both.linear == pytest.approx(0.25 * pictures.linear + 0.75 * words.linear)
    assert words.attention < pictures.attention


def test_sizes_are_those_of_the_model():
    size = dual_size(ARGUMENTS)
    model = DualTransformer(**ARGUMENTS)
    assert size.total == sum(p.numel() for p in model.parameters())
    inside = [p for n, p in model.named_parameters() if "blocks." in n or ".block." in n]
    assert size.blocks == sum(p.numel() for p in inside)
    assert size.matrices == sum(p.numel() for p in inside if p.ndim == 2)


def test_steps_of_a_dual_model_are_not_timed(tokenizer: Path):
    config = read_config(None, [*SMALL, MODEL, f"tokenizer.image={tokenizer}"])
    with pytest.raises(ValueError, match="steps are timed of masked transformers alone"):
        measure_training(config, "x", 1, False, print)


def test_the_command_counts_the_networks_of_a_config(run, tokenizer: Path):
    settings = ["data.vocabulary=unidisc-magvit", "data.grid=8", f"tokenizer.image={tokenizer}"]
    status, out, error = run("plan", "emoji-dual", *settings)
    assert status == 0 and "text + 64 image tokens" in out, error
    status, _, error = run("plan", "emoji-dual")
    assert status == 1 and "declares no data.vocabulary and data.grid" in error
