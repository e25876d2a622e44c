"""Keys of an upstream configuration: which are used, which change nothing here, which are refused unless neutral."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from unidiff.errors import json_name, plain
from unidiff.schema import Positive, check_value

NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, "", "none", "default")
"""Values that mean "off" for an option that is not built; so do an empty list and an empty mapping."""

# Names of options that change what a network computes. A key with such a name that no table lists is refused unless
# it is off: nobody can know today what an option of tomorrow is called, but it will be called something like this.
_COMPUTING = re.compile(
    r"soft_?cap|alibi|sliding|window|clip|rope|rotary|yarn|scale|scaling|multiplier|residual|expert|moe|mup|bias"
    r"|norm|activation|hidden_act|act_fn|logit|parallel|attention_type|attn_type|layer_types|head_dim|head_size"
    r"|multi_query|kv_heads|adapter|lora|causal|is_decoder|encoder_decoder|cross_attention|tie_|tying|quantization"
    r"|position_embedding|nextn|pruned|mrope|prefix_lm|_cond|cond_"
)
_TRAINING = re.compile(r"dropout|^init|initializer|loss|coef|_lr$|learning|norm_topk|rescale|_scale_factor$")
_NAMES = {"_class_name": str | None, "model_type": str | None, "architectures": list[str] | None}
"""What tells families apart, and its types."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the caller adds its file."""


class Argument(NamedTuple):
    """A key that becomes the argument `ours` of our network; `default` is upstream's, without one the key is needed."""

    ours: str
    kind: Any
    default: Any = ...


@dataclass(frozen=True)
class ConfigKeys:
    """The keys of one (section of a) configuration.

    Args:
        what: whose, for messages.
        used: keys that are read: types, or an `Argument`.
        needed: keys without a default besides.
        fixed: options that would change the computation, with the values that are built here, the usual one first.
        harmless: keys that change nothing here.
        closed: refuse keys that are in no table. Otherwise only those whose names speak of the computation are.
    """

    what: str
    used: Mapping[str, Any]
    needed: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: Collection[str] = ()
    closed: bool = False

    def check(self, config: Any) -> None:
        """Raise `ConfigError` for the first key that is missing, of another type, or not built here."""
        if not isinstance(config, Mapping):
            raise ConfigError(f"{self.what} is {json_name(config)}; expected named settings")
        needed = (key for key, kind in self.used.items() if isinstance(kind, Argument) and kind.default is ...)
        for key in (*needed, *self.needed):
            if key not in config:
                raise ConfigError(f"its config has no {key!r}, which {self.what} needs")
        for key, value in config.items():
            if not isinstance(key, str):
                raise ConfigError(f"config has the key {key!r}; expected names")
            kind = self.used.get(key, _NAMES.get(key))
            if key in self.fixed:
                allowed = self.fixed[key]
                if not any(type(value) is type(one) and value == one for one in allowed):
                    raise ConfigError(f"config has {key} = {_short(value)}; only {allowed[0]!r} is supported")
            elif kind is not None:
                check_setting(key, value, kind.kind if isinstance(kind, Argument) else kind)
            elif key not in self.harmless and not key.startswith("_"):
                self._check_unknown(key, value)

    def _check_unknown(self, key: str, value: Any) -> None:
        if self.closed:
            known = sorted({*self.used, *self.fixed, *self.harmless})
            raise ConfigError(f"unknown {self.what} config keys [{plain(key)!r}]; expected some of {known}")
        if _COMPUTING.search(key.lower()) and not _TRAINING.search(key.lower()) and not _is_neutral(value):
            raise ConfigError(
                f"config has {plain(key)} = {_short(value)}, which may change what the network computes and is not built "
                f"for {self.what}; if it changes nothing, remove it from the config"
            )

    def read(self, config: Any) -> dict[str, Any]:
        """Arguments of our network: the keys with an `Argument`, for null and nothing upstream's defaults; checked before."""
        self.check(config)
        taken = {key: kind for key, kind in self.used.items() if isinstance(kind, Argument)}
        return {a.ours: a.default if config.get(key) is None else config[key] for key, a in taken.items()}


def check_setting(key: str, value: Any, kind: Any) -> None:
    """Raise `ConfigError` unless a value is of a type."""
    try:
        check_value(value, kind, f"config {key}")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_names(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where what tells families apart is not text."""
    for key, kind in _NAMES.items():
        check_setting(key, config.get(key), kind)


def plain_rope_theta(config: Mapping[str, Any], default: float) -> float:
    """The base of plain rotary positions, in the older spelling (`rope_theta`) or the newer (`rope_parameters`);
    `ConfigError` for scaled positions, which are not built, or two different bases.
    """
    theta = config.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config {name} is {_short(rope)}; expected a mapping or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or set(rope) - {"rope_type", "type", "rope_theta"}:
            raise ConfigError(f"config has {name} = {_short(dict(rope))}; only plain rotary positions are supported")
        inner = rope.get("rope_theta", theta)
        if "rope_theta" in rope:
            check_setting("rope_theta", inner, Positive)
        if theta is not None and inner != theta:
            raise ConfigError(f"config has rope_theta = {theta!r} and {inner!r}; keep one")
        theta = inner
    return float(default if theta is None else theta)


def section(config: Any, *names: str) -> Mapping[str, Any]:
    """A section inside sections; empty where any of them is not there, for telling families apart."""
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def _is_neutral(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return not value
    return any(value is one or (not isinstance(value, bool) and value == one) for one in NEUTRAL)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:90]}... ({json_name(value)})"
