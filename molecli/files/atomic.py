"""Atomic writes: to a temporary file next to the target, flushed, then renamed.

Contents: write_bytes, write_text, write_with, atomic_folder, append_jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molecli.errors import RunError


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes `data` to the path, which is returned. Raises: RunError if that fails."""
    return write_with(path, lambda part: part.write_bytes(data))


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` to the path, which is returned, as UTF-8 with unchanged line ends."""
    return write_bytes(path, text.encode("utf-8"))


def write_with(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Lets `write(temporary path)` write the path, which is returned; if it fails, the old content stays."""
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            write(part)
            part.chmod(0o666 & ~_umask())  # mkstemp makes the file private
            _flush(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends, and is removed if the block raises.

    With `replace` an existing folder is replaced, by two renames: a reader between them finds no folder, never half
    of one. Without it, only an empty folder is replaced.
    Raises: RunError if `path` cannot be written.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield part
        with _explained(path):
            part.chmod(0o777 & ~_umask())
            for file in part.rglob("*"):
                if file.is_file():
                    _flush(file)
            _take_place(part, path, replace)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Appends `row` as a line to `path`, in one call so that lines never interleave."""
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _take_place(part: Path, path: Path, replace: bool) -> None:
    if not replace or not path.exists():
        os.replace(part, path)  # POSIX replaces an empty folder and refuses a full one
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(str(path), f"cannot be written ({reason})", "Check the folder and the free space.") from None
