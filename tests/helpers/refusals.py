"""Checks of refusals whose message names paths or lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from molecli.errors import UserError


def refused(call: Callable[[], Any], code: int, *parts: str) -> None:
    """Asserts that `call` raises a UserError with this exit code whose message has all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.exit_code == code, caught.value
    for part in parts:
        assert part in str(caught.value)
