"""`mole sample`: completes or draws prompts with a composition, a single LoRA or the bare base.

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
        """The samples as a JSON document."""
        ...

    def lines(self) -> list[str]:
        """The lines for stdout: the completions, or the pictures' paths."""
        ...

    def check(self) -> None:
        """Raises: RunError if something could not be drawn."""
        ...


def run_sample(
    recipe: SampleRecipe,
    *,
    domain: Domain | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> Any:
    """The completions or pictures of `recipe.prompts`, in order; with `recipe.output` also written there.

    domain: that of the base, if it is known. note: receives a line when words of a prompt are cut.
    Raises: UsageError if it is not clear which LoRAs to use; MismatchError if they do not fit the base.
    """
    if not recipe.prompts:
        raise UsageError("prompts", "there is none", "Write at least one.")
    composition = load_composition(recipe.composition) if recipe.composition else None
    module = (domain or domain_of(base_of(recipe.base, composition))).command("sample")
    return module.sample(recipe, composition, progress=progress, note=note)


def domain_for(recipe: SampleRecipe) -> Domain:
    """The domain of the recipe's base, or else of the composition's."""
    return domain_of(base_of(recipe.base, load_composition(recipe.composition) if recipe.composition else None))
