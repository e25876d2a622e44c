"""Schedules: derivative, inverse, stability at both ends; and the ways of drawing times."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.times import importance_times, importance_weight, sample_times

from unidiff.diffusion import keyed_uniform
from unidiff.diffusion.schedules import SCHEDULES, get_schedule

CASES = {
    "linear": {},
    "loglinear": {"eps": 1e-3},
    "cosine": {},
    "mdlm_cosine": {"eps": 1e-3},
    "mdlm_cosine_squared": {"eps": 1e-3},
    "geometric": {"sigma_min": 1e-3, "sigma_max": 8.0},
    "sigma_linear": {"sigma_min": 1e-3, "sigma_max": 7.0},
    "polynomial": {"power": 2.0},
    "arccos": {},
    "square": {},
    "root": {},
}
CHECKED = [get_schedule(name, **kwargs) for name, kwargs in CASES.items()] + [get_schedule("polynomial", power=0.5)]
schedules = st.sampled_from([*CHECKED, get_schedule("high")])
times = st.floats(1e-6, 1 - 1e-6)


@given(schedules, times)
@settings(max_examples=300, deadline=None)
def test_derivative_weight_and_inverse(schedule, value):
    t = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    alpha, rate = schedule.alpha(t), schedule.mask_rate(t)
    (derivative,) = torch.autograd.grad(alpha, t, retain_graph=True)
    torch.testing.assert_close(schedule.dalpha(t), derivative, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alpha + rate, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.weight(t), -derivative / rate, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(schedule.inverse_rate(rate), t, rtol=1e-9, atol=1e-10)
    (noise,) = torch.autograd.grad(schedule.sigma(t), t, retain_graph=True)
    torch.testing.assert_close(schedule.dsigma(t), noise, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(schedule.sigma(t), -alpha.log(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("schedule", CHECKED, ids=str)
def test_float32_weights_hold_at_the_ends(schedule):
    """Relative error of every float32 value against float64, down to t = 1e-6: no cancellation anywhere."""
    t = torch.cat([torch.logspace(-6, -1, 60), torch.linspace(0.1, 0.999, 40)])
    for method in ("weight", "mask_rate", "dalpha"):
        single = getattr(schedule, method)(t)
        double = getattr(schedule, method)(t.double())
        assert single.dtype == torch.float32
        error = (single.double() / double - 1).abs().max()
        assert error < 3e-5, f"{method}: {error}"


def test_cosine_formula_without_the_half_angle_would_fail():
    """The reason for the forms used: the direct float32 cosine weight is off by percents at small t."""
    schedule, t = get_schedule("mdlm_cosine"), torch.tensor(5e-4)
    direct = -schedule.dalpha(t) / (1 - (1e-3 + (1 - 1e-3) * torch.cos(math.pi / 2 * t)))
    assert abs(float(direct / schedule.weight(t.double())) - 1) > 0.01


@pytest.mark.parametrize("schedule", CHECKED, ids=str)
def test_alpha_falls(schedule):
    alpha = schedule.alpha(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert bool((alpha.diff() < 0).all()) and 0.999 <= alpha[0] <= 1 and -1e-15 <= alpha[-1] < 2e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_decode_by_any_schedule_goes_from_all_masked_to_none(name):
    done = torch.linspace(0, 1, 50, dtype=torch.float64)
    share = get_schedule(name).masked_share(done)
    assert 0.99 < share[0] <= 1 and share[-1] == 0 and (share.diff() < 0).all()
    torch.testing.assert_close(share[:-1], get_schedule(name).mask_rate(1 - done)[:-1], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosinus", {}, "schedule is 'cosinus'; expected one of .*did you mean 'cosine'"),
        ("linear", {"power": 2.0}, "does not take"),
        ("polynomial", {"power": 0.0}, "positive"),
        ("geometric", {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
    ],
)
def test_bad_schedules_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_schedule(name, **kwargs)


def test_stratified_times_fill_every_stratum_whatever_the_split():
    n = 32
    u = keyed_uniform(7, torch.arange(n), 0, 1)[:, 0]
    whole = sample_times(n, u, "stratified", index=torch.arange(n), rotation=0.3)
    assert sorted(((whole - 0.3) % 1 * n).floor().long().tolist()) == list(range(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    parts = [sample_times(n, u[p], "stratified", index=p + 5 * n, rotation=0.3) for p in order.split(5)]
    assert torch.equal(torch.cat(parts), whole[order])


@given(st.integers(1, 9), st.integers(0, 1000), st.floats(0, 0.999), st.sampled_from(["iid", "stratified"]))
@settings(max_examples=100, deadline=None)
def test_times_stay_inside(n, seed, low, mode):
    u = keyed_uniform(seed, torch.arange(n), 0, 1)[:, 0].float()
    t = sample_times(n, u, mode, low=low, rotation=1 - 1 / n)
    assert bool((t > 0).all()) and bool((t >= low).all()) and bool((t <= 1).all())


@pytest.mark.parametrize("schedule", CHECKED, ids=str)
def test_importance_times_have_the_density_of_the_weight(schedule):
    ends = schedule.mask_rate(torch.tensor([0.02, 0.97], dtype=torch.float64)).tolist()
    z = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    t = importance_times(z, schedule, (ends[0], ends[1]))
    (slope,) = torch.autograd.grad(t.sum(), z)
    # density of t is 1 / slope, and weight / density is the constant
    expected = torch.full_like(slope, importance_weight((ends[0], ends[1])))
    torch.testing.assert_close(schedule.weight(t) * slope, expected, rtol=1e-8, atol=0)


def test_importance_needs_a_schedule_and_a_range():
    u = torch.rand(3)
    with pytest.raises(ValueError, match="needs a schedule"):
        sample_times(3, u, "importance")
    with pytest.raises(ValueError, match="rate_range"):
        sample_times(3, u, "importance", schedule=CHECKED[0], rate_range=(0.0, 1.0))
    with pytest.raises(ValueError, match="unknown time sampling"):
        sample_times(3, u, "antithetic")
