"""PEFT's refusal of a layer, in our words. Contents: explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from molecli.errors import UsageError


@contextmanager
def explained(where: str, remedy: str) -> Iterator[None]:
    """A context for adding PEFT's layers. Raises: UsageError if PEFT has none for a layer, as of some quantisers."""
    try:
        yield
    except ValueError as error:
        found = re.match(r"Target module (\w+)", str(error))
        if found is None:
            raise
        raise UsageError(where, f"PEFT has no LoRA layer for a {found.group(1)}", remedy) from error
