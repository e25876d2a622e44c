"""One name map, both ways, between a released checkpoint and one of our networks: a family is data for it.

Nothing may be left over on either side: a checkpoint with other weights than its config describes is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from unidiff.errors import few, plain
from unidiff.weights.files import AnyTensor, check_dtype, check_finite, in_memory

_LAYER, _SEVERAL = re.compile(r"\.(\d+)\."), re.compile(r"\{([\w.]+(?:,[\w.]+)+)\}")
PREFIXES = ("module.", "_orig_mod.", "_orig_module.", "_fsdp_wrapped_module.")
"""What training programs put before the names of weights."""
M = TypeVar("M", bound=torch.nn.Module)


class KeyMismatch(ValueError):
    """The weights of a checkpoint are not those that its config describes."""


class Entry(NamedTuple):
    """One weight of ours and its shape, and the names in the checkpoint that it is.

    Several are joined along `dim`. Matrices become a stack `[n, rows, columns]` of them, or of groups of them, along dim 0.
    """

    ours: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()  # of several
    dim: int = 0

    @property
    def joined(self) -> tuple[int, ...]:
        """Shape of the parts when they are joined."""
        if self.rows and self.dim == 0 and len(self.shape) == 3:
            return self.shape[0] * self.shape[1], self.shape[2]
        return self.shape

    def shapes(self) -> list[tuple[int, ...]]:
        """Of each part."""
        before, after = self.joined[: self.dim], self.joined[self.dim + 1 :]
        return [(*before, rows, *after) for rows in self.rows] or [self.shape]


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
        names: Mapping[str, str] | Callable[[str], str] = str,
        constants: Mapping[str, Tensor] = MappingProxyType({}),
        copies: Mapping[str, str] = MappingProxyType({}),
        rows: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        layer: Callable[[int], str] = str,
        dims: Mapping[str, int] = MappingProxyType({}),
    ) -> KeyMap:
        """One entry per weight of a model.

        Args:
            names: ours to theirs, as a function, or a table of modules and weights in the order of the upstream module's
                parameters. There `{i}` stands for a layer's number, and `{q,k,v}` for several of theirs that are one of ours.
            rows: how many each of several has, by name in the table; equal shares for others.
            layer: how they write the number of a layer.
            dims: along which dimension several are joined, by name in the table; 0 for others.

        Raises:
            ValueError: a weight that the table does not name.
        """
        weights = model.state_dict()
        if callable(names):
            return cls([Entry(n, tuple(w.shape), (names(n),)) for n, w in weights.items()], constants, copies)
        order = {ours: place for place, ours in enumerate(names)}
        starts = {ours.partition("{i}")[0]: place for ours, place in reversed(order.items())}  # all layers together
        found: list[tuple[tuple[int, int, int], Entry]] = []
        for name, value in weights.items():
            number = _LAYER.search(name)
            weight = name if number is None else name.replace(number[0], ".{i}.", 1)
            module, _, kind = weight.rpartition(".")
            ours = weight if weight in names else module
            if ours not in names:
                raise ValueError(f"weight {name!r} has no name in this family; the model has other options on")
            theirs = names[ours] if ours == weight else f"{names[ours]}.{kind}"
            at = 0 if number is None else int(number[1])
            theirs = theirs.replace("{i}", layer(at))
            parts = _parts(theirs)
            place = starts[ours.partition("{i}")[0]], at, order[ours]
            entry = Entry(name, tuple(value.shape), parts, (1,) * (len(parts) > 1), dims.get(ours, 0))
            if len(parts) > 1:
                equal = (entry.joined[entry.dim] // len(parts),) * len(parts)
                entry = entry._replace(rows=rows.get(ours, equal))
            found.append((place, entry))
        return cls([entry for _, entry in sorted(found, key=lambda pair: pair[0])], constants, copies)

    def names(self) -> list[str]:
        """Their parameter names in upstream order: the order of a list of EMA weights."""
        return [name for entry in self.entries for name in entry.parts]

    def to_ours(
        self, theirs: Mapping[str, Any], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Rename a checkpoint; every tensor (in memory, or a `StoredTensor`) goes straight to its place, one at a time.

        Args:
            dtype, device: as in `Family.load`.

        Raises:
            KeyMismatch: missing, left-over or misshaped weights.
            ValueError: a constant of another value, a copy that is none, or a dtype that is no place's.
        """
        self._check_names(theirs)
        for name, value in theirs.items():
            check_dtype(name, value, is_float=name not in self.constants or self.constants[name].is_floating_point())
        for name in self.constants.keys() & theirs.keys():
            held, constant = in_memory(theirs[name]).float(), self.constants[name].float()
            if not torch.allclose(held, constant, rtol=1e-3, atol=1e-6):
                raise ValueError(f"checkpoint weight {name!r} is not the constant that this architecture implies")
        for copy in self.copies.keys() & theirs.keys():
            original = self.copies[copy]
            if not torch.equal(in_memory(theirs[copy]), in_memory(theirs[original])):
                raise ValueError(
                    f"checkpoint weight {copy!r} differs from {original!r}, though the config ties them; "
                    "set the tying off in the config, or load a checkpoint of this config"
                )
        return {e.ours: _place([theirs[name] for name in e.parts], e, dtype, device) for e in self.entries}

    def _check_names(self, theirs: Mapping[str, Any]) -> None:
        """Raise `KeyMismatch` unless `theirs` holds exactly the weights of these shapes."""
        wanted: dict[str, tuple[Any, ...]] = {name: tuple(value.shape) for name, value in self.constants.items()}
        wanted |= {copy: _shape(theirs.get(original)) for copy, original in self.copies.items()}
        for entry in self.entries:
            wanted |= zip(entry.parts, entry.shapes(), strict=True)
        wrong = {name: shape for name, shape in wanted.items() if name in theirs and _shape(theirs[name]) != shape}
        kinds = {
            "missing": [name for name in self.names() if name not in theirs],
            "left over": sorted(set(theirs) - set(wanted)),
            "misshaped": [
                f"{n!r} gives shape {_shape(theirs[n])} and the config asks for {s}" for n, s in wrong.items()
            ],
        }
        if any(kinds.values()):
            said = {kind: f" ({few(map(plain, names))})" if names else "" for kind, names in kinds.items()}
            counts = ", ".join(f"{len(names)} {kind}{said[kind]}" for kind, names in kinds.items())
            raise KeyMismatch(f"checkpoint does not fit its config: {counts}; check the family and the config")

    def to_theirs(self, ours: Mapping[str, Tensor], copies: bool = False) -> dict[str, Tensor]:
        """The inverse of `to_ours`; with `copies` also what is a copy of another weight."""
        theirs = {name: value.clone() for name, value in self.constants.items()}
        for entry in self.entries:
            value = ours[entry.ours]
            parts = value.view(entry.joined).split(entry.rows, entry.dim) if entry.rows else (value,)
            theirs |= zip(entry.parts, parts, strict=True)
        return theirs | ({copy: theirs[name].clone() for copy, name in self.copies.items()} if copies else {})


def _parts(theirs: str) -> tuple[str, ...]:
    """`a.{q,k}` is `a.q` and `a.k`."""
    several = _SEVERAL.search(theirs)
    return (theirs,) if several is None else tuple(theirs.replace(several[0], part) for part in several[1].split(","))


def qkv_rows(config: Any) -> tuple[int, int, int]:
    """Rows of queries, keys and values in a `MaskedTransformer` of these settings."""
    head = config["head_size"] or config["hidden_size"] // config["num_heads"]
    shared = head * (config["num_kv_heads"] or config["num_heads"])
    return head * config["num_heads"], shared, shared


def assemble(
    model: M,
    keymap: KeyMap,
    state: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> M:
    """Put the tensors of a checkpoint into a model made on the meta device; returns it in evaluation mode."""
    model.load_state_dict(keymap.to_ours(state, dtype, device), assign=True)
    check_finite(model, "released checkpoint")
    return model.eval()


def _place(
    parts: Sequence[AnyTensor], entry: Entry, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """The parts of a weight joined. A tensor in memory that is one already is taken over as it is."""
    first, kinds = parts[0], {part.dtype for part in parts}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"weights that belong together are stored as {sorted(map(str, kinds))}; give a dtype")
    wanted = first.dtype if dtype is None or not first.dtype.is_floating_point else dtype
    if len(parts) == 1:
        return in_memory(first).to(device=device, dtype=wanted, copy=not isinstance(first, Tensor))
    if device is None:
        device = first.device if isinstance(first, Tensor) else "cpu"
    out, start = torch.empty(entry.joined, dtype=wanted, device=device), 0
    for part, rows in zip(parts, entry.rows, strict=True):
        out.narrow(entry.dim, start, rows).copy_(in_memory(part))
        start += rows
    return out.view(entry.shape)


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
