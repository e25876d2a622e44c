"""Loading that refuses what diffusers only warns about: wrong weights, unknown config keys, NaN."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError

_PART = 2**22  # elements looked at together


class CheckedModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A `ModelMixin` whose `from_pretrained` and `from_config` raise one clear sentence instead of guessing."""

    if TYPE_CHECKING:
        config: Any  # diffusers declares a dict; its keys read as attributes too

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """As `ModelMixin.from_pretrained` (`torch_dtype`/`dtype`, `subfolder`, `revision`, ...), safetensors only.

        Raises:
            FileNotFoundError: no config or no safetensors weights there.
            ValueError: another model class, unknown config keys, weights that are missing, unexpected, of another
                shape or unreadable, or that hold NaN or infinity.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded = load_checked(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)
        return loaded if wants_info else loaded[0]  # type: ignore[return-value]

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: Any) -> tuple[dict, dict, dict]:
        """Split a config into constructor arguments; an unknown key or another class raises `ValueError`."""
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        if unknown := sorted(k for k in config_dict if not k.startswith("_") and k not in known):
            raise ValueError(f"{cls.__name__} config has unknown keys {unknown}; expected some of {sorted(known)}")
        family = config_dict.get("_class_name", cls.__name__)
        if family not in {c.__name__ for c in cls.__mro__}:
            raise ValueError(f"the config describes a {family}, not a {cls.__name__}; load it with its own class")
        return super().extract_init_dict(config_dict, **kwargs)


def load_checked(
    loader: Callable[..., Any], class_name: str, source: str | os.PathLike | None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Call a diffusers `from_pretrained` and refuse what it would only warn about.

    Args:
        loader: the bound `from_pretrained` of a model class.
        class_name: for messages.
        source: folder or hub name.
        kwargs: handed on to `loader`.

    Returns:
        (model, diffusers' loading info).

    Raises:
        FileNotFoundError: no config or no safetensors weights there.
        ValueError: weights that are missing, unexpected, misshaped, unreadable, NaN or infinite.
    """
    where = f"{class_name} at {str(source)!r}"
    kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
    settings = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = loader(source, **{**kwargs, **settings})
    except (OSError, SafetensorError) as error:
        if _chain_holds(error, SafetensorError):
            raise ValueError(f"{where}: the weight file is damaged, or no safetensors file") from error
        raise FileNotFoundError(f"{where}: no config.json with safetensors weights ({_first_line(error)})") from error
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "misshaped": sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info["mismatched_keys"]),
        "failed": [_first_line(message) for message in info["error_msgs"]],
    }
    if found := "; ".join(f"{len(v)} {k} ({_few(v)})" for k, v in problems.items() if v):
        raise ValueError(f"{where}: the weights do not fit the config: {found}; load a checkpoint of this model")
    check_finite(model, where)
    return model, info


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise `ValueError` naming the first weights that hold NaN or infinity."""
    bad = [name for name, value in model.state_dict().items() if not _finite(value)]
    if bad:
        raise ValueError(f"{where}: {len(bad)} weights hold NaN or infinity ({_few(bad)}); the checkpoint is damaged")


def _finite(value: torch.Tensor) -> bool:
    """In parts: `isfinite` of a whole embedding would need as much memory again."""
    if value.is_meta or not value.is_floating_point():
        return True
    return all(bool(torch.isfinite(part).all()) for part in value.detach().reshape(-1).split(_PART))


def _chain_holds(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
