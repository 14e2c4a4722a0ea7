"""`mole train-lora`: trains one adapter on a frozen base, from a suite's tasks or a few pictures.

Contents: run_train_lora, domain_to_train.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.commands.domain import IMAGES, Domain, domain_of
from molecli.training.checkpoints import finished_report
from molecli.training.ranks import accelerator_for, share_from_main

if TYPE_CHECKING:
    from molecli.config import TrainLoraRecipe
    from molecli.protocols import Note, Progress


def run_train_lora(
    recipe: TrainLoraRecipe,
    *,
    domain: Domain | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Trains the adapter of `recipe` into its output folder; returns the report, which is also written there.

    domain: that of the base, if it is known. resume: go on from the last checkpoint; a finished run is returned as it
    is. note: receives a line when words of a prompt are cut. Raises: UserError.
    """
    accelerator = accelerator_for(recipe.device)
    found = finished_report(Path(recipe.output), recipe) if resume and accelerator.is_main_process else None
    done: Any = share_from_main(found, accelerator)
    if done is not None:
        return done
    module = (domain or domain_to_train(recipe)).command("train_lora")
    report: dict[str, Any] = module.train_lora(recipe, accelerator, resume=resume, progress=progress, note=note)
    return report


def domain_to_train(recipe: TrainLoraRecipe) -> Domain:
    """The recipe's domain: images if it has pictures to learn from, whichever base is named."""
    return IMAGES if recipe.pictures is not None else domain_of(recipe.base)
