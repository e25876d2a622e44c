"""`Registry`: what a package holds of one kind (families, commit rules, caches, ...), found by looking into its modules.

Adding one is a new file or folder in that package: nothing else names it. Another installed package adds its own through
the entry point group `unidiff.<kind>`, whose entries name modules.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """Entries by name, a dict that fills itself: the modules are imported at the first look, not before.

    Args:
        kind: what an entry is, for messages and the entry point group, for instance "commit_rules".
        package: full name of the package (or of several) whose modules (and sub-packages) hold the entries.
        name_of: the name of a value found in a module, or None where it is no entry.
    """

    def __init__(self, kind: str, package: str | tuple[str, ...], name_of: Callable[[Any], str | None]) -> None:
        self.kind, self._name_of = kind, name_of
        self.packages = (package,) if isinstance(package, str) else package
        self._searched = False

    def __missing__(self, name: str) -> T:
        if self._searched:
            raise KeyError(name)
        self._search()
        return self[name]

    def __iter__(self) -> Iterator[str]:
        self._search()
        return dict.__iter__(self)

    def __len__(self) -> int:
        self._search()
        return dict.__len__(self)

    if not TYPE_CHECKING:  # a dict's own know only what is in it already; these ask the three above
        __contains__, get = Mapping.__contains__, Mapping.get
        keys, values, items = Mapping.keys, Mapping.values, Mapping.items

    def get_or_refuse(self, name: object, what: str) -> T:
        """The entry of a name.

        Raises:
            ValueError: no such entry; the sentence says what `what` is and lists the names.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        near = difflib.get_close_matches(name, self, 1) if isinstance(name, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} is {name!r:.80}; expected one of {', '.join(self)}{hint}")

    def _search(self) -> None:
        if self._searched:
            return
        entries: dict[str, T] = {}
        for module in self._modules():
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ != module.__name__:
                    continue  # imported from elsewhere
                name = self._name_of(value)
                if name is None:
                    continue
                if entries.setdefault(name, value) is not value:
                    raise ValueError(f"two {self.kind} are called {name!r}; the second is in {module.__name__}")
        self.update(entries)
        self._searched = True

    def _modules(self) -> Iterator[ModuleType]:
        for package in self.packages:
            for found in sorted(iter_modules(import_module(package).__path__), key=lambda found: found.name):
                if not found.name.startswith("_"):
                    yield import_module(f"{package}.{found.name}")
        for entry in sorted(entry_points(group=f"unidiff.{self.kind}"), key=lambda entry: entry.name):
            module = entry.load()
            if isinstance(module, ModuleType):
                yield module
