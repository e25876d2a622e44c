"""Parallel greedy decoding (Fast-dLLM's theorem): with (n + 1) eps <= 1 it equals every sequential greedy order."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from golden import golden_folders
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_model import TableModel, joint_tensor

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig


def theorem_cases() -> list:
    cases = []
    for folder in golden_folders("toy_exact"):
        data = json.loads((folder / "toy_exact.json").read_text())
        for i, case in enumerate(data["parallel_greedy"]["cases"]):
            cases.append(pytest.param(case, id=f"{folder.name}-{i}-{case['kind']}"))
    return cases or [pytest.param({}, marks=pytest.mark.skip(reason="golden/toy_exact is absent"))]


def decode(joint: Tensor, seeds: int = 1, **rule: object) -> set[tuple[int, ...]]:
    """All strings that greedy decoding with this rule gives, over several seeds."""
    model = TableModel.from_joint(joint)
    config = SamplerConfig(text=ModalityDecoding(temperature=0.0, **rule))
    out = Sampler(model, model.vocabulary, config)(model.request(seeds), torch.arange(seeds))
    return {tuple(row) for row in out.batch.ids.tolist()}


def marginals(joint: Tensor) -> list[Tensor]:
    return [joint.sum([d for d in range(joint.ndim) if d != place]) for place in range(joint.ndim)]


def product_of(parts: list[Tensor]) -> Tensor:
    product = torch.ones((), dtype=torch.float64)
    for part in parts:
        product = product[..., None] * part
    return product


def argmax_set(joint: Tensor) -> set[tuple[int, ...]]:
    best = joint.max()
    return {s for s in itertools.product(range(joint.shape[0]), repeat=joint.ndim) if joint[s] >= best - 1e-12}


@pytest.mark.golden
@pytest.mark.parametrize("case", theorem_cases())
def test_theorem_cases(case: dict) -> None:
    strings = case["joint"] if "joint" in case else case["support"]
    size = case.get("V", 1 + max(int(c) for s in strings for c in s))
    joint = joint_tensor(strings, size)
    n = case["n"]
    assert joint.ndim == n and joint.sum().item() == pytest.approx(1, abs=1e-12)
    singles = marginals(joint)
    product = product_of(singles)
    parallel = decode(joint, rule="threshold", threshold=-1.0)  # all positions at once
    assert parallel == {tuple(int(m.argmax()) for m in singles)}
    if case["kind"] == "guaranteed":
        star = tuple(int(c) for c in case["x_star"])
        eps = max(1 - m.max().item() for m in singles)
        assert eps == pytest.approx(float(Fraction(case["max_one_minus_confidence"])), abs=1e-12)
        assert (n + 1) * eps == pytest.approx(case["n_plus_1_times_eps"], abs=1e-10) and (n + 1) * eps < 1
        sequential = decode(joint, seeds=40, rule="first_hitting")  # a random order per seed
        by_confidence = decode(joint, rule="quota", schedule="fixed", steps=n)
        by_threshold = decode(joint, rule="threshold", threshold=1 - eps - 1e-9)
        by_factor = decode(joint, rule="factor", factor=1.0)
        assert parallel == sequential == by_confidence == by_threshold == by_factor == {star} == argmax_set(joint)
        assert case["every_sequential_greedy_order_gives_x_star"] is True
        distance = (joint - product).abs().sum().item()
        divergence = torch.special.xlogy(joint, joint / product).nansum().item()
        assert distance == pytest.approx(case["l1"], abs=1e-10) and distance <= case["l1_bound"]
        assert distance / 2 == pytest.approx(case["tv"], abs=1e-10) and distance / 2 <= case["tv_bound"]
        assert divergence == pytest.approx(case["kl"], abs=1e-10) and divergence <= case["kl_bound"]
        assert case["l1_bound"] == pytest.approx(case["tv_bound"] * 2, abs=1e-10)
    elif case["kind"] == "counterexample":
        eps, eta = Fraction(case["epsilon"]), Fraction(case["eta"])
        assert eps > Fraction(1, n + 1) and eta == (eps - Fraction(1, n + 1)) / (n + 1)
        confidence = min(m.max().item() for m in singles)
        assert confidence == pytest.approx(float(Fraction(case["marginal_of_0"])), abs=1e-12)
        assert confidence > 1 - float(eps)
        assert parallel == {tuple(int(c) for c in case["argmax_product"])}
        assert bool(parallel & argmax_set(joint)) is case["argmax_joint_contains_product_argmax"] is False
        assert (
            decode(joint, rule="threshold", threshold=1 - float(eps)) == parallel
        )  # the rule accepts them all: above the bound it errs
    else:
        divergence = torch.special.xlogy(joint, joint / product).nansum().item()
        assert divergence == pytest.approx(case["kl"], abs=1e-10)
        assert divergence > case["stated_bound"] and case["epsilon"] > 1 - 1 / size


@given(st.integers(2, 4), st.integers(2, 3), st.integers(0, 2**31), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_below_the_bound_parallel_equals_sequential(n: int, size: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    joint = torch.rand((size,) * n, generator=generator, dtype=torch.float64) ** 3
    star = tuple(torch.randint(size, (n,), generator=generator).tolist())
    joint[star] = 0
    joint *= share / (n + 1) / joint.sum()  # every marginal is off its mode by less than 1 / (n + 1)
    joint[star] = 1 - joint.sum()
    eps = max(1 - m.max().item() for m in marginals(joint))
    assert (n + 1) * eps <= 1
    assert decode(joint, rule="threshold", threshold=1 - eps - 1e-12) == {star}
    assert decode(joint, seeds=12, rule="first_hitting") == {star}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_bound_is_tight(n: int) -> None:
    """Just above eps = 1 / (n + 1) there is a joint whose parallel argmax is not among its modes."""
    eps = 1 / (n + 1) + 0.01
    eta = (eps - 1 / (n + 1)) / (n + 1)
    joint = torch.zeros((2,) * n, dtype=torch.float64)
    joint[(0,) * n] = 1 / (n + 1) - eta
    for place in range(n):
        joint[tuple(int(p == place) for p in range(n))] = 1 / (n + 1) + eta / n
    assert math.isclose(joint.sum().item(), 1)
    assert min(m.max().item() for m in marginals(joint)) > 1 - eps
    assert decode(joint, rule="threshold", threshold=1 - eps) == {(0,) * n}
    assert (0,) * n not in argmax_set(joint)
