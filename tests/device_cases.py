"""What the tests of the virtual device share: covering cases, one call on both devices, and when results are the same."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from virtual_device import DEVICE, Ledger, VirtualTensor, virtual_device

from unidiff.pipeline import UniDiffPipeline


@contextmanager
def plainly() -> Iterator[None]:
    """Attention by matrix products, as the virtual device does it: results are then the same to the last bit."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def on_both(pipe: UniDiffPipeline, call: Callable[[UniDiffPipeline], Any]) -> tuple[Any, Any, Ledger]:
    """The result of a call on the CPU and on the virtual device; the pipeline is back on the CPU afterwards."""
    with plainly():
        expected = call(pipe)
    with virtual_device() as ledger:
        pipe.to(DEVICE)
        try:
            found = call(pipe)
        finally:
            pipe.to("cpu")
    return expected, found, ledger


def same_outputs(a: Any, b: Any) -> None:
    """Assert that two results of a pipeline are the same; numbers may differ by rounding."""
    assert a.texts == b.texts and a.text_ids == b.text_ids and a.nfe == b.nfe and a.notes == b.notes
    assert a.cache == b.cache and a.cache_note == b.cache_note
    for name in ("ids", "codes", "seeds"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("ids", "codes", "seeds", "confidences"):
        assert not isinstance(getattr(b, name), VirtualTensor), f"{name} is on the device"
    torch.testing.assert_close(a.confidences, b.confidences, rtol=1e-4, atol=1e-5)
    same_pictures(a.images, b.images)
    assert (a.trajectory is None) == (b.trajectory is None)
    if a.trajectory is not None:
        assert torch.equal(a.trajectory.ids, b.trajectory.ids) and a.trajectory.texts == b.trajectory.texts
        same_pictures(a.trajectory.frames, b.trajectory.frames)


def same_pictures(a: Any, b: Any) -> None:
    """Assert that pictures of any kind differ by at most one of 255 steps."""
    if a is None or b is None:
        assert a is b
        return
    assert not isinstance(b, VirtualTensor)
    first, second = _array(a), _array(b)
    assert first.shape == second.shape and first.dtype == second.dtype
    whole = first.dtype.kind in "iu"
    assert np.abs(first.astype(np.float64) - second.astype(np.float64)).max(initial=0) <= (1 if whole else 1 / 255)


def _array(pictures: Any) -> np.ndarray:
    if isinstance(pictures, Tensor):
        return pictures.numpy()
    if isinstance(pictures, list) and pictures and isinstance(pictures[0], Image.Image):
        return np.stack([np.asarray(picture) for picture in pictures])
    return np.asarray(pictures)


def moved(batch: Any) -> Any:
    """A batch, or several, on the virtual device."""
    if isinstance(batch, tuple | list):
        return type(batch)(moved(part) for part in batch)
    return None if batch is None else batch.to(DEVICE)


def moved_model(model: Any) -> Any:
    """A copy on the virtual device; a denoiser that is no module has a network and an encoder of texts, which move."""
    if isinstance(model, torch.nn.Module):
        return copy.deepcopy(model).to(DEVICE)
    encoder = copy.deepcopy(model.encoder)
    encoder.encoder.to(DEVICE)
    own = {"model": copy.deepcopy(model.model).to(DEVICE), "encoder": encoder}
    prompt = getattr(model, "empty_prompt", None)
    return replace(model, **own, **({} if prompt is None else {"empty_prompt": prompt.to(DEVICE)}))


def covering(
    factors: Mapping[str, Sequence[Any]], fits: Callable[[Mapping[str, Any]], bool] = lambda case: True, seed: int = 0
) -> list[dict[str, Any]]:
    """Few cases in which every two values of different factors meet, where they fit each other (greedy, repeatable)."""
    names, chance = list(factors), Random(seed)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases: list[dict[str, Any]] = []
    failures = 0
    while open_pairs and failures < 300:
        first = chance.choice(sorted(open_pairs))
        best, gained = None, 0
        for _ in range(20):
            chosen = {name: chance.randrange(len(factors[name])) for name in names} | dict(first)
            case = {name: factors[name][number] for name, number in chosen.items()}
            met = {pair for pair in open_pairs if all(chosen[name] == number for name, number in pair)}
            if len(met) > gained and fits(case):
                best, gained, closed = case, len(met), met
        if best is None:
            failures += 1
            continue
        cases.append(best)
        open_pairs -= closed
    return cases


@contextmanager
def any_name_means_it() -> Iterator[None]:
    """Whatever device settings or flags name, it is the virtual one."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "unidiff" and hasattr(module, "pick_device"):
                stack.enter_context(patch.object(module, "pick_device", lambda name: DEVICE))
        yield
