"""One name map, both ways, between a released checkpoint and `MaskedTransformer`: a family is data for it.

Nothing may be left over on either side: a checkpoint with other weights than its config describes is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from unidiff.checked import build_on_meta, check_dtype, check_finite
from unidiff.errors import plain
from unidiff.families.checkpoint.files import AnyTensor, in_memory
from unidiff.models.transformer import MaskedTransformer

LAYER = "{i}"
M = TypeVar("M", bound=torch.nn.Module)


class KeyMismatch(ValueError):
    """The weights of a checkpoint are not those that its config describes.

    Attributes:
        missing, left_over: names in the checkpoint's spelling.
        misshaped: name to (shape found, shape that the config asks for).
    """

    def __init__(
        self,
        missing: list[str],
        left_over: list[str],
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing, self.left_over, self.misshaped = missing, left_over, dict(misshaped)
        shapes = [
            f"{n!r} gives shape {found} and the config asks for {wanted}" for n, (found, wanted) in misshaped.items()
        ]
        counts = f"{_few('missing', missing)}, {_few('left over', left_over)}, {_few('misshaped', shapes)}"
        super().__init__(f"checkpoint does not fit its config: {counts}; check the family and the config")


@dataclass(frozen=True)
class Entry:
    """One weight of ours and the weight (or several, stacked along dim 0) that it is in the checkpoint.

    Args:
        ours: our name; `{i}` stands for the layer.
        theirs: their name, or names in stacking order.
        rows: rows of each part where there are several; sums to the rows of ours.
    """

    ours: str
    theirs: str | tuple[str, ...]
    rows: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def at(self, layer: int) -> Entry:
        """The entry of one layer."""
        names = tuple(name.replace(LAYER, str(layer)) for name in self.parts)
        return Entry(self.ours.replace(LAYER, str(layer)), names, self.rows)


@dataclass(frozen=True)
class KeyMap:
    """All entries of a checkpoint of `layers` layers, in the order of the upstream module's parameters.

    Args:
        entries: with `{i}` in per-layer names; consecutive per-layer entries are repeated layer by layer.
        layers: number of layers.
        prefixes: name prefixes that a downloaded file may carry; stripped, repeatedly.
        constants: weights of theirs that the architecture fixes (saved buffers): checked on the way in, written on
            the way out.
        copies: weights of theirs that may be there as equal copies of another one (a tied head): copy to original.
    """

    entries: Sequence[Entry]
    layers: int
    prefixes: tuple[str, ...] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def expanded(self) -> list[Entry]:
        """One entry per weight of ours, in upstream order."""
        out: list[Entry] = []
        run: list[Entry] = []
        for entry in [*self.entries, None]:
            if entry is not None and LAYER in entry.ours:
                run.append(entry)
                continue
            out += [e.at(layer) for layer in range(self.layers) for e in run] if run else []
            run = []
            if entry is not None:
                out.append(entry)
        return out

    def names(self) -> list[str]:
        """Their parameter names in upstream order, without prefixes: the order of a list of EMA weights."""
        return [name for entry in self.expanded() for name in entry.parts]

    def to_ours(
        self,
        state: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Rename a checkpoint; every tensor goes straight to its place, one at a time.

        Args:
            state: their weights (tensors, or `StoredTensor` of a file); prefixes and one level of nesting under `model`
                or `state_dict` are removed.
            shapes: the expected shape of every weight of ours.
            dtype: of the floating-point weights; None keeps the checkpoint's.
            device: where to; None for where they are.

        Raises:
            KeyMismatch: missing, left-over or misshaped weights.
            ValueError: a constant of another value.
        """
        theirs = strip_prefixes(unwrap(state), self.prefixes)
        self.check(theirs, shapes)
        for name, value in theirs.items():
            check_dtype(name, value, is_float=name not in self.constants or self.constants[name].is_floating_point())
        self._check_equal(theirs)
        return {
            entry.ours: _place([theirs[name] for name in entry.parts], shapes[entry.ours], dtype, device)
            for entry in self.expanded()
        }

    def _check_equal(self, theirs: Mapping[str, Any]) -> None:
        """Constants have their value, copies that of their original."""
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

    def check(self, theirs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise `KeyMismatch` unless `theirs`, without prefixes, holds exactly the weights of these shapes."""
        names = self.names()
        misshaped = {}
        for entry in self.expanded():
            expected = tuple(shapes[entry.ours])
            rows = entry.rows if len(entry.parts) > 1 else expected[:1]
            for name, count in zip(entry.parts, rows or [None] * len(entry.parts), strict=True):
                wanted = expected if count is None else (count, *expected[1:])
                if name in theirs and tuple(getattr(theirs[name], "shape", (None,))) != wanted:
                    misshaped[name] = (tuple(getattr(theirs[name], "shape", ())), wanted)
        known = {**{name: tuple(value.shape) for name, value in self.constants.items()}}
        known |= {copy: tuple(getattr(theirs.get(original), "shape", ())) for copy, original in self.copies.items()}
        for name, wanted in known.items():
            if name in theirs and tuple(getattr(theirs[name], "shape", (None,))) != wanted:
                misshaped[name] = (tuple(getattr(theirs[name], "shape", ())), wanted)
        missing = [name for name in names if name not in theirs]
        left_over = sorted(set(theirs) - set(names) - set(known))
        if missing or left_over or misshaped:
            raise KeyMismatch(missing, left_over, misshaped)

    def to_theirs(self, ours: Mapping[str, Tensor], copies: bool = False) -> dict[str, Tensor]:
        """The inverse of `to_ours`, without prefixes; with `copies` also what is a copy of another weight."""
        rest = dict(ours)
        theirs = {name: value.clone() for name, value in self.constants.items()}
        for entry in self.expanded():
            value = rest.pop(entry.ours)
            split = (value,) if len(entry.parts) == 1 else value.split(entry.rows)
            theirs.update(zip(entry.parts, split, strict=True))
        if rest:
            raise ValueError(f"weights {sorted(rest)[:3]} have no name in this family; the model has other options on")
        for copy, original in self.copies.items():
            if copies:
                theirs[copy] = theirs[original].clone()
        return theirs


def build(
    config: Mapping[str, Any],
    keymap: KeyMap,
    state: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MaskedTransformer:
    """A `MaskedTransformer` in evaluation mode that takes over the tensors of a checkpoint (cast to `dtype` if given)."""
    return assemble(build_on_meta(MaskedTransformer, config), keymap, state, dtype, device)


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
    first = parts[0]
    kinds = {part.dtype for part in parts}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"weights that belong together are stored as {sorted(map(str, kinds))}; give a dtype")
    wanted = first.dtype if dtype is None or not first.dtype.is_floating_point else dtype
    if len(parts) == 1 and isinstance(first, Tensor):
        return first.to(device=device, dtype=wanted)
    place = torch.device("cpu") if device is None else device
    if device is None and isinstance(first, Tensor):
        place = first.device
    out, start = torch.empty(tuple(shape), dtype=wanted, device=place), 0
    if out.ndim == 0:
        return out.copy_(in_memory(first))
    for part in parts:
        out.narrow(0, start, part.shape[0]).copy_(in_memory(part))
        start += part.shape[0]
    return out


def unwrap(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights inside a checkpoint that nests them under a top-level `model` or `state_dict`."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            return unwrap(state[wrapper])
    return state


def strip_prefixes(state: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """Names without leading `prefixes`, removed as often as they occur.

    Raises:
        ValueError: two names become one.
    """
    prefixes = tuple(prefixes)
    out: dict[str, Any] = {}
    for key, value in state.items():
        name = key
        while prefixes and name.startswith(prefixes):
            name = next(name.removeprefix(p) for p in prefixes if name.startswith(p))
        if name in out:
            raise ValueError(f"checkpoint holds {name!r} twice, under different prefixes; keep one copy")
        out[name] = value
    return out


def _few(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}" + (
        f" ({', '.join(map(plain, names[:3]))}{', ...' if len(names) > 3 else ''})" if names else ""
    )
