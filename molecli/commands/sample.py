"""`mole sample`: completions or pictures of prompts, by a composition, single LoRAs or the bare base.

run_sample    recipe -> Samples: the whole command
Samples       what was made: what a domain's `sample.sample` returns
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from molecli.commands.domain import Domain, domain_of
from molecli.errors import UsageError
from molecli.files.composition import load_composition
from molecli.mixture.attach import base_of

if TYPE_CHECKING:
    from molecli.config import SampleRecipe
    from molecli.protocols import Note, Progress


class Samples(Protocol):
    """Completions, or pictures and what could not be drawn."""

    def __len__(self) -> int: ...

    def document(self) -> list[dict[str, Any]]:
        """What was made, as JSON holds it."""
        ...

    def lines(self) -> list[str]:
        """What goes to stdout: the completions, or the pictures' paths."""
        ...

    def check(self) -> None:
        """Nothing, when all was made. Raises: RunError."""
        ...


def run_sample(
    recipe: SampleRecipe,
    *,
    domain: Domain | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> Any:
    """What is made of `recipe.prompts`, in order (`Samples`); with `recipe.output` also written there.

    `domain` is that of the base, asked for where it is not given. `note` gets what a prompt loses.
    Raises: UsageError where it is not clear which experts to use; MismatchError where they do not fit.
    """
    if not recipe.prompts:
        raise UsageError("prompts", "there is none", "Write at least one.")
    composition = load_composition(recipe.composition) if recipe.composition else None
    module = (domain or domain_of(base_of(recipe.base, composition))).command("sample")
    return module.sample(recipe, composition, progress=progress, note=note)


def domain_for(recipe: SampleRecipe) -> Domain:
    """The domain of the base that is meant: the recipe's, else the composition's."""
    return domain_of(base_of(recipe.base, load_composition(recipe.composition) if recipe.composition else None))
