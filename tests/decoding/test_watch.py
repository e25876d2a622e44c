"""Callbacks and rules of one's own: whatever they do to what they are given, the decode stays the same and ends."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cache_cases import VOCABULARY, make_model, rows
from torch import Tensor

from unidiff.decoding import (
    CacheConfig,
    DecodeView,
    Guidance,
    ModalityDecoding,
    NoCache,
    Sampler,
    SamplerConfig,
    SamplerOutput,
)
from unidiff.decoding.state import declines
from unidiff.tokens import Modality, TokenBatch

CONFIG = SamplerConfig(
    text=ModalityDecoding(steps=5, block_length=3, remask="confidence", remask_threshold=0.5, remask_budget=2),
    image=ModalityDecoding(steps=4, blocks_in_flight=2, block_length=4),
    guidance=Guidance(2.0),
)
SEEDS = torch.tensor([3, 4, 5])


@pytest.fixture(scope="module")
def model():
    return make_model()


def batch() -> TokenBatch:
    return TokenBatch.cat(rows()).pad_to(19)


def decode(model, callback=None, cache: str = "none", **options) -> SamplerOutput:
    policy = CacheConfig(cache).build()
    return Sampler(model, VOCABULARY, CONFIG, policy, **options)(batch(), SEEDS, callback=callback, record=True)


def same(a: SamplerOutput, b: SamplerOutput) -> None:
    assert a.nfe == b.nfe and len(a.trajectory) == len(b.trajectory)
    assert all(torch.equal(x, y) for x, y in zip(a.trajectory, b.trajectory, strict=True))
    assert torch.equal(a.confidence, b.confidence)
    assert all(torch.equal(x, y) for x, y in zip(held_by(a.batch), held_by(b.batch), strict=True))


def held_by(rows: TokenBatch) -> list[Tensor]:
    return [own for field in fields(TokenBatch) if (own := getattr(rows, field.name)) is not None]


def tensors_of(view: DecodeView) -> list[Tensor]:
    own = [view.ids, view.open, view.settled, view.written, view.committed, view.confidence]
    return own + held_by(view.batch)


@pytest.mark.parametrize("cache", ["none", "dual", "max-logit", "adaptive"])
@pytest.mark.parametrize("value", [0, 1, 3])
def test_writing_in_a_view_changes_nothing(model, cache: str, value: int) -> None:
    def scribble(step: int, view: DecodeView) -> None:
        for tensor in tensors_of(view):
            tensor.fill_(value)

    same(decode(model, cache=cache), decode(model, scribble, cache))


def test_writing_in_the_request_while_it_is_decoded_changes_nothing(model) -> None:
    request, seeds = batch(), SEEDS.clone()

    def scribble(step: int, view: DecodeView) -> None:
        seeds.fill_(9)
        for tensor in held_by(request):
            tensor.fill_(1)

    out = Sampler(model, VOCABULARY, CONFIG)(request, seeds, callback=scribble, record=True)
    same(decode(model), out)


def test_a_view_cannot_be_set_and_keeps_what_it_saw(model) -> None:
    views: list[DecodeView] = []
    out = decode(model, lambda step, view: views.append(view))
    assert [view.step for view in views] == list(range(1, out.steps + 1))
    assert all(torch.equal(view.ids, ids) for view, ids in zip(views, out.trajectory[1:], strict=True))
    assert views[-1].nfe == out.nfe and not views[-1].open.any() and not views[0].finishing
    for name in ("open", "ids", "finishing", "step", "anything"):
        with pytest.raises(AttributeError, match=f"{name} of a decode cannot be set by a callback"):
            setattr(views[0], name, True)


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        (False, True),
        (np.bool_(False), True),
        (torch.tensor(False), True),
        (torch.tensor([False]), True),
        (None, False),
        (True, False),
        (0, False),
        ("", False),
        ({}, False),
        (torch.tensor(0), False),
        (torch.tensor([False, False]), False),
        (torch.tensor([]), False),
        (np.zeros(3, dtype=bool), False),
        (float("nan"), False),
    ],
    ids=str,
)
def test_only_false_stops(model, answer: object, stops: bool) -> None:
    assert declines(answer) is stops
    out = decode(model, lambda step, view: answer)
    assert (out.steps == 2) is stops and not (out.batch.ids == VOCABULARY.mask_id).any()


def test_what_a_callback_raises_ends_the_decode_and_nothing_else(model) -> None:
    sampler = Sampler(model, VOCABULARY, CONFIG)

    def refuse(step: int, view: DecodeView) -> None:
        raise KeyError("mine")

    before = sampler(batch(), SEEDS, record=True)
    with pytest.raises(KeyError, match="mine"):
        sampler(batch(), SEEDS, callback=refuse)
    same(before, sampler(batch(), SEEDS, record=True))


def nothing(confidence, score, live, count, index) -> Tensor:
    return torch.zeros_like(live)


def dead_entries(confidence, score, live, count, index) -> Tensor:
    return ~live


def everything(confidence, score, live, count, index) -> Tensor:
    return torch.ones_like(live)


def vandal(confidence, score, live, count, index) -> Tensor:
    """Writes in all that it is given; positions 0 are given tokens."""
    for tensor, value in ((confidence, torch.nan), (score, torch.nan), (live, True), (count, -5), (index, 0)):
        tensor.fill_(value)
    return live


def by_chance(confidence, score, live, count, index) -> Tensor:
    return torch.rand(live.shape) < 0.2


@pytest.mark.parametrize("rule", [nothing, dead_entries, everything, vandal, by_chance])
@pytest.mark.parametrize("flight", [1, 2])
def test_any_rule_ends_and_leaves_given_tokens_alone(model, rule, flight: int) -> None:
    text = replace(CONFIG.text, blocks_in_flight=flight)
    sampler = Sampler(model, VOCABULARY, replace(CONFIG, text=text), rules={Modality.TEXT: rule, Modality.IMAGE: rule})
    request = batch()
    out = sampler(request, SEEDS)
    assert out.steps <= int(request.targets.sum(1).max()) + 2
    assert not (out.batch.ids == VOCABULARY.mask_id)[request.targets].any()
    assert torch.equal(out.batch.ids[~request.targets], request.ids[~request.targets])


@pytest.mark.parametrize(
    "answer",
    [None, True, 3, "all", [True], np.ones((3, 4), dtype=bool), torch.ones(3), torch.ones(1, 1, dtype=torch.bool)],
    ids=lambda a: type(a).__name__,
)
def test_a_rule_that_answers_something_else_is_refused(model, answer: object) -> None:
    with pytest.raises(ValueError, match=r"the commit rule returned .*; expected bool \(3, \d+\)"):
        decode(model, rules={Modality.TEXT: lambda *arguments: answer})


class Vandal(NoCache):
    """A policy that opens what was filled."""

    def observe(self, state, plan) -> None:
        state.masked.copy_(state.batch.targets)


def test_a_policy_that_writes_in_the_state_is_found_out(model) -> None:
    with pytest.raises(ValueError, match="a cache policy of your own writes in the state"):
        Sampler(model, VOCABULARY, CONFIG, Vandal())(batch(), SEEDS)


@pytest.mark.parametrize("cache", ["none", "dual", "interval"])
def test_a_callback_puts_tokens_and_masks_some_again(model, cache: str) -> None:
    request, seen = batch(), []

    def change(step: int, view: DecodeView) -> dict[str, Tensor] | None:
        seen.append(view.ids)
        if step != 1:
            return None
        ids, targets = view.ids, view.batch.targets
        images = view.batch.is_modality(Modality.IMAGE)
        texts = targets & ~images
        ids[texts] = VOCABULARY.text[0] + 5  # every word
        ids[view.committed & images] = VOCABULARY.image_mask  # what was drawn so far
        return {"ids": ids, "open": view.open}

    out = decode(model, change, cache)
    texts = request.targets & request.is_modality(Modality.TEXT)
    assert (out.batch.ids[texts] == VOCABULARY.text[0] + 5).all()
    images = request.targets & ~texts
    assert (seen[1] != VOCABULARY.image_mask)[images].any() and (out.trajectory[2] == VOCABULARY.image_mask)[
        images
    ].all()
    assert torch.equal(out.batch.ids[request.given], request.ids[request.given])
    assert not (out.batch.ids == VOCABULARY.mask_id).any()


def test_what_a_callback_may_not_change(model) -> None:
    given = lambda step, view: {"ids": view.ids.masked_fill(view.batch.given, 1)}  # noqa: E731
    for answer, sentence in (
        (given, "the callback changed a given token"),
        (lambda step, view: {"ids": view.ids + 10_000}, "an id that its position cannot hold"),
        (lambda step, view: {"ids": view.ids[:1]}, r"the callback returned ids as torch.int64 \(1, 19\); expected"),
        (lambda step, view: {"ids": 5}, "the callback returned ids as int; expected int64"),
    ):
        with pytest.raises(ValueError, match=sentence):
            decode(model, answer)
