"""The sampler decodes the same tokens on another device: random models, settings, caches, rows and guidance streams."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from device_cases import plainly
from sampler_space import MODELS, case_of, layouts, model_of
from virtual_device import DEVICE, virtual_device

FAST, SLOW = range(18), range(18, 1218)


def check(number: int) -> None:
    case = case_of(number)
    model = model_of(case.model)
    order, pads, length = layouts(case, Random(number))[1]
    with plainly():
        expected = case.decode(model, order, pads, length)
    with virtual_device():
        there = copy.deepcopy(model).to(DEVICE)
        found = case.decode(there, order, pads, length, device=DEVICE)
        assert all(x.device == DEVICE for x in found)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b.cpu()), case


@pytest.mark.parametrize("part", range(2))
def test_random_cases_decode_the_same_tokens(part):
    for number in FAST[part::2]:
        check(number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_more_random_cases_decode_the_same_tokens(part):
    for number in SLOW[part::12]:
        check(number)


def test_the_first_cases_meet_every_model():
    assert {case_of(number).model for number in FAST} == set(MODELS)
