"""Many small tensors to another device in one copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_ALIGNED = 16  # bytes


def moved(value: T, device: torch.device | str) -> T:
    """`value` with every tensor in it on `device`: tensors, and dataclasses, tuples, lists and dicts of such.

    Several tensors travel as one buffer, in pinned memory where they go to an accelerator, so that the host waits for
    nothing; on their way to the CPU it waits once. They share that memory afterwards. Where all is there it is `value` itself.
    Tensors with gradients travel alone.
    """
    device, found = torch.device(device), dict[int, Tensor]()
    device = torch.device("cpu") if device.type == "cpu" else device  # there is one, whatever its number
    _each(value, lambda x: found.setdefault(id(x), x))
    away = {number: x for number, x in found.items() if device not in (x.device, torch.device(x.device.type))}
    here = {number: x for number, x in away.items() if not x.requires_grad}
    if not away:
        return value
    if len({x.device for x in here.values()}) != 1 or not here:
        return _each(value, lambda x: x.to(device))
    sizes = [-(-x.numel() * x.element_size() // _ALIGNED) * _ALIGNED for x in here.values()]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=next(iter(here.values())).device)
    for x, room in zip(here.values(), packed.split(sizes), strict=True):
        _seen_as(x, room).copy_(x)
    pinned = packed.device.type == "cpu" and device.type != "mps"
    there = packed.pin_memory().to(device, non_blocking=True) if pinned else packed.to(device)
    rooms = dict(zip(here, there.split(sizes), strict=True))
    return _each(value, lambda x: _seen_as(x, rooms[id(x)]) if id(x) in rooms else x.to(device))


def _seen_as(x: Tensor, room: Tensor) -> Tensor:
    """Bytes as a tensor like `x`."""
    return room[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _each(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
