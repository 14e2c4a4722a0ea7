"""Safetensors files.

opened            opens one; missing, unreadable and damaged files are explained
in_fixed_order    makes equal content equal bytes
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from molecli.errors import MismatchError, UsageError

_HEADER_ERROR = "Error while deserializing header: "


@contextmanager
def opened(path: Path, *, remedy: str) -> Iterator[Any]:
    """The safetensors file at `path`; tensors are read one by one, to the CPU.

    Raises: UsageError if it cannot be read; MismatchError, with `remedy`, if it is damaged.
    """
    try:
        # Opened by Python first: its OSError has the reason, unlike that of safetensors.
        with path.open("rb") as stream:
            pointer = stream.read(32).startswith(b"version https://git-lfs")
    except OSError as error:
        raise UsageError(
            str(path), f"it cannot be read ({error.strerror})", "Check the path and its permissions."
        ) from None
    if pointer:
        raise MismatchError(str(path), "it is a Git LFS pointer, not the file itself", "Run git lfs pull.")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        reason = str(error).removeprefix(_HEADER_ERROR)
        raise MismatchError(str(path), f"it is a damaged safetensors file ({reason})", remedy) from None


def in_fixed_order(data: bytes) -> bytes:
    """The file `data` with its metadata sorted: safetensors writes them in a random order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
