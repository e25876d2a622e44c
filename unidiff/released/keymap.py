"""One name map, both ways, between a released checkpoint and `MaskedTransformer`: a family is data for it.

Nothing may be left over on either side: a checkpoint with other weights than its config describes is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from unidiff.checked import check_finite
from unidiff.models.transformer import MaskedTransformer

LAYER = "{i}"
M = TypeVar("M", bound=torch.nn.Module)


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
    """

    entries: Sequence[Entry]
    layers: int
    prefixes: tuple[str, ...] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict)

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

    def to_ours(self, state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Rename a checkpoint.

        Args:
            state: their weights; prefixes and one level of nesting under `model` or `state_dict` are removed.
            shapes: the expected shape of every weight of ours.

        Raises:
            ValueError: missing or left-over weights, a wrong shape, or a constant of another value.
        """
        theirs = strip_prefixes(unwrap(state), self.prefixes)
        missing = [n for n in [*self.names(), *self.constants] if n not in theirs and n not in self.constants]
        left_over = sorted(set(theirs) - set(self.names()) - set(self.constants))
        if missing or left_over:
            raise ValueError(
                f"checkpoint does not fit its config: {_few('missing', missing)}, {_few('left over', left_over)}; "
                "check the family and the config"
            )
        for name, value in self.constants.items():
            if name in theirs and not torch.allclose(theirs[name].float(), value.float(), rtol=1e-3, atol=1e-6):
                raise ValueError(f"checkpoint weight {name!r} is not the constant that this architecture implies")
        ours = {}
        for entry in self.expanded():
            parts = [theirs[name] for name in entry.parts]
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
            expected = tuple(shapes[entry.ours])
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"checkpoint weight {entry.parts[0]!r} gives shape {tuple(value.shape)}; the config asks for {expected}"
                )
            ours[entry.ours] = value
        return ours

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_ours`, without prefixes."""
        rest = dict(ours)
        theirs = {name: value.clone() for name, value in self.constants.items()}
        for entry in self.expanded():
            value = rest.pop(entry.ours)
            split = (value,) if len(entry.parts) == 1 else value.split(entry.rows)
            theirs.update(zip(entry.parts, split, strict=True))
        if rest:
            raise ValueError(f"weights {sorted(rest)[:3]} have no name in this family; the model has other options on")
        return theirs


def build(
    config: Mapping[str, Any], keymap: KeyMap, state: Mapping[str, Any], dtype: torch.dtype | None = None
) -> MaskedTransformer:
    """A `MaskedTransformer` in evaluation mode that takes over the tensors of a checkpoint (cast to `dtype` if given)."""
    with torch.device("meta"):
        model = MaskedTransformer(**config)
    return assemble(model, keymap, state, dtype)


def assemble(model: M, keymap: KeyMap, state: Mapping[str, Any], dtype: torch.dtype | None = None) -> M:
    """Put the tensors of a checkpoint into a model made on the meta device; returns it in evaluation mode."""
    weights = keymap.to_ours(state, {name: value.shape for name, value in model.state_dict().items()})
    model.load_state_dict({k: v if dtype is None else v.to(dtype) for k, v in weights.items()}, assign=True)
    check_finite(model, "released checkpoint")
    return model.eval()


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
    return f"{len(names)} {kind}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")
