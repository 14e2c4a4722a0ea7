"""`mole evaluate`: one or many compositions, and fixed modes beside them, on one load of the base.

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
    """The report of a whole run; results.json and the samples are complete after every method.

    `domain` is that of the base, asked for where it is not given. `note` gets what a prompt loses, and which of a
    suite's metrics cannot be computed. Raises: UserError.
    """
    for name in recipe.eval.metrics or ():
        metric_row(name)
    compositions = read_compositions(recipe)
    module = (domain or domain_for(recipe, compositions)).command("evaluate")
    report: EvaluationReport = module.evaluate(recipe, compositions, progress=progress, note=note)
    return report


def read_compositions(recipe: EvaluateRecipe) -> dict[str, Composition]:
    """The compositions that are scored, by their names in the table."""
    return {name: load_composition(path) for name, path in folder_names(recipe.compositions).items()}


def domain_for(recipe: EvaluateRecipe, compositions: Mapping[str, Composition]) -> Domain:
    """The domain of the base that is meant: the recipe's, else that of the first composition."""
    return domain_of(base_of(recipe.base, next(iter(compositions.values()), None)))
