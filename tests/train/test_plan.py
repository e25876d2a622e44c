"""The planner against hand counts, and its memory count against what autograd really keeps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from unidiff.families.family import named_vocabulary
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch
from unidiff.train.build import add_adapters
from unidiff.train.config import LoraConfig, TaskConfig, read_config
from unidiff.train.cost.plan import (
    GIB,
    adapter_parameters,
    block_activation_bytes,
    block_causal_pairs,
    make_plan,
    mean_rate,
    row_shape,
)
from unidiff.train.data.tasks import block_visibility

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model={hidden_size: 64, num_layers: 3, num_heads: 2, ffn_size: 128, activation: gelu}", "batch_size=16"]
SMALL += ["data.vocabulary=unidisc-magvit", "data.text_length=32", "data.grid=8", "steps=1000"]


def test_a_plan_by_hand():
    plan = make_plan(read_config(None, [*SMALL, "accumulate=2"]), gpus=4)
    d, length, rows = 64, 32 + 64, 32
    linear = 3 * (d * 3 * d + d * d + 2 * d * 128)
    total = linear + 3 * 2 * d + (40193 + 2) * d + 40193 * d + d  # blocks, norms, embeddings, head, final norm
    assert plan.size.total == total and plan.state_bytes == 20 * total
    assert (plan.rows_per_step, plan.rows_per_gpu) == (rows, 4)
    head = 3 * 2 * d * 0.5 * (32 * 32000 + 64 * 8192)
    expected = rows * (3 * 2 * length * linear + 3 * 4 * d * length**2 * 3 + head)
    assert plan.step_flops == pytest.approx(expected)
    assert plan.days(4, 1e12) == pytest.approx(1000 * expected / 4e12 / 86400)


def test_spreading_saves_what_it_should_and_the_first_that_fits_is_named():
    config = read_config(None, [*SMALL, "batch_size=64"])
    plan = make_plan(config, gpus=16)
    names = [layout.settings for layout in plan.layouts]
    assert names[0] == "parallel.mode=ddp" and "parallel.mode=fsdp parallel.replicas=2" in names
    by_name = dict(zip(names, plan.layouts, strict=True))
    whole, sharded = by_name["parallel.mode=ddp"], by_name["parallel.mode=fsdp"]
    hybrid = by_name["parallel.mode=fsdp parallel.replicas=2"]
    assert hybrid.weights - sharded.weights == plan.state_bytes // 8 - plan.state_bytes // 16
    assert sharded.activations == whole.activations
    frugal = by_name["parallel.mode=ddp activation_checkpointing=full"]
    per_token = block_activation_bytes(config.model)
    assert frugal.activations == 4 * 96 * (4 * 64 * 3 + per_token) < whole.activations == 4 * 96 * 3 * per_token
    assert plan.fitting(whole.total) == whole and plan.fitting(0) is None
    between = plan.fitting(whole.total - 1)
    assert between is not None and between.total < whole.total


def test_eight_bits_of_state_are_counted_and_kept_whole():
    plan = make_plan(read_config(None, [*SMALL, "batch_size=64", "optimiser.state_bits=8"]), gpus=16)
    assert plan.state_bytes == 14 * plan.size.total + round(plan.size.total / 32)
    assert all("fsdp" not in layout.settings for layout in plan.layouts)
    muon = make_plan(read_config(None, [*SMALL, "optimiser.state_bits=8", "optimiser.name=muon"]), gpus=1)
    assert muon.state_bytes - plan.state_bytes == round(plan.size.block_linear * (2 - 1 / 32))


SANDWICH = dict(activation="gelu_tanh", qk_norm="width", qk_norm_type="layer_bias", sandwich_norm=True, ffn_bias=True)
GROUPED = dict(activation="swiglu", qk_norm="head", qk_norm_type="layer", num_kv_heads=2)
EXPERTS = ["model.activation=swiglu", "model.num_experts=4", "model.expert_size=24", "model.shared_expert_size=8"]
MIXTURE = dict(num_experts=8, experts_per_token=3, expert_size=128, shared_expert_size=64, num_kv_heads=2)


# On a CPU autocast leaves norms of bf16 values in bf16; a GPU makes float32 copies, which the plan counts.
@pytest.mark.parametrize(
    ("model", "bf16"), [({"activation": "gelu"}, True), (GROUPED, False), (SANDWICH, False), (MIXTURE, False)]
)
def test_activations_are_what_autograd_keeps(model, bf16):
    # torch's RMS norm is composed of several operations on a CPU and fused on a GPU; its layer norm is fused on both
    settings = dict(hidden_size=64, num_heads=4, ffn_size=256, norm="layer") | model
    rows, length, kept = 2, 24, []
    ids, modality = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    positions = torch.zeros(rows, length, 3, dtype=torch.long)
    for layers in (1, 3):
        network = MaskedTransformer(vocab_size=8, num_layers=layers, **settings)
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        stored = {}

        def keep(x, stored=stored, weights=weights):
            if x.untyped_storage().data_ptr() not in weights and x.is_floating_point():
                stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=bf16):
            mask = torch.ones(rows, 1, length, length, dtype=torch.bool)  # the fused attention, as on a GPU
            network.hidden(ids, modality, positions, mask)
        kept.append(sum(stored.values()))
    copies = 2 if bf16 else 0  # autocast's bf16 weights
    linear = sum(m.weight.numel() for m in network.blocks[0].modules() if isinstance(m, torch.nn.Linear))
    measured = ((kept[1] - kept[0]) / 2 - copies * linear) / (rows * length)
    assert block_activation_bytes(settings, bf16) == pytest.approx(measured, rel=0.1)


def test_mean_rates_and_the_hidden_share_of_a_mixture():
    for rate, mean in {"uniform": 1 / 2, "cosine": 2 / math.pi, "high": 5 / 6, "beta": 3 / 4}.items():
        task = TaskConfig(weight=1, rate=rate, beta=3.0)
        assert mean_rate(task) == pytest.approx(mean, abs=1e-6)
    config = read_config(None, [*SMALL, "tasks.generate.weight=0", "tasks.text_to_image={weight: 1, rate: high}"])
    row = row_shape(config, named_vocabulary("unidisc-magvit"))
    image, text = 64 * 8192, 32 * 32000
    assert row.hidden_share == pytest.approx(5 / 6 * image / (image + text))


def test_block_diffusion_sends_every_token_through_the_blocks_twice():
    plain = make_plan(read_config(None, SMALL), 1)
    causal = make_plan(read_config(None, [*SMALL, "model.attention=block_causal", "model.block_length=8"]), 1)
    assert causal.flops.blocks == 2 * plain.flops.blocks and causal.flops.head == plain.flops.head
    assert causal.flops.attention == plain.flops.attention / 96**2 * 2 * block_causal_pairs(96, 8)
    assert causal.layouts[0].activations == 2 * plain.layouts[0].activations
    doubled = block_visibility(TokenBatch.from_spans([[Span.text(torch.zeros(96, dtype=torch.long))]]), 8).dense()
    assert int(doubled.sum()) == 2 * block_causal_pairs(96, 8)


def test_adapters_by_hand():
    config = read_config(None, [*SMALL, "lora.rank=4"])
    assert config.lora == LoraConfig(rank=4)
    d, inner = 64, 128
    assert adapter_parameters(config) == 3 * 4 * ((d + 3 * d) + 2 * d + (d + inner) + (inner + d))
    config = read_config(None, [*SMALL, *EXPERTS, "lora.rank=4"])
    model = MaskedTransformer(9, **config.model)
    pytest.importorskip("peft")
    add_adapters(model, config.lora)
    assert adapter_parameters(config) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_plan_says_how_much_works_for_a_token():
    plan = make_plan(read_config(None, [*SMALL, *EXPERTS]), 1)
    assert plan.size.total - plan.size.active == 3 * 3 * 3 * 64 * 24
    assert f"{plan.size.active / 1e6:.1f} M active for a token" in next(
        plan.lines(1, None, None)
    )  # the other three of four are idle
    muon = make_plan(read_config(None, [*SMALL, *EXPERTS, "optimiser.name=muon"]), 1)
    assert plan.state_bytes - muon.state_bytes == 4 * plan.size.matrices  # stacked experts are left to AdamW


def test_the_command_prints_what_fits_and_refuses_nonsense(capsys):
    spec = importlib.util.spec_from_file_location("plan_recipe", ROOT / "training" / "plan.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = str(ROOT / "configs" / "unidisc-small.yaml")
    assert recipe.main([config, "--gpus", "8", "--memory", "40", "--tflops", "200"]) == 0
    out = capsys.readouterr().out
    assert "159.4 M" in out and "fits         40 GiB with parallel.mode=ddp" in out and "days" in out
    assert recipe.main([config, "--memory", "0.1"]) == 0 and "nothing in 0.1 GiB" in capsys.readouterr().out
    assert recipe.main([config, "--gpus", "7"]) == 2 and "multiple of the 7 GPUs" in capsys.readouterr().err
    assert recipe.main([str(ROOT / "configs" / "own.yaml")]) == 2 and "declares no" in capsys.readouterr().err
    assert make_plan(read_config(config), 1).state_bytes / GIB == pytest.approx(2.97, abs=0.01)
