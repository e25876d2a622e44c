"""`Family`: what is known of one released family, as data; each family's folder (or image tokenizer's file) holds its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unidiff.tokens.vocabulary import Vocabulary

Config = Mapping[str, Any]
Loader = Callable[..., tuple[Any, Vocabulary | None]]
Spelling = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One released family.

    Args:
        name: short name.
        keys: regular expressions; weights are this family's when each finds some name (without prefixes).
        fits: whether a config is this family's.
        load: `(state, config, dtype=, device=, vocabulary=)` to (model or image tokenizer, vocabulary or None).
        export: (model or image tokenizer, spelling) to weights under released names.
        vocabulary: id layout of a config; None for image tokenizers.
        image_tokenizer: name of the family whose codes it reads.
        spelling: (names, config) to what else `export` needs: spellings of the same weights that occur.
        needs_config: whether the config is more than a default.
        constants: released names of buffers that the architecture fixes.
        priority: of several families that fit a config, the highest is meant.
        layout: how the pipeline's tasks become rows of this family and are read back; None without a pipeline.
    """

    name: str
    keys: tuple[str, ...]
    fits: Callable[[Config], bool]
    load: Loader
    export: Callable[[Any, Spelling], dict[str, Tensor]]
    vocabulary: Callable[[Config], Vocabulary] | None = None
    image_tokenizer: str | None = None
    spelling: Callable[[Iterable[str], Config], Spelling] = lambda names, config: {}
    needs_config: bool = True
    constants: tuple[str, ...] = ()
    priority: int = 0
    layout: Any = None

    def has_keys(self, names: Iterable[str]) -> bool:
        """Whether weights of these names are this family's."""
        return all(self._found(names))

    def has_some_keys(self, names: Iterable[str]) -> bool:
        """Whether weights of these names may be a part of this family's."""
        return any(self._found(names))

    def _found(self, names: Iterable[str]) -> list[bool]:
        names = list(names)
        return [any(re.search(mark, name) for name in names) for mark in self.keys]


def config_names(config: Config, *architectures: str, model_type: str | None = None) -> bool:
    """Whether a config names one of these classes or this model type."""
    listed = config.get("architectures")
    named = [*(listed if isinstance(listed, list | tuple) else ()), config.get("_class_name")]
    return any(name in architectures for name in named) or (
        model_type is not None and config.get("model_type") == model_type
    )


def copied_head(names: Iterable[str], tied: bool, head: str) -> Spelling:
    """A tied head that lies in the file all the same is written back as well."""
    return {"copies": True} if tied and any(re.search(rf"(^|\.){re.escape(head)}$", name) for name in names) else {}


def denoiser(load: Loader) -> Loader:
    """For families whose config alone fixes the vocabulary."""

    def call(state: Config, config: Config, *, vocabulary: Vocabulary | None = None, **kwargs: Any) -> Any:
        model, implied = load(state, config, **kwargs)
        if vocabulary is not None and vocabulary != implied:
            raise ValueError("the config of this family fixes the vocabulary; leave the argument out")
        return model, implied

    return call


def tokenizer(load: Callable[..., Any]) -> Loader:
    """For image tokenizers."""

    def call(state: Config, config: Config, *, vocabulary: Vocabulary | None = None, **kwargs: Any) -> Any:
        return load(state, config or None, **kwargs), None

    return call
