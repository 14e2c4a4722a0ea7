"""Which training a method asks for: gates are fitted, LoRAHub's weights searched for, PEFT's classifier trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from molecli.compose import get_method
from molecli.engine.fit import fit
from molecli.engine.search import search

if TYPE_CHECKING:
    from molecli.files.recipe import ComposeRecipe


def learner(recipe: ComposeRecipe) -> Callable[..., Any]:
    """The function that trains what `recipe.mode` learns, called as `fit` is."""
    row = get_method(recipe.mode)
    if row.through_peft:
        from molecli.engine.fit_router import fit_router  # which imports PEFT

        return fit_router
    return partial(search, config=recipe.method) if row.merges else fit
