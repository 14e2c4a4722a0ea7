"""Tables of rows by name: those of this package and those that installed packages add.

A package adds a row with an entry point. Its name is the name of the row, and its value points to the row:

    [project.entry-points."molecli.methods"]
    my_merge = "my_package.my_merge:ROW"

The groups are `molecli.methods`, `molecli.metrics` and `molecli.suites`. Every `mole` command imports the
file with the row, so that heavy imports belong inside its functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar


class Named(Protocol):
    """A row: anything with a name."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


class Table(Mapping[str, R], Generic[R]):
    """Rows of the type `kind` by name, in order: `rows`, then those of the entry points in `group`.

    The row of an entry point is left out, with a warning, if it cannot be loaded, has another type or if its name is
    already taken.
    """

    def __init__(self, group: str, kind: type[R], rows: Iterable[R]) -> None:
        self.group, self.kind = group, kind
        self._shipped = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> R:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def _rows(self) -> dict[str, R]:
        rows = dict(self._shipped)
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            try:
                row = point.load()
            except Exception as error:  # an error in a package must not break every command
                self._leave_out(point, f"{type(error).__name__}: {error}")
                continue
            if not isinstance(row, self.kind):
                self._leave_out(point, f"{point.value} is no {self.kind.__name__}")
            elif row.name != point.name:
                self._leave_out(point, f"the row is called {row.name!r}")
            elif row.name in rows:
                self._leave_out(point, "the name is taken")
            else:
                rows[row.name] = row
        return rows

    def _leave_out(self, point: EntryPoint, why: str) -> None:
        package = point.dist.name if point.dist is not None else point.module
        warnings.warn(f"{point.name!r} of the package {package} is left out of {self.group}: {why}", stacklevel=2)


def load(target: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
