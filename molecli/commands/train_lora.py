"""`mole train-lora`: one adapter trained on a frozen base, on a suite's tasks or on a few pictures.

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

    `domain` is that of the base, asked for where it is not given; on a diffusion base `note` gets what a prompt loses.
    A run that is already finished is returned as it is (with `resume`). Raises: UserError.
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
    """The domain that the recipe is for: pictures to learn from are for a diffusion base, whatever base is named."""
    return IMAGES if recipe.pictures is not None else domain_of(recipe.base)
