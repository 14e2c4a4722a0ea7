"""`mole inspect-gates`: what the gates of a composition do.

Contents: run_inspect, defaults_for, check_gates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.catalog.methods import DEFAULT, get_method
from molecli.commands.domain import Domain, domain_of
from molecli.errors import UsageError
from molecli.evaluation.gate_report import GateReport, write_report
from molecli.files.composition import Composition, load_composition
from molecli.mixture.attach import base_of

if TYPE_CHECKING:
    from molecli.config import InspectGatesRecipe
    from molecli.protocols import Note, Progress


def run_inspect(
    recipe: InspectGatesRecipe,
    *,
    domain: Domain | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
    save: bool = False,
) -> GateReport:
    """The report on the composition of `recipe`; with `save` also gates.json, .csv, .png and entropy.png.

    domain: that of the base, if it is known; on a diffusion base the report is by denoising step. note: receives a line
    when words of a prompt are cut.
    Raises: UsageError if the composition has no gates; MismatchError if base, LoRAs and gates do not belong together.
    """
    composition = load_composition(str(recipe.composition))
    check_gates(str(recipe.composition), composition)
    module = (domain or domain_of(base_of(recipe.base, composition))).command("inspect_gates")
    report: GateReport = module.inspect_gates(recipe, composition, progress=progress, note=note)
    if save:
        write_report(report, Path(recipe.output))
    return report


def check_gates(path: str, composition: Composition) -> None:
    """Raises: UsageError if the composition's mode has no gates."""
    row = get_method(composition.mode)
    if row.level != "site" or not row.trained:
        raise UsageError(path, f"a composition of mode {composition.mode} has no gates", f"Name one of mode {DEFAULT}.")


def defaults_for(path: str, composition: Composition, domain: Domain) -> dict[str, Any]:
    """Keys of the recipe that say what to look at by default."""
    keys: dict[str, Any] = domain.command("inspect_gates").defaults(composition)
    return {"composition": path, **keys}
