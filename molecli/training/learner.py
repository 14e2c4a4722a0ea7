"""The training that a method needs: gates are fitted, a merge's weights are searched, PEFT's router is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from molecli.training.fit_gates import fit
from molecli.training.search_weights import search

if TYPE_CHECKING:
    from molecli.catalog.methods import Method
    from molecli.config import MethodConfig


def learner(row: Method, config: MethodConfig) -> Callable[..., Any]:
    """The function that trains the method of `row`. It is called like `fit`."""
    if row.family == "peft":
        from molecli.training.fit_router import fit_router  # which imports PEFT

        return fit_router
    return partial(search, config=config, mode=row.name) if row.family == "merges" else fit
