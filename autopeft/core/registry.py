"""Names to classes, without importing anything before it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from autopeft.errors import UnknownPlugin, UsageError

__all__ = ["Registry"]

T = TypeVar("T")

_PYTHON = "py:"


class Registry(Generic[T]):
    """The plug-ins of one room: a literal table of `"module:Class"` texts, other packages' entry points, and `add`.

    Args:
        noun: what a plug-in of this room is called, for messages: `method`, `scorer`.
        group: entry-point group that other packages register under: `autopeft.methods`.
        builtin: the room's own table.
    """

    def __init__(self, noun: str, group: str, builtin: Mapping[str, str]) -> None:
        self.noun = noun
        self.group = group
        self._builtin = dict(builtin)
        self._added: dict[str, type[T]] = {}
        self._named: dict[str, type[T]] = {}
        self._found: Mapping[str, str] | None = None

    def _table(self) -> dict[str, str | type[T]]:
        # Looking through the installed packages takes milliseconds, and nothing is installed while a process runs.
        if self._found is None:
            self._found = self._installed()
        return {**self._found, **self._added}

    def _installed(self) -> dict[str, str]:
        table = dict(self._builtin)
        for point in entry_points(group=self.group):
            if table.get(point.name, point.value) != point.value:
                raise UsageError(
                    f"two packages call a {self.noun} {point.name!r}: {table[point.name]} and {point.value}; rename one"
                )
            table[point.name] = point.value
        return table

    def add(self, name: str, cls: type[T]) -> None:
        """Register a class for this process, from a notebook or a test.

        Raises:
            UsageError: when the name is taken.
        """
        if name in self._table():
            raise UsageError(f"a {self.noun} called {name!r} exists already")
        self._added[name] = cls

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._table()))

    def __contains__(self, name: object) -> bool:
        return name in self._table()

    def __getitem__(self, name: str) -> type[T]:
        """The class behind a name, imported now; `py:package.module:Class` names one that nobody registered.

        Raises:
            UnknownPlugin: with a guess at the name that was meant, or when the class cannot be imported.
        """
        if name.startswith(_PYTHON):
            # As `python -m` does, whatever command was started: the module may lie in the folder that one works in.
            sys.path.insert(0, "")
            try:
                self._named[name] = self._load(name, name.removeprefix(_PYTHON))
            finally:
                sys.path.remove("")
            return self._named[name]
        table = self._table()
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownPlugin(f"no {self.noun} is called {name!r}.{guess} Known: {', '.join(sorted(table))}.")
        target = table[name]
        return target if not isinstance(target, str) else self._load(name, target)

    def _load(self, name: str, target: str) -> type[T]:
        module, _, attribute = target.partition(":")
        try:
            loaded: type[T] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownPlugin(f"the {self.noun} {name!r} cannot be loaded from {target}: {error}") from error
        return loaded

    def name_of(self, cls: type) -> str:
        """The name a class is registered under.

        Raises:
            UnknownPlugin: when it is not registered.
        """
        for name, target in {**self._table(), **self._named}.items():
            if target is cls or target == f"{cls.__module__}:{cls.__qualname__}":
                return name
        raise UnknownPlugin(f"{cls.__module__}:{cls.__qualname__} is not a registered {self.noun}")
