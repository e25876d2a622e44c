"""The registry of released families: `FAMILIES` finds the `Family` objects of the folders beside this file."""

from __future__ import annotations

from collections.abc import Iterable

from unidiff.families.family import Config, Family
from unidiff.registry import Registry
from unidiff.tokens.vocabulary import Vocabulary

FAMILIES: Registry[Family] = Registry(
    "families",
    ("unidiff.families", "unidiff.families.image_tokenizers"),
    lambda value: value.name if isinstance(value, Family) else None,
)


def named_vocabulary(name: str) -> Vocabulary:
    """A released id layout: `unidisc-vq16`, `unidisc-magvit`, `mdlm`, `llada`, `mmada`, `lumina`, `muddit`, ...

    Raises:
        ValueError: no family has one of that name.
    """
    layouts = {known: ids for family in FAMILIES.values() for known, ids in family.vocabularies.items()}
    if name not in layouts:
        raise ValueError(f"unknown vocabulary {name!r}; expected one of {sorted(layouts)}")
    return layouts[name]


def recognise(config: Config, names: Iterable[str]) -> Family:
    """The family of a config (may be empty) and of weight names without prefixes.

    Raises:
        ValueError: none, a config and weights of different families, or several that only a config tells apart.
    """
    names = list(names)
    by_keys = [family for family in FAMILIES.values() if family.has_keys(names)]
    by_config = fitting(config)
    if both := [family for family in by_config if family in by_keys]:
        return _only(both)
    if not by_keys and (part := [family for family in by_config if family.has_some_keys(names)]):
        return _only(part)  # loading will say what is missing
    keys, listed = _list(by_keys), ", ".join(names[:3])
    if by_config and names:
        raise ValueError(
            f"the config describes {_list(by_config)}, but the weights are those of {keys or 'no known family'} "
            f"({listed}, ...); put the config and the weights of one model together"
        )
    if config and by_keys:
        only = [f for f in by_keys if f.default_config is not None]
        hint = f"its config has no marks of that family ({', '.join(sorted(config)[:4])}, ...)"
        raise ValueError(
            f"the weights are those of {keys}, but {hint}; name the family, for instance {(only or by_keys)[0].name!r}"
        )
    if len(by_keys) == 1:
        return by_keys[0]
    if by_keys:
        raise ValueError(
            f"the weights may be those of {keys}, which only a config.json tells apart; add it, or name the family"
        )
    raise ValueError(
        f"no known family has weights named {listed or 'like that'}, ...; expected one of {sorted(FAMILIES)}"
    )


def fitting(config: Config) -> list[Family]:
    """The families that a config describes; where there are several, those of the highest priority. None for an empty one."""
    found = [family for family in FAMILIES.values() if config and family.fits(config)]
    return [family for family in found if family.priority == max(one.priority for one in found)]


def _only(families: list[Family]) -> Family:
    if len(families) > 1:
        raise ValueError(
            f"the config describes {_list(families)} alike; name the family, for instance {families[0].name!r}"
        )
    return families[0]


def _list(families: Iterable[Family]) -> str:
    return " or ".join(family.name for family in families)
