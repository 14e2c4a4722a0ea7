"""`mole compose`: makes one composition of trained LoRAs, learned or fixed, and scores it beside them.

run_compose    recipe -> ComposeReport: the whole command
Task           a recipe on one kind of base, complete and checked: what a domain's `compose.prepare` returns
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from molecli import __version__
from molecli.bases import prompt_record
from molecli.bases.language import seeded
from molecli.bases.loading import load_backbone
from molecli.bases.weights import BaseWeights
from molecli.catalog.methods import ALONE
from molecli.commands.domain import Domain, domain_of
from molecli.config import dump_recipe
from molecli.evaluation.tables import to_markdown
from molecli.files.atomic import write_text
from molecli.files.composition import Composition, record_of, save_composition
from molecli.mixture.attach import read_experts
from molecli.mixture.build import build_mixture
from molecli.mixture.merged import MergedMixture
from molecli.training.checkpoints import REPORT_FILE, discard_checkpoints, finished_report, recipe_digest
from molecli.training.ranks import accelerator_for, share_from_main

if TYPE_CHECKING:
    from molecli.catalog.methods import Method
    from molecli.config import ComposeRecipe
    from molecli.evaluation.report import EvaluationReport
    from molecli.experts import Expert
    from molecli.mixture.mixture import Mixture
    from molecli.protocols import Backbone, Note, Progress
    from molecli.training.loop import Record

# A loss larger than this share of a LoRA's update is noted.
MOSTLY = 0.5


class Task(Protocol):
    """A recipe on one kind of base: complete, and checked before anything is loaded.

    recipe: the complete recipe. row: the mode's row in the catalogue.
    triggers, kinds: trigger words and kind of concept of each LoRA, by name.
    rows: what is learned from, empty if the mode learns nothing. examples: how many of them differ.
    passes: mean number of passes of the base in a training step. scored: number of examples for the scores.
    """

    @property
    def recipe(self) -> ComposeRecipe: ...

    @property
    def row(self) -> Method: ...

    @property
    def triggers(self) -> Mapping[str, str]: ...

    @property
    def kinds(self) -> Mapping[str, str]: ...

    @property
    def rows(self) -> Sequence[Any]: ...

    @property
    def examples(self) -> int: ...

    @property
    def passes(self) -> float: ...

    @property
    def scored(self) -> int: ...

    def learn(self, backbone: Any, mixture: Mixture, **how: Any) -> list[Record]:
        """Trains the mixture with the mode's `learner`, which gets `how`; returns the entries of the training log."""
        ...

    def finish(
        self, backbone: Any, experts: Sequence[Expert], mixture: Mixture, progress: Progress | None
    ) -> EvaluationReport | None:
        """Draws and writes what shows the composition; returns its scores, if the recipe asks for them."""
        ...


class ComposeReport(dict[str, Any]):
    """What a composition is and how it scores; also in report.json."""

    evaluation: EvaluationReport | None = None

    def show(self) -> None:
        """Prints the table of scores, or, if nothing was scored, the composition's folder."""
        if self.evaluation is not None:
            self.evaluation.show()
        else:
            sys.stdout.write(self.get("table", f"{self['output']}\n"))


def run_compose(
    recipe: ComposeRecipe,
    *,
    domain: Domain | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> ComposeReport:
    """Composes the LoRAs of `recipe` into its output folder; returns the report, which is also written there.

    domain: that of the base, if it is known. resume: go on from the last checkpoint; a finished run is returned as it
    is. note: receives a line when words of a prompt are cut, a picture cannot be drawn, or part of a LoRA is left out.
    Raises: UserError.
    """
    accelerator, start_s, digest = accelerator_for(recipe.device), time.monotonic(), recipe_digest(recipe)
    done = finished_report(Path(recipe.output), recipe) if resume and accelerator.is_main_process else None
    if (shared := share_from_main(done, accelerator)) is not None:
        return ComposeReport(shared)  # type: ignore[call-overload]
    # Complete and check: from here on the recipe is only read.
    task = (domain or domain_of(recipe.base)).command("compose").prepare(recipe, note)
    # Load.
    backbone = load_backbone(task.recipe.base, accelerator.device)
    about: list[str] = []
    allowed = task.recipe.allow_partial
    experts = read_experts(backbone.model, task.recipe.loras, allow_partial=allowed, note=about.append)
    # Run.
    mixture = _mixture(task, backbone, experts, progress)
    prompt_record.tell(backbone, note, base=task.recipe.base, loras=task.recipe.loras)
    for text in about:
        note(text)
    history: list[Record] = []
    if task.rows:
        with mixture:
            how = {"folder": task.recipe.output, "resume": resume, "accelerator": accelerator, "progress": progress}
            history = task.learn(backbone, mixture, **how)
    report = ComposeReport(_summary(task, digest, mixture, history))
    _note_losses(report, experts, note)
    # Write.
    if accelerator.is_main_process:
        save_composition(Path(recipe.output), _composition(task, backbone, experts, mixture))
        report.evaluation = task.finish(backbone, experts, mixture, progress)
        _write(report, Path(recipe.output), start_s)
    accelerator.wait_for_everyone()
    return report


def _mixture(task: Task, backbone: Backbone, experts: Sequence[Expert], progress: Progress | None) -> Mixture:
    recipe = task.recipe
    with seeded(recipe.seed, backbone.device):  # a low-rank head starts at random, and with `init_std` every head
        return build_mixture(
            backbone.model,
            experts,
            mode=task.row.name,
            gate=recipe.gate,
            weights={lora.name: lora.weight for lora in recipe.loras},
            only=next(iter(recipe.only), None),
            method=recipe.method,
            triggers=task.triggers,
            kinds=task.kinds,
            branches_at_once=recipe.image.branches_at_once,
            # A search merges at every step and has its own progress bar.
            progress=None if task.row.trained else progress,
        )


def _note_losses(report: ComposeReport, experts: Sequence[Expert], note: Note) -> None:
    """Reports which parts of the LoRAs the composition leaves out, and notes what its mode cannot represent."""
    partial_ones = {expert.name: expert.left_out for expert in experts if expert.left_out}
    if partial_ones:
        report["left_out"] = partial_ones
    for name, share in report.get("residuals", {}).items():
        if share > MOSTLY:
            note(f"{name}: {share:.1%} of its update is no shift of the base's singular values, and is left out")


def _composition(task: Task, backbone: Backbone, experts: Sequence[Expert], mixture: Mixture) -> Composition:
    recipe, row = task.recipe, task.row
    return Composition(
        mode=recipe.mode,
        level=row.level,
        base=recipe.base.id,
        base_fingerprint=backbone.fingerprint(),
        experts=tuple(record_of(expert) for expert in experts),
        gate=recipe.gate.model_dump(mode="json") if row.family == "gates" else None,
        settings=_settings(task) | prompt_record.stored(backbone),
        recipe=dump_recipe(recipe),
        tensors=mixture.state_dict(),
        version=__version__,
    )


def _settings(task: Task) -> dict[str, Any]:
    """The settings that building the mixture again needs besides its tensors."""
    recipe, family = task.recipe, task.row.family
    if family in ("merges", "peft"):
        return {"method": recipe.method.model_dump(mode="json")}
    if family == "outputs":
        method = recipe.method.model_dump(mode="json")
        return {"method": method, "triggers": dict(task.triggers), "kinds": dict(task.kinds)}
    only = {"only": next(iter(recipe.only), None)} if task.row.name == ALONE else {}
    layers = {} if recipe.method.layers is None else {"method": {"layers": recipe.method.layers}}
    return {**only, **layers}


def _summary(task: Task, digest: str, mixture: Mixture, history: Sequence[Record]) -> dict[str, Any]:
    recipe = task.recipe
    trained = sum(parameter.numel() for parameter in mixture.named_parameters().values())
    return {
        **_truncation(mixture),
        **_residuals(task.row, mixture),
        "output": recipe.output,
        "mode": recipe.mode,
        "base": recipe.base.id,
        "experts": list(mixture.names),
        "sites": len(mixture.sites),
        "trained_parameters": trained,
        "steps": len(history),
        "last": history[-1] if history else None,
        "recipe_digest": digest,
        "molecli_version": __version__,
    }


def _truncation(mixture: Mixture) -> dict[str, Any]:
    """The error of a merge due to its rank, ‖exact − merged‖ / ‖exact‖: mean and worst over its matrices."""
    if not isinstance(mixture, MergedMixture):
        return {}
    errors = mixture.merged().errors
    worst = max(errors, key=errors.__getitem__)
    return {"truncation": {"mean": fmean(errors.values()), "worst": errors[worst], "matrix": worst}}


def _residuals(row: Method, mixture: Mixture) -> dict[str, Any]:
    """For a merge that cannot represent every update: the share of each LoRA's update that is lost."""
    lost = row.part("lost") if row.family == "merges" else None
    if lost is None:
        return {}
    spectrum = BaseWeights(mixture.model).spectrum
    return {"residuals": {expert.name: lost(expert, spectrum) for expert in mixture.bank.experts}}


def _write(report: ComposeReport, folder: Path, start_s: float) -> None:
    if report.evaluation is not None:
        report["evaluation"] = dict(report.evaluation)
        report["table"] = to_markdown(report.evaluation.table)
    report["seconds"] = round(time.monotonic() - start_s, 1)
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2, default=str) + "\n")
    discard_checkpoints(folder)
