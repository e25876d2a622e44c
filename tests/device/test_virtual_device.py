"""The virtual device itself: what lives there, what meets, what waits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from virtual_device import DEVICE, VirtualTensor, virtual_device

from unidiff.tokens import Span, TokenBatch


@pytest.fixture
def ledger():
    with virtual_device() as found:
        yield found


def test_tensors_say_where_they_are(ledger):
    made = [
        torch.zeros(2, device=DEVICE),
        torch.arange(2, device="privateuseone"),
        torch.tensor([1, 2], device=DEVICE),
        torch.as_tensor(np.ones(2), device=DEVICE),
        torch.randn(2).to(DEVICE),
        torch.randn(2).to("privateuseone"),
        torch.full((2,), 3.0, device=DEVICE).new_ones(2),
    ]
    with DEVICE:
        made += [torch.ones(2), torch.tensor([1, 2])]
    for x in [*made, *(torch.empty_like(x) for x in made), *(x.new_tensor([1, 2]) for x in made)]:
        assert isinstance(x, VirtualTensor) and x.device == DEVICE and not x.is_meta and not x.is_cpu
        assert x.cpu().device.type == "cpu" and type(x.cpu()) is torch.Tensor
        assert x.to(DEVICE) is x and x.to(x.dtype) is x and x.double().dtype == torch.float64
        assert x.to(DEVICE, copy=True) is not x


def test_what_is_on_the_cpu_meets_it_only_as_a_number(ledger):
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    for meet in (
        lambda: there + here,
        lambda: here * there,
        lambda: there.copy_(here).add_(here),
        lambda: torch.cat([there, here]),
        lambda: torch.where(there > 0, here, there),
        lambda: here[there > 0],
        lambda: there.index_copy(0, torch.tensor([0]), there[:1]),
        lambda: torch.stack([there[0], here[0]]),
        lambda: nn.Linear(3, 3)(there),
        lambda: F.embedding(torch.tensor([0], device=DEVICE), torch.ones(3, 3)),
    ):
        with pytest.raises(
            RuntimeError, match=r"aten\.\w+.*: expected all tensors on privateuseone:0, but .* on the CPU"
        ):
            meet()
    assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert there[torch.tensor([0, 2])].shape == (2,)  # an index may be on the CPU, and is sent over
    with pytest.raises(TypeError, match=r"use \.cpu\(\) first"):
        np.asarray(there)


def test_meta_is_a_device_of_its_own(ledger):
    with torch.device("meta"):
        layer = nn.Linear(2, 3)
    assert layer.weight.is_meta and torch.empty_like(layer.weight).is_meta and torch.ones(1, device="meta").is_meta
    with torch.device("meta"):
        assert torch.tensor([1]).is_meta and torch.tensor([1]).device == torch.device("meta")
    assert torch.ones(1).to("meta").is_meta and torch.ones(1).to(torch.device("meta")).is_meta
    with pytest.raises(RuntimeError, match="without values"):
        torch.ones(2, device=DEVICE) + torch.ones(2, device="meta")
    layer.load_state_dict(
        {"weight": torch.ones(3, 2, device=DEVICE), "bias": torch.ones(3, device=DEVICE)}, assign=True
    )
    assert layer(torch.ones(1, 2, device=DEVICE)).tolist() == [[3, 3, 3]]
    assert F.one_hot(torch.tensor([1], device=DEVICE), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0]),
        lambda x: int(x.sum()),
        lambda x: float(x[1]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.arange(5)[: x[0].long()],
        lambda x: f"{x[0]}",
        lambda x: x.isfinite().all() and None,
    ],
)
def test_every_look_of_the_host_is_counted(ledger, wait):
    x = torch.ones(3, device=DEVICE)
    wait(x)
    assert sum(ledger.reads.values()) == 1 and not ledger.uploads


@pytest.mark.parametrize(
    "send",
    [
        lambda x: torch.tensor([1], device=DEVICE),
        lambda x: torch.ones(2).to(DEVICE),
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0])],
        lambda x: x.copy_(torch.zeros(3)),
    ],
)
def test_what_is_sent_is_counted_apart(ledger, send):
    x = torch.ones(3, device=DEVICE)
    send(x)
    assert sum(ledger.uploads.values()) == 1 and not ledger.reads


def test_work_on_the_device_waits_for_nothing(ledger):
    x = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    layer = nn.Linear(4, 4)
    for parameter in layer.parameters():
        parameter.data = parameter.data  # stays what it is
    with DEVICE:
        there = nn.Linear(4, 4)
    y = F.softmax(there(x) * 2 + 1, -1).sum() + x.masked_fill(x > 2, 0).cumsum(0).mean()
    y.backward()
    index = x.detach().argsort(1)
    x.detach().gather(1, index).scatter(1, index, x.detach()).where(index > 0, 0.0).amax(1)
    assert x.grad.device == DEVICE and not ledger.reads and not ledger.uploads


def test_a_wait_is_told_by_its_place(ledger):
    batch = TokenBatch.from_spans([[Span.text([1, 2])]]).to(DEVICE)
    ledger.reads.clear()
    batch.visibility()
    assert dict(ledger.reads) == {("tokens/batch.py:TokenBatch.visibility", "tolist"): 1}


def test_modules_move_there_and_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(2, 3))
    before = copy.deepcopy(model.state_dict())
    with virtual_device():
        model.to(DEVICE).double()
        assert all(isinstance(v, VirtualTensor) for v in model.state_dict().values())
        assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float64 for p in model.parameters())
        twin = copy.deepcopy(model)
        twin[0].weight.data.zero_()
        assert isinstance(twin[0].weight, nn.Parameter) and twin[0].weight.requires_grad
        model.float().to("cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD])
def test_optimisers_and_dropout_do_what_they_do_on_the_cpu(make):
    def trained(device: torch.device | str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Dropout(0.5), nn.Linear(4, 2, bias=False)).to(device)
        optimiser = make(model.parameters(), 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(torch.ones(2, 3, device=device)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        return [p.detach().cpu() for p in model.parameters()]

    expected = trained("cpu")
    with virtual_device():
        found = trained(DEVICE)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_group_of_devices_counts_alike():
    with virtual_device() as outer:
        with virtual_device() as inner:
            torch.ones(2, device=DEVICE).tolist()
        torch.ones(2, device=DEVICE).tolist()
    assert sum(inner.reads.values()) == 1 and sum(outer.reads.values()) == 2
