"""YAML files to frozen dataclasses: one loader for every recipe. Unknown keys and wrong types are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (YAML) into `schema`, then apply `key.sub=value` overrides.

    Args:
        schema: a frozen dataclass, nested ones allowed; its defaults fill whatever the file leaves out.
        path: a YAML file, or None for the defaults alone.
        overrides: dotted assignments as typed on a command line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown key, or a value of the wrong type; the message names it.
    """
    layers = [OmegaConf.structured(schema)]
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"config file {str(path)!r} does not exist")
        layers.append(_read_yaml(path))
    if bad := [o for o in overrides if "=" not in o]:
        raise ValueError(f"override {bad[0]!r} is not of the form key=value")
    layers.append(OmegaConf.from_dotlist(list(overrides)))
    try:
        return OmegaConf.to_object(OmegaConf.merge(*layers))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f" (at {error.full_key})" if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path or schema.__name__}: {reason}{key}") from error


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path} holds a list; expected `key: value` lines")
    return content


def dump_config(config: object) -> str:
    """The YAML text of a config dataclass; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
