"""`Family`: what is known of one released family, as data; `FAMILIES` finds those of the modules beside this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unidiff.families.checkpoint.config_keys import ConfigError
from unidiff.families.checkpoint.keymap import PREFIXES, KeyMap, assemble, strip_prefixes, unwrap
from unidiff.models.transformer import MaskedTransformer
from unidiff.registry import Registry
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.weights.files import AnyTensor, build_on_meta, in_memory

Config = Mapping[str, Any]
Spelling = Mapping[str, Any]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Release:
    """One published model.

    Args:
        config: upstream's, as published; what no publication states is left out.
        parameters: their number as stated, None where no number is.
        tolerance: relative, one unit of its last digit (some are cut off rather than rounded).
    """

    name: str
    config: Config
    parameters: int | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Tiny:
    """A tiny model with weights from a formula, and what it answered when all reference data passed.

    A machine, a torch version or an edit that changes the arithmetic of a family, its key map or its config map changes
    these numbers. They say nothing about downloaded weights.

    Args:
        config: upstream's. vocabulary: id layout, where the config implies none. measured: settings that only weights tell.
        answer: mean, deviation, first and last value of the answer.
    """

    config: Config
    answer: tuple[float, float, float, float]
    vocabulary: Vocabulary | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One released family.

    Args:
        name: short name.
        keys: regular expressions; weights are this family's when each finds some name (without prefixes).
        rows: rows of released weights, by the ends of their names, that tell it from others with the same keys.
        fits: whether a config is this family's.
        settings: arguments of `network` for an upstream configuration. `ConfigError`: an option that is not built.
        keymap: the names of a network's weights, in one of the spellings that occur.
        network: our class; of an image tokenizer, that of its autoencoder.
        vocabulary: id layout of a config; None for image tokenizers.
        vocabularies: released id layouts by name, for `named_vocabulary`.
        chosen_vocabulary: whether the caller may lay the ids out otherwise than the config says.
        image_tokenizer: name of the family whose codes it reads.
        prefix: of released names, which weights may come without.
        spelling: (names, config) to what else the key map needs to know of how the weights are named.
        measured: settings that the weights tell: rows of a weight, by its name without prefixes.
        default_config: config for weights of these names where none is given; None where it takes one.
        averaged: whether the averaged weights of a Lightning file are taken, which have an order and no names.
        constants: released names of buffers that the architecture fixes.
        carried: regular expressions; weights of these names are of parts that no task here runs. They are kept as they are.
        priority: of several families that fit a config, the highest is meant.
        releases: the published models, in the order of their size.
        unstated: settings that no publication states.
        sections: names of further files of settings beside the config (`NAME.json`), each a section of it.
        beside: lets a network know what else lies beside its folder, and reads nothing of it.
        layout: how the pipeline's tasks become rows of this family and are read back; None without a pipeline.
        examine: looks at what lies beside the weights, for an id layout: by what was looked at, whether it holds, and the details.
        latents: pictures of a folder and a loaded network as latents, see `PictureLatents`; None for families with codes.
    """

    name: str
    keys: tuple[str, ...]
    fits: Callable[[Config], bool]
    settings: Callable[[Config], dict[str, Any]]
    keymap: Callable[[Any, Spelling], KeyMap]
    tiny: Tiny
    network: Any = MaskedTransformer
    rows: Mapping[str, int] = field(default_factory=dict)
    vocabulary: Callable[[Config], Vocabulary] | None = None
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    chosen_vocabulary: bool = False
    image_tokenizer: str | None = None
    prefix: str = ""
    spelling: Callable[[Iterable[str], Config], Spelling] = lambda names, config: {}
    measured: Mapping[str, str] = field(default_factory=dict)
    default_config: Callable[[Iterable[str]], Config] | None = None
    averaged: bool = False
    constants: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    priority: int = 0
    releases: tuple[Release, ...] = ()
    unstated: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    beside: Callable[[nn.Module, Path], None] | None = None
    layout: Any = None
    examine: Callable[[Path, Vocabulary], Mapping[str, tuple[bool, str]]] | None = None
    latents: Callable[[Path, Any], Any] | None = None

    def has_keys(self, names: Iterable[str], some: bool = False) -> bool:
        """Whether weights of these names are this family's, or with `some` may be a part of them."""
        names = list(names)
        return (any if some else all)(any(re.search(mark, name) for name in names) for mark in self.keys)

    def has_rows(self, weights: Mapping[str, Any]) -> bool:
        """Whether weights, by name, have the numbers of rows that only this family's released ones have."""
        first = {name: tuple(getattr(value, "shape", ()))[:1] for name, value in weights.items()}
        own = [(rows,) in [first[n] for n in first if n.endswith(end)] for end, rows in self.rows.items()]
        return bool(own) and all(own)

    def carries(self, name: str) -> bool:
        """Whether a weight of this name is kept as it is."""
        return any(re.search(pattern, name) for pattern in self.carried)

    def make(self, config: Config, **more: Any) -> Any:
        """The network of an upstream configuration, with fresh weights; `more` settings win."""
        return self.network(**{**self.settings(config), **more})

    def load(
        self,
        state: Mapping[str, Any],
        config: Config | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> tuple[Any, Vocabulary | None]:
        """The network (or image tokenizer) in evaluation mode and the id layout, from released weights.

        Args:
            state: upstream's names to weights; training prefixes and a top-level `model` or `state_dict` are removed.
            dtype: of the floating-point weights; None keeps the checkpoint's.
            device: where to; None for where they are (weights in a file: the CPU).
            vocabulary: another id layout, where the config does not imply one.

        Raises:
            ValueError: a config that is not built, or weights left over, missing, misshaped or not finite.
        """
        weights = strip_prefixes(unwrap(state), (*PREFIXES, *filter(None, [self.prefix])))
        weights = {name: value for name, value in weights.items() if not self.carries(name)}
        if not config and self.default_config is not None:
            config = self.default_config(weights)
        config = config or {}
        sides = {name: tuple(getattr(weights.get(weight), "shape", ())) for name, weight in self.measured.items()}
        settings = {**self.settings(config), **{name: shape[0] for name, shape in sides.items() if shape}}
        network = build_on_meta(self.network, settings)
        keymap = self.keymap(network, self.spelling(weights, config))
        if self.averaged and (ema := state.get("ema")):
            weights |= zip(keymap.names(), _shadow(ema, len(keymap.names())), strict=True)
        ids = self._ids(config, vocabulary, settings)
        loaded = assemble(network, keymap, weights, dtype, device)
        return (VQImageTokenizer(loaded) if ids is None else loaded), ids

    def export(self, model: Any, spelling: Spelling = _NOTHING) -> dict[str, Tensor]:
        """The weights of a network or image tokenizer under released names."""
        network = model.model if isinstance(model, VQImageTokenizer) else model
        if not isinstance(network, self.network):
            kind = type(network).__name__
            raise ValueError(f"the model is a {kind}; {self.name} names are for a {self.network.__name__}")
        theirs = self.keymap(network, spelling).to_theirs(network.state_dict(), bool(spelling.get("copies")))
        return {f"{self.prefix}{name}": value for name, value in theirs.items()}

    def _ids(self, config: Config, given: Vocabulary | None, settings: Mapping[str, Any]) -> Vocabulary | None:
        if self.vocabulary is None:
            return None
        ids = given if given is not None and self.chosen_vocabulary else self.vocabulary(config)
        if given not in (None, ids):
            raise ValueError("the config of this family fixes the vocabulary; leave the argument out")
        if self.chosen_vocabulary and ids.size != settings["vocab_size"]:
            raise ValueError(f"the vocabulary has {ids.size} ids, but the config has {settings['vocab_size']}")
        return ids


@dataclass(frozen=True)
class Released:
    """A released model, ready to run.

    Attributes:
        model: the network in evaluation mode (for an image tokenizer, the autoencoder inside).
        vocabulary: id layout; None for an image tokenizer. config: upstream's configuration.
        spelling: what else the released names of the weights need.
        constants: buffers that the architecture fixes, as the checkpoint stored them, under released names.
        carried: weights of parts that no task here runs, as they are stored, under released names; not read before they are needed.
        folder: of the whole checkpoint, for families that have more parts in it.
    """

    family: Family
    model: nn.Module
    vocabulary: Vocabulary | None
    config: Config
    spelling: Spelling = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None
    carried: Mapping[str, AnyTensor] = field(default_factory=dict)

    @property
    def images(self) -> VQImageTokenizer | None:
        """The image tokenizer, where it is one."""
        return VQImageTokenizer(self.model) if self.family.vocabulary is None else None

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under released names; constants only where the checkpoint held them."""
        weights = self.family.export(self.model, self.spelling)
        return {n: v for n, v in weights.items() if n not in self.family.constants} | self.kept()

    def kept(self) -> dict[str, Tensor]:
        """What the checkpoint held besides the network's own weights, under released names."""
        return dict(self.constants) | {name: in_memory(value) for name, value in self.carried.items()}


def config_names(config: Config, *architectures: str, model_type: str | None = None) -> bool:
    """Whether a config names one of these classes or this model type."""
    listed = config.get("architectures")
    named = [*(listed if isinstance(listed, list | tuple) else ()), config.get("_class_name")]
    typed = model_type is not None and config.get("model_type") == model_type
    return typed or any(name in architectures for name in named)


def special_ids(config: Config, *names: str) -> dict[str, int]:
    """The ids `<name>_token_id` that a config states, by name."""
    return {name: config[f"{name}_token_id"] for name in names if config.get(f"{name}_token_id") is not None}


def text_vocabulary(size: int, specials: Mapping[str, int], usual: str) -> Vocabulary:
    """Text ids only, with [MASK] (`mask` in the specials) inside the range; `usual` is that of the released models."""
    ids = dict(specials)
    if "mask" not in ids:
        raise ConfigError(f"the config has no mask_token_id; expected the id of [MASK] ({usual})")
    return Vocabulary(size, (0, size), (size, size), ids.pop("mask"), specials=ids)


def copied_head(names: Iterable[str], tied: bool, head: str) -> Spelling:
    """A tied head that lies in the file all the same is written back as well."""
    return {"copies": True} if tied and any(re.search(rf"(^|\.){re.escape(head)}$", name) for name in names) else {}


def _shadow(ema: Any, count: int) -> list[Tensor]:
    """The averaged weights of a Lightning file."""
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list) or not all(hasattr(value, "shape") for value in shadow):
        raise ValueError("the checkpoint's ema holds no list shadow_params of weights; download it again")
    if len(shadow) != count:
        raise ValueError(f"the checkpoint has {len(shadow)} EMA weights; the config asks for {count}")
    return shadow


FAMILIES: Registry[Family] = Registry(
    "families", "unidiff.families", lambda value: value.name if isinstance(value, Family) else None
)


def named_vocabulary(name: str) -> Vocabulary:
    """A released id layout: `unidisc-vq16`, `unidisc-magvit`, `mdlm`, `llada`, `mmada`, `lumina`, `muddit`, ..."""
    layouts = {known: ids for family in FAMILIES.values() for known, ids in family.vocabularies.items()}
    if name not in layouts:
        raise ValueError(f"unknown vocabulary {name!r}; expected one of {sorted(layouts)}")
    return layouts[name]


def recognise(config: Config, names: Iterable[str] | Mapping[str, Any]) -> Family:
    """The family of a config (may be empty) and of weights, by name, or their names alone, without prefixes.

    Raises:
        ValueError: none, a config and weights of different families, or several that only a config tells apart.
    """
    weights, names = names if isinstance(names, Mapping) else {}, list(names)
    by_keys = [family for family in FAMILIES.values() if family.has_keys(names)]
    by_config, by_rows = fitting(config), [family for family in by_keys if family.has_rows(weights)]
    if by_rows and all(found.priority < by_rows[0].priority for found in by_config):
        return _only(by_rows)
    if both := [family for family in by_config if family in by_keys]:
        return _only(both)
    if not by_keys and (part := [family for family in by_config if family.has_keys(names, some=True)]):
        return _only(part)  # loading will say what is missing
    keys, listed = _list(by_keys), ", ".join(names[:3])
    if by_config and names:
        raise ValueError(
            f"the config describes {_list(by_config)}, but the weights are those of {keys or 'no known family'} "
            f"({listed}, ...); put the config and the weights of one model together"
        )
    if config and by_keys:
        meant = next((family for family in by_keys if family.default_config is not None), by_keys[0])
        hint = f"its config has no marks of that family ({', '.join(sorted(config)[:4])}, ...)"
        raise ValueError(f"the weights are those of {keys}, but {hint}; name the family, for instance {meant.name!r}")
    if len(by_keys) == 1:
        return by_keys[0]
    if by_keys:
        hint = "which only a config.json tells apart; add it, or name the family"
        raise ValueError(f"the weights may be those of {keys}, {hint}")
    known = f"expected one of {sorted(FAMILIES)}"
    raise ValueError(f"no known family has weights named {listed or 'like that'}, ...; {known}")


def fitting(config: Config) -> list[Family]:
    """The families that a config describes; where there are several, those of the highest priority. None for an empty one."""
    found = [family for family in FAMILIES.values() if config and family.fits(config)]
    return [family for family in found if family.priority == max(one.priority for one in found)]


def _only(families: list[Family]) -> Family:
    if len(families) > 1:
        hint = f"name the family, for instance {families[0].name!r}"
        raise ValueError(f"the config describes {_list(families)} alike; {hint}")
    return families[0]


def _list(families: Iterable[Family]) -> str:
    return " or ".join(family.name for family in families)
