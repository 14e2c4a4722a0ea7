"""`mole evaluate`: scores compositions and fixed modes side by side, with the base loaded once.

Contents: run_evaluate, domain_for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from molecli.catalog.metrics import metric_row
from molecli.commands.domain import Domain, domain_of
from molecli.evaluation.columns import folder_names
from molecli.files.composition import Composition, load_composition
from molecli.mixture.attach import base_of

if TYPE_CHECKING:
    from molecli.config import EvaluateRecipe
    from molecli.evaluation.report import EvaluationReport
    from molecli.protocols import Note, Progress


def run_evaluate(
    recipe: EvaluateRecipe,
    *,
    domain: Domain | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> EvaluationReport:
    """The report of all methods; results.json and the samples are rewritten after each, so nothing finished is lost.

    domain: that of the base, if it is known. note: receives a line when words of a prompt are cut or a metric of the
    suite cannot be computed. Raises: UserError.
    """
    for name in recipe.eval.metrics or ():
        metric_row(name)
    compositions = read_compositions(recipe)
    module = (domain or domain_for(recipe, compositions)).command("evaluate")
    report: EvaluationReport = module.evaluate(recipe, compositions, progress=progress, note=note)
    return report


def read_compositions(recipe: EvaluateRecipe) -> dict[str, Composition]:
    """The compositions to score, by their names in the table."""
    return {name: load_composition(path) for name, path in folder_names(recipe.compositions).items()}


def domain_for(recipe: EvaluateRecipe, compositions: Mapping[str, Composition]) -> Domain:
    """The domain of the recipe's base, or else of the first composition's."""
    return domain_of(base_of(recipe.base, next(iter(compositions.values()), None)))
