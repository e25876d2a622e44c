"""Adapters: what they change, what they leave alone, and what folding them in gives."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from train_fixtures import tiny_config, tiny_table

from unidiff.models.transformer import MaskedTransformer
from unidiff.train.build import LAYERS, add_adapters, merge_adapters
from unidiff.train.config import LoraConfig
from unidiff.train.cost.plan import adapter_parameters
from unidiff.train.optim import learning_rate_factor
from unidiff.train.trainer import Trainer

pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft (the `finetune` extra) is not installed"),
]


EXPERTS = dict(num_experts=4, experts_per_token=2, expert_size=12, shared_expert_size=8, dense_layers=(0,))
EITHER = pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])


def network(**more) -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(vocab_size=49, hidden_size=32, num_layers=2, num_heads=2, qk_norm="head", **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)  # fresh blocks are silent, and an adapter inside one would be too
    return model


def states(model: MaskedTransformer) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        return model.hidden(ids, torch.zeros_like(ids), torch.arange(10)[:, None].expand(2, 10, 3))


@EITHER
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [[], ["qkv", "down"]])
def test_fresh_adapters_are_silent_and_merged_ones_say_the_same(dora, targets, experts):
    model = network(**experts)
    before, names = states(model), [n for n, _ in model.named_parameters()]
    add_adapters(model, LoraConfig(rank=4, dora=dora, targets=targets))
    torch.testing.assert_close(states(model), before, rtol=1e-5, atol=1e-6)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    layers = {n.split(".lora_")[0].split(".", 2)[2] for n in trained}
    wanted = [LAYERS[t] for t in targets or LAYERS]
    assert all(any(re.fullmatch(place, layer) for place in wanted) for layer in layers)
    assert all(any(re.fullmatch(place, layer) for layer in layers) for place in wanted)
    with torch.no_grad():
        for name in trained:
            parameter = model.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    changed = states(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    merge_adapters(model)
    torch.testing.assert_close(states(model), changed, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_rank_zero_changes_nothing_and_an_unknown_layer_is_refused():
    model = network()
    names = [n for n, _ in model.named_parameters()]
    add_adapters(model, LoraConfig())
    merge_adapters(model)
    assert [n for n, _ in model.named_parameters()] == names
    silent = MaskedTransformer(vocab_size=49, hidden_size=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="needs trained weights"):
        add_adapters(silent, LoraConfig(rank=2, dora=True))
    with pytest.raises(ValueError, match=r"lora.targets has 'gate'"):
        add_adapters(model, LoraConfig(rank=2, targets=["gate"]))


@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_run_trains_adapters_alone_resumes_and_exports_plain_weights(tmp_path, dora):
    base = tiny_config(tmp_path / "base", "steps=5", "checkpoint.export_dtype=float32")
    Trainer(base, tiny_table()).train()

    def config(folder, steps):
        overrides = ["lora.rank=4", f"lora.dora={dora}", "lora.dropout=0.1", "precision=fp32", f"steps={steps}"]
        overrides.append(f"checkpoint.init_from={tmp_path / 'base' / 'model'}")
        return tiny_config(tmp_path / folder, *overrides, "ema.decay=0.5", "checkpoint.export_dtype=float32")

    whole = Trainer(config("whole", 6), tiny_table())
    start = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    moved = {n for n, p in whole.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved and all("lora_" in n for n in moved)
    count = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert count == adapter_parameters(config("whole", 6))

    first = Trainer(config("cut", 6), tiny_table())
    for _ in range(3):
        first.step(learning_rate_factor(first.config.schedule, first.state.step, 6))
    first.save()
    second = Trainer(config("cut", 6), tiny_table())
    assert second.resumed and second.state.step == 3
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    exported = MaskedTransformer.from_pretrained(tmp_path / "whole" / "model")
    assert not [n for n, _ in exported.named_parameters() if "lora" in n or "base_layer" in n]
    assert all(
        torch.equal(start[n], a) for n, a in whole.state.ema.average.items() if "lora_" not in n
    )  # no export merged it
    with whole.state.ema.applied():
        whole.model.eval()
        torch.testing.assert_close(states(exported), states(whole.model), rtol=1e-4, atol=1e-5)
    assert not torch.equal(states(exported), states(Trainer(config("fresh", 1), tiny_table()).averaged()))
