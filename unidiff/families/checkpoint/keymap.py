"""One name map, both ways, between a released checkpoint and one of our networks: a family is data for it.

Nothing may be left over on either side: a checkpoint with other weights than its config describes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from unidiff.errors import few, plain
from unidiff.weights.files import AnyTensor, check_dtype, check_finite, in_memory

LAYER = "{i}"
PREFIXES = ("module.", "_orig_mod.", "_orig_module.", "_fsdp_wrapped_module.")
"""What training programs put before the names of weights."""
M = TypeVar("M", bound=torch.nn.Module)


class KeyMismatch(ValueError):
    """The weights of a checkpoint are not those that its config describes."""


@dataclass(frozen=True)
class Entry:
    """One weight of ours, and the names in the checkpoint that it is (stacked along dim 0 with so many `rows` each)."""

    ours: str
    theirs: str | tuple[str, ...]
    rows: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def linear(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """The entries of a layer with a weight and perhaps a bias."""
    return joined(ours, [theirs], (), bias)


def joined(ours: str, theirs: Sequence[str], rows: tuple[int, ...], bias: bool = False) -> list[Entry]:
    """The entries of a layer of ours that is several of theirs, or one (then `rows` does not matter)."""
    return [
        Entry(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), rows if len(theirs) > 1 else ())
        for part in ("weight", "bias")[: 1 + bias]
    ]


def per_layer(count: int, entries: Sequence[Entry]) -> list[Entry]:
    """Entries whose names hold `{i}` for every layer, layer by layer."""

    def at(name: str, layer: int) -> str:
        return name.replace(LAYER, str(layer))

    return [Entry(at(e.ours, n), tuple(at(p, n) for p in e.parts), e.rows) for n in range(count) for e in entries]


@dataclass(frozen=True)
class KeyMap:
    """All entries of a checkpoint.

    Args:
        entries: in the order of the upstream module's parameters.
        constants: weights of theirs that the architecture fixes (saved buffers): checked on the way in, written on
            the way out.
        copies: weights of theirs that may be there as equal copies of another one (a tied head): copy to original.
    """

    entries: Sequence[Entry]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        rename: Callable[[str], str] = str,
        constants: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> KeyMap:
        """One entry per weight of a model."""
        return cls([Entry(name, rename(name)) for name in model.state_dict()], constants)

    def names(self) -> list[str]:
        """Their parameter names in upstream order: the order of a list of EMA weights."""
        return [name for entry in self.entries for name in entry.parts]

    def to_ours(
        self,
        theirs: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Rename a checkpoint; every tensor (in memory, or a `StoredTensor`) goes straight to its place, one at a time.

        Args:
            shapes: of every weight of ours. dtype, device: as in `Family.load`.

        Raises:
            KeyMismatch: missing, left-over or misshaped weights.
            ValueError: a constant of another value, a copy that is none, or a dtype that is no place's.
        """
        self._check_names(theirs, shapes)
        for name, value in theirs.items():
            check_dtype(name, value, is_float=name not in self.constants or self.constants[name].is_floating_point())
        for name, constant in self.constants.items():
            if name in theirs and not torch.allclose(
                in_memory(theirs[name]).float(), constant.float(), rtol=1e-3, atol=1e-6
            ):
                raise ValueError(f"checkpoint weight {name!r} is not the constant that this architecture implies")
        for copy, original in self.copies.items():
            if copy in theirs and not torch.equal(in_memory(theirs[copy]), in_memory(theirs[original])):
                raise ValueError(
                    f"checkpoint weight {copy!r} differs from {original!r}, though the config ties them; "
                    "set the tying off in the config, or load a checkpoint of this config"
                )
        return {e.ours: _place([theirs[name] for name in e.parts], shapes[e.ours], dtype, device) for e in self.entries}

    def _check_names(self, theirs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise `KeyMismatch` unless `theirs` holds exactly the weights of these shapes."""
        wanted: dict[str, tuple[Any, ...]] = {name: tuple(value.shape) for name, value in self.constants.items()}
        wanted |= {copy: _shape(theirs.get(original)) for copy, original in self.copies.items()}
        for entry in self.entries:
            whole = tuple(shapes[entry.ours])
            parts = [(rows, *whole[1:]) for rows in entry.rows] if len(entry.parts) > 1 else [whole]
            wanted |= zip(entry.parts, parts, strict=True)
        wrong = {name: shape for name, shape in wanted.items() if name in theirs and _shape(theirs[name]) != shape}
        kinds = {
            "missing": [name for name in self.names() if name not in theirs],
            "left over": sorted(set(theirs) - set(wanted)),
            "misshaped": [
                f"{n!r} gives shape {_shape(theirs[n])} and the config asks for {s}" for n, s in wrong.items()
            ],
        }
        if any(kinds.values()):
            counts = ", ".join(f"{len(names)} {kind}{_named(names)}" for kind, names in kinds.items())
            raise KeyMismatch(f"checkpoint does not fit its config: {counts}; check the family and the config")

    def to_theirs(self, ours: Mapping[str, Tensor], copies: bool = False) -> dict[str, Tensor]:
        """The inverse of `to_ours`; with `copies` also what is a copy of another weight."""
        rest = dict(ours)
        theirs = {name: value.clone() for name, value in self.constants.items()}
        for entry in self.entries:
            value = rest.pop(entry.ours)
            theirs |= zip(entry.parts, value.split(entry.rows) if entry.rows else (value,), strict=True)
        if rest:
            raise ValueError(f"weights {sorted(rest)[:3]} have no name in this family; the model has other options on")
        return theirs | ({copy: theirs[name].clone() for copy, name in self.copies.items()} if copies else {})


def assemble(
    model: M,
    keymap: KeyMap,
    state: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> M:
    """Put the tensors of a checkpoint into a model made on the meta device; returns it in evaluation mode."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(keymap.to_ours(state, shapes, dtype, device), assign=True)
    check_finite(model, "released checkpoint")
    return model.eval()


def _place(
    parts: Sequence[AnyTensor], shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """The parts of a weight stacked along dim 0. A tensor in memory that is one already is taken over as it is."""
    first, kinds = parts[0], {part.dtype for part in parts}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"weights that belong together are stored as {sorted(map(str, kinds))}; give a dtype")
    wanted = first.dtype if dtype is None or not first.dtype.is_floating_point else dtype
    if len(parts) == 1 and isinstance(first, Tensor):
        return first.to(device=device, dtype=wanted)
    if device is None:
        device = first.device if isinstance(first, Tensor) else "cpu"
    out, start = torch.empty(tuple(shape), dtype=wanted, device=device), 0
    if out.ndim == 0:
        return out.copy_(in_memory(first))
    for part in parts:
        out.narrow(0, start, part.shape[0]).copy_(in_memory(part))
        start += part.shape[0]
    return out


def unwrap(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights inside a checkpoint that nests them under a top-level `model` or `state_dict`."""
    inner = next((state[name] for name in ("model", "state_dict") if isinstance(state.get(name), Mapping)), None)
    return state if inner is None else unwrap(inner)


def strip_prefixes(state: Mapping[str, Any], prefixes: Iterable[str] = PREFIXES) -> dict[str, Any]:
    """Names without leading `prefixes`, removed as often as they occur; `ValueError` where two names become one."""
    prefixes = tuple(prefixes)
    out: dict[str, Any] = {}
    for name, value in state.items():
        while name.startswith(prefixes):
            name = next(name.removeprefix(p) for p in prefixes if name.startswith(p))
        if name in out:
            raise ValueError(f"checkpoint holds {name!r} twice, under different prefixes; keep one copy")
        out[name] = value
    return out


def _shape(value: Any) -> tuple[int | None, ...]:
    return tuple(getattr(value, "shape", (None,)))


def _named(names: list[str]) -> str:
    return f" ({few(map(plain, names))})" if names else ""
