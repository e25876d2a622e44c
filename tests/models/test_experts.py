"""Mixtures of experts: what the router chooses, sums by hand, tokens apart from each other, layouts, loads, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.models.config import TransformerConfig
from unidiff.models.experts import (
    ListedExperts,
    MixtureOfExperts,
    Routing,
    balance_loss,
    expert_loads,
    idle_weights,
    list_experts,
    mixtures,
    recorded_routings,
    stack_experts,
)
from unidiff.models.transformer import MaskedTransformer

SOFTMAX = dict(num_experts=8, experts_per_token=3, expert_size=12, router_normalised=False)
GROUPS = dict(
    num_experts=12, experts_per_token=3, expert_size=12, router="sigmoid", router_bias="selection", router_groups=4,
    router_top_groups=2, router_scale=2.5, shared_expert_size=20, dense_layers=(0,),
)  # fmt: skip
BOTH = pytest.mark.parametrize("settings", [SOFTMAX, GROUPS], ids=["softmax", "groups"])


def network(settings: dict, **more) -> MaskedTransformer:
    torch.manual_seed(3)
    model = MaskedTransformer(40, hidden_size=16, num_layers=3, num_heads=2, rope="1d", ffn_size=24, **settings, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def inputs(count: int = 30, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, expert by expert, with the rules written out."""
    c, out = layer.router.settings, torch.zeros_like(x)
    for i, token in enumerate(x):
        logits = layer.router.weight @ token
        scores = logits.softmax(0) if c.router == "softmax" else 1 / (1 + (-logits).exp())
        ranked = {
            e: float(scores[e] + (0 if layer.router.bias is None else layer.router.bias[e]))
            for e in range(c.num_experts)
        }
        size = c.num_experts // c.router_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(c.router_groups)]
        groups.sort(key=lambda group: -sum(sorted(ranked[e] for e in group)[-2:]))
        allowed = [e for group in groups[: c.router_top_groups] for e in group]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[: c.experts_per_token]
        total = float(scores[chosen].sum()) if c.router_normalised else 1.0
        for e in chosen:
            gate, up = (layer.experts.up[e] @ token).chunk(2)
            out[i] += c.router_scale * scores[e] / total * (layer.experts.down[e] @ (F.silu(gate) * up))
    return out if layer.shared is None else out + layer.shared(x)


@BOTH
@torch.no_grad()
def test_a_layer_is_the_sum_by_hand(settings):
    layer, x = mixtures(network(settings).double())[0], inputs()
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(x.view(5, 6, 16)), layer(x).view(5, 6, 16))


@BOTH
@torch.no_grad()
def test_one_product_for_all_experts_is_the_same(settings):
    layer, x = mixtures(network(settings))[0], inputs().float()
    routing = layer.router(x)
    torch.testing.assert_close(layer.experts(x, routing, grouped=True), layer.experts(x, routing, grouped=False))


@BOTH
@torch.no_grad()
def test_any_number_of_tokens(settings):
    model = network(settings)
    layer, x = mixtures(model)[0], inputs().float()
    for listed in (False, True):
        torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])
        for shape in ((0, 16), (2, 0, 16), (0, 3, 16)):
            assert layer(torch.zeros(shape)).shape == shape
        if not listed:
            list_experts(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@BOTH
@torch.no_grad()
def test_a_token_does_not_depend_on_the_others(settings, dtype):
    """However many of them want the same expert: none is ever dropped. What is left is the rounding of a product's shape."""
    layer, x = mixtures(network(settings).to(dtype))[0], inputs(64).to(dtype)
    crowd = torch.cat([x, x[:1].expand(200, -1)])  # 201 tokens for the experts of the first
    close = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(crowd)[:64], alone, rtol=close, atol=close)
    torch.testing.assert_close(layer(crowd)[64:], alone[:1].expand(200, -1), rtol=close, atol=close)


@torch.no_grad()
def test_the_router_counts_in_float32_in_any_model():
    layer = mixtures(network(GROUPS))[0]
    exact, x = layer.router(inputs().bfloat16().float()), inputs().bfloat16()
    layer.router.weight.data = layer.router.weight.data.bfloat16().float()
    exact = layer.router(x.float())
    layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.router(x)
    assert found.scores.dtype == torch.float32 == found.weights.dtype
    torch.testing.assert_close(found.scores, exact.scores, rtol=0, atol=0)


@torch.no_grad()
def test_a_bias_steers_the_choice_and_may_weigh():
    x = inputs()
    for kind, normalised in (("selection", False), ("weights", True), ("weights", False)):
        settings = {**SOFTMAX, "router_bias": kind, "router_normalised": normalised}
        router = mixtures(network(settings).double())[0].router
        router.bias.zero_()
        router.bias[5] = 10.0  # wanted by all
        routing = router(x)
        place = (routing.experts == 5).nonzero()[:, 1]
        assert len(place) == len(x)
        weight = routing.weights[torch.arange(len(x)), place]
        p = routing.scores[:, 5] + (10 if kind == "weights" else 0)
        rest = routing.scores.gather(1, routing.experts).sum(1) + (
            10 + float(router.bias.sum()) - 10 if kind == "weights" else 0
        )
        torch.testing.assert_close(weight, p / rest if normalised else p)


@BOTH
def test_gradients_reach_router_experts_and_inputs(settings):
    layer = mixtures(network(settings).double())[0]
    x = inputs(9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *_: layer(x), (x, layer.experts.up, layer.experts.down, layer.router.weight)
    )
    listed = network(settings).double()
    list_experts(listed)
    other = mixtures(listed)[0]
    assert isinstance(other.experts, ListedExperts)
    layer.zero_grad()
    y, z = inputs(9).requires_grad_(), inputs(9).requires_grad_()
    layer(y).square().sum().backward()
    other(z).square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad)
    for e, network_of in enumerate(other.experts):
        torch.testing.assert_close(network_of.up.weight.grad, layer.experts.up.grad[e])  # zeros where no token was


@BOTH
@torch.no_grad()
def test_listed_experts_and_back(settings):
    model, x = network(settings), inputs().float()
    layer, names = mixtures(model)[0], list(model.state_dict())
    before, weights = layer(x), {n: v.clone() for n, v in model.state_dict().items()}
    held = layer.experts.up.data_ptr()
    list_experts(model)
    assert layer.experts[0].up.weight.data_ptr() == held  # the same memory
    torch.testing.assert_close(layer(x), before)
    stack_experts(model)
    assert list(model.state_dict()) == names
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())


def test_loads_and_the_loss_that_evens_them():
    experts = torch.tensor([[0, 1], [0, 1], [2, 3], [0, 2]])
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(4, 1).requires_grad_()
    routing = Routing(experts, torch.ones(4, 2), scores)
    real = torch.tensor([True, True, True, False])
    assert expert_loads([routing], real).tolist() == [[2, 2, 1, 1]]
    expected = 4 * (2 / 6 * 0.4 + 2 / 6 * 0.3 + 1 / 6 * 0.2 + 1 / 6 * 0.1)
    assert balance_loss([routing], real).item() == pytest.approx(expected)
    even = Routing(torch.tensor([[0], [1], [2], [3]]), torch.ones(4, 1), torch.full((4, 4), 0.25))
    assert float(balance_loss([even], torch.ones(4, dtype=torch.bool))) == pytest.approx(1)
    balance_loss([routing], real).backward()
    assert float(scores.grad[3].abs().sum()) == 0  # padding


def test_a_mixture_is_evened_out_by_its_loss():
    """Tokens that all want the same experts: the loss alone spreads them."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(TransformerConfig(9, hidden_size=16, num_heads=2, **SOFTMAX))
    x, real = torch.randn(256, 16) + 1.5, torch.ones(256, dtype=torch.bool)
    with torch.no_grad():
        layer.router.weight[:3] += 0.2
    optimiser = torch.optim.Adam(layer.router.parameters(), 1e-2)
    busiest = []
    for _ in range(150):
        routing = layer.router(x)
        loads = expert_loads([routing], real)[0]
        busiest.append(float(8 * loads.max() / loads.sum()))
        optimiser.zero_grad()
        balance_loss([routing], real).backward()
        optimiser.step()
    assert busiest[0] > 2.5 and busiest[-1] < 1.5


def test_routings_are_recorded_inside_the_block_alone():
    model, ids = network(GROUPS), torch.arange(12).view(2, 6)
    args = ids, torch.zeros_like(ids), torch.arange(6)[:, None].expand(2, 6, 3)
    with recorded_routings(model) as found:
        model.hidden(*args)
    model.hidden(*args)
    assert len(found) == 2  # the first of three layers is dense
    assert all(r.experts.shape == (12, 3) for r in found)


def test_operations_and_weights_count_the_experts_that_work():
    model = network(GROUPS)
    dense, mixed = model.traits.layers[:2]
    assert dense.feed_forward == 2 * 3 * 16 * 24
    assert mixed.feed_forward == 2 * (16 * 12 + 3 * 16 * (3 * 12 + 20))
    assert idle_weights(model) == 2 * (12 - 3) * 3 * 16 * 12
    list_experts(model)
    assert idle_weights(model) == 2 * (12 - 3) * 3 * 16 * 12
    assert idle_weights(network({})) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_experts=4), "needs expert_size"),
        (dict(num_experts=4, expert_size=8, activation="gelu"), "experts are SwiGLU networks"),
        (dict(num_experts=4, expert_size=8, ffn_bias=True), "experts are SwiGLU networks"),
        (dict(num_experts=6, expert_size=8, router_groups=4), "router_groups = 4 must divide num_experts = 6"),
        (dict(num_experts=6, expert_size=8, router_groups=2, router_top_groups=3), "be no more than that"),
        (dict(num_experts=6, expert_size=8, router_groups=3, experts_per_token=3), "may choose from 2 experts"),
        (dict(rope_share=0.25), "expected a multiple of"),
        (dict(head_size=7), "a head has 7 features"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(9, hidden_size=16, num_heads=4, **settings)


RANKS = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from models.test_experts import SOFTMAX, GROUPS, network
from unidiff.models.parallel import spread
ids = torch.arange(22).view(2, 11)
args = ids, torch.zeros_like(ids), torch.arange(11)[:, None].expand(2, 11, 3)
found = []
for settings in (SOFTMAX, GROUPS):
    model = spread(network(settings, num_kv_heads=2))
    experts = model.blocks[1].feed_forward.experts
    assert experts.up.to_local().shape[0] * 2 == experts.count == settings["num_experts"]
    assert experts.first == torch.distributed.get_rank() * experts.count // 2
    with torch.no_grad():
        found.append(model.hidden(*args))
torch.save(found, f"{sys.argv[3]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_experts(tmp_path):
    tests = Path(__file__).parents[1]
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command += [str(tmp_path / "ranks.py"), str(tests), str(tests / "models"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(22).view(2, 11)
    args = ids, torch.zeros_like(ids), torch.arange(11)[:, None].expand(2, 11, 3)
    for rank in range(2):
        for settings, found in zip((SOFTMAX, GROUPS), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(found, network(settings, num_kv_heads=2).hidden(*args), rtol=1e-4, atol=1e-5)


def test_experts_that_cannot_be_shared(monkeypatch):
    from torch.distributed.device_mesh import DeviceMesh

    from unidiff.models.parallel import spread

    class Three(DeviceMesh):
        def __init__(self) -> None: ...
        def size(self, mesh_dim=None) -> int:
            return 3

    with pytest.raises(ValueError, match="8 num_experts, which 3 processes cannot share"):
        spread(MaskedTransformer(9, hidden_size=24, num_heads=3, rope="1d", ffn_size=24, **SOFTMAX), Three())
