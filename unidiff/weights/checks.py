"""What weights must be: of the names, shapes and dtypes that a model wants, and finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unidiff.errors import few, first_line, plain

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights can be: eight bits need scales, which are a format of their own."""
_KINDS = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
_PART = 2**22  # elements looked at together


def build_on_meta(cls: Any, config: Mapping[str, Any], where: str = "") -> Any:
    """A model without memory for its weights, from constructor arguments or (of a config file) a whole config.

    Raises:
        ValueError: no such model can be made; the message starts with `where`.
    """
    try:
        with torch.device("meta"):
            return cls.from_config(dict(config)) if "_class_name" in config else cls(**config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, LookupError, AttributeError) as error:
        said = str(error)
        if not isinstance(error, ValueError):  # a class of diffusers checks little of its config; ours check theirs
            said = f"{cls.__name__} cannot be made from its config ({first_line(error)}); check the sizes in it"
        raise ValueError(f"{where}: {said}" if where else said) from error


def check_model_dtype(dtype: Any) -> None:
    """Raise `ValueError` for a dtype that weights cannot be cast to without losing something; None and names pass."""
    if isinstance(dtype, torch.dtype) and dtype not in FLOATS:
        raise ValueError(f"dtype is {str(dtype).removeprefix('torch.')}; weights can be loaded as {_KINDS}")


def check_dtype(name: str, value: Any, is_float: bool = True) -> None:
    """Raise `ValueError` for a stored tensor of a dtype that its place cannot take over without losing something.

    Args:
        name, value: of the tensor, in memory or in a file; its `dtype` is looked at.
        is_float: whether the place is for floating-point numbers; otherwise for whole ones.
    """
    if is_float and value.dtype not in FLOATS:
        raise ValueError(
            f"weight {name!r} is stored as {str(value.dtype).removeprefix('torch.')}; expected one of {_KINDS} "
            "(quantised weights are made after loading, with unidiff.families.checkpoint.small_memory)"
        )
    if not is_float and (value.dtype.is_floating_point or value.dtype.is_complex):
        raise ValueError(f"weight {name!r} is stored as {value.dtype}; expected whole numbers")


def check_shapes(
    where: str, wanted: Mapping[str, Any], stored: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Raise `ValueError` unless weights have the names and shapes that a model wants.

    Args:
        where: for the message. wanted, stored: anything with a `shape`, by name. more: what may be there besides.
    """
    known = {**wanted, **(more or {})}
    problems = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - known.keys()),
        "misshaped": sorted(n for n in stored.keys() & known.keys() if tuple(stored[n].shape) != tuple(known[n].shape)),
    }
    first = next(iter(problems["misshaped"]), None)
    refuse(where, problems, f", {tuple(stored[first].shape)} instead of {tuple(known[first].shape)}" if first else "")


def refuse(where: str, problems: Mapping[str, list[str]], more: str = "") -> None:
    """Raise `ValueError` about the names of weights under the kinds of what is wrong with them; pass where none are."""
    if found := "; ".join(f"{len(v)} {k} ({few(map(plain, v))})" for k, v in problems.items() if v):
        raise ValueError(f"{where}: the weights do not fit the config: {found}{more}; load a checkpoint of this model")


def check_finite(weights: torch.nn.Module | Mapping[str, torch.Tensor], where: str) -> None:
    """Raise `ValueError` naming the first weights (of a model, or by name) that hold NaN or infinity."""
    named = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    if bad := [name for name, value in named.items() if not _is_finite(value)]:
        raise ValueError(
            f"{where}: {len(bad)} weights hold NaN or infinity ({few(map(plain, bad))}); the checkpoint is damaged"
        )


def _is_finite(value: torch.Tensor) -> bool:
    """In parts: `isfinite` of a whole embedding would need as much memory again."""
    if value.is_meta or not value.is_floating_point():
        return True
    return all(bool(torch.isfinite(part).all()) for part in value.detach().reshape(-1).split(_PART))
