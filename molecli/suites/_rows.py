"""JSONL files, line by line; errors name the file and the line.

Contents: Row, read_rows, rows_of, task_files, in_order, half_of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from molecli.errors import UsageError
from molecli.protocols import Split


@dataclass(frozen=True)
class Row:
    """One JSON object, with its place for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, *names: str) -> str:
        """The first existing field of `names`. Raises: UsageError if there is none, or it is not text."""
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                if not isinstance(value, str):
                    raise UsageError(self.where, f"the field {name!r} is not text", "Put it in double quotes.")
                return value
        raise UsageError(self.where, f"the field {names[0]!r} is missing", "Every line needs it.")

    def texts(self, name: str) -> tuple[str, ...]:
        """The list of texts in field `name`, () without the field. Raises: UsageError if it is something else."""
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(self.where, f"the field {name!r} is not a list of texts", 'Write ["...", "..."].')
        return tuple(value)

    def inside(self, name: str) -> Row:
        """The object in field `name`, as a row. Raises: UsageError if it is missing or something else."""
        if name not in self.fields:
            raise UsageError(self.where, f"the field {name!r} is missing", "Every line needs it.")
        if not isinstance(self.fields[name], dict):
            raise UsageError(self.where, f"the field {name!r} is not an object", 'Write {"...": ...}.')
        return Row(f"{self.where}, {name}", self.fields[name])


def read_rows(path: str | Path) -> list[Row]:
    """The objects in a JSONL file, or on stdin if `path` is "-"; blank lines are skipped.

    Raises: UsageError if the file is missing, unreadable or empty, or a line is not a JSON object.
    """
    if str(path) == "-":
        return _parsed("stdin", sys.stdin)
    try:
        with open(path, encoding="utf-8") as file:
            return _parsed(str(path), file)
    except FileNotFoundError:
        raise UsageError(str(path), "no such file", "Check the path.") from None
    except IsADirectoryError:
        raise UsageError(str(path), "is a folder, not a JSONL file", "Name a file inside it.") from None
    except UnicodeDecodeError:
        raise UsageError(str(path), "not UTF-8 text", "Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(str(path), f"cannot be read ({error.strerror})", "Check its permissions.") from None


def rows_of(where: str, objects: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of objects that are not from a file; `where` names their source."""
    return [Row(f"{where}, row {number}", fields) for number, fields in enumerate(objects, start=1)]


def _parsed(where: str, lines: Iterable[str]) -> list[Row]:
    rows = [_row(f"{where}, line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UsageError(where, "holds no examples", 'Write one {"input": ..., "target": ...} per line.')
    return rows


def _row(where: str, line: str) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(where, f"not JSON ({error.msg}, column {error.colno})", "Correct that line.") from None
    if not isinstance(fields, dict):
        raise UsageError(where, "not a JSON object", 'Write {"input": ..., "target": ...}.')
    return Row(where, fields)


def task_files(folder: str | Path, pattern: str = "*.jsonl") -> dict[str, Path]:
    """Stem -> file for the JSONL files directly in `folder`. Raises: UsageError if there is no such folder."""
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(str(folder), "no such folder", "Check --data-dir.")
    return {file.stem: file for file in sorted(path.glob(pattern))}


def in_order(names: Sequence[str], present: Iterable[str]) -> list[str]:
    """The `names` that are in `present`, in the order of `names`."""
    found = set(present)
    return [name for name in names if name in found]


def half_of(text: str, seed: int = 0) -> Split:
    """The split of a text if one file is divided into both splits; the same on every machine."""
    return "train" if sha256(f"{seed}/{text}".encode()).digest()[0] % 2 == 0 else "test"
