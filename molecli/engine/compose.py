"""`mole compose`: trained LoRAs into one composition, learned or fixed, and what it does beside what it is made of.

run_compose    recipe -> ComposeReport: the whole command
Domain         what it asks of a kind of base: `compose_text.TextDomain`, `images.compose.PictureDomain`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from molecli import __version__
from molecli.backbones.hosting import Mixture
from molecli.backbones.loading import load_backbone
from molecli.backbones.merged import MergedMixture
from molecli.backbones.sources import find_base
from molecli.backbones.text import seeded
from molecli.backbones.weights import BaseWeights
from molecli.compose import get_method
from molecli.compose.svdiff import unshifted
from molecli.engine.attach import read_experts
from molecli.engine.checkpoints import REPORT_FILE, discard_checkpoints, finished_report, recipe_digest
from molecli.engine.compose_text import TextDomain
from molecli.engine.evaluate import EvaluationReport
from molecli.engine.loop import Record
from molecli.engine.mixing import build_mixture
from molecli.engine.ranks import accelerator_for, share_from_main
from molecli.engine.tables import to_markdown
from molecli.experts import Expert
from molecli.files.atomic import write_text
from molecli.files.composition import Composition, record_of, save_composition
from molecli.files.recipe import dump_recipe
from molecli.protocols import Backbone

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.files.recipe import ComposeRecipe

# label, done, total
Progress = Callable[[str, int, int], None]
Note = Callable[[str], object]
# From this share on, what svdiff leaves out of an expert is said.
MOSTLY = 0.5


class Domain(Protocol):
    """A recipe on one kind of base: complete, checked before anything is loaded, and what only that kind does.

    triggers, kinds: of the LoRAs, by name; rows: what gates learn from, none where nothing learns; examples: how many
    different ones; passes: of the base, in the mean, for the rows of a step.
    """

    recipe: ComposeRecipe
    triggers: Mapping[str, str]
    kinds: Mapping[str, str]
    rows: Sequence[Any]
    examples: int
    passes: float

    def learn(self, backbone: Any, mixture: Mixture, **how: Any) -> list[Record]:
        """The records of the training, by the mode's `learner` with the keywords `how`."""
        ...

    def finish(
        self, backbone: Any, experts: Sequence[Expert], mixture: Mixture, progress: Progress | None
    ) -> EvaluationReport | None:
        """The scores, where the recipe asks for them; writes what else shows the composition."""
        ...


class ComposeReport(dict[str, Any]):
    """What a composition is and how it scores; also in report.json."""

    evaluation: EvaluationReport | None = None

    def show(self) -> None:
        """The score table on stdout, or where the composition is when nothing was scored."""
        if self.evaluation is not None:
            self.evaluation.show()
        else:
            sys.stdout.write(self.get("table", f"{self['output']}\n"))


def run_compose(
    recipe: ComposeRecipe, *, resume: bool = False, progress: Progress | None = None, note: Note = lambda text: None
) -> ComposeReport:
    """Composes the LoRAs of `recipe` into its output folder; returns the report, which is also written there.

    A run that is already finished is returned as it is (with `resume`). `note` is told what a prompt loses, and what
    could not be drawn, and what svdiff leaves out of a LoRA. Raises: UserError.
    """
    accelerator = accelerator_for(recipe.device)
    folder = Path(recipe.output)
    found = finished_report(folder, recipe) if resume and accelerator.is_main_process else None
    done: Any = share_from_main(found, accelerator)
    if done is not None:
        return ComposeReport(done)
    start_s, digest = time.monotonic(), recipe_digest(recipe)
    domain = domain_of(recipe, note)
    recipe = domain.recipe
    backbone = load_backbone(recipe.base, accelerator.device)
    experts = read_experts(backbone.model, recipe.loras, allow_partial=recipe.allow_partial)
    partial_ones = {expert.name: expert.left_out for expert in experts if expert.left_out}
    for name, left_out in partial_ones.items():
        note(f"{name}: the base lacks {len(left_out)} of its matrices, such as {left_out[0]}; they are left out")
    mixture = _mixture(recipe, domain, backbone, experts, progress)
    history = _fitted(domain, backbone, mixture, accelerator, resume, progress) if domain.rows else []
    report = ComposeReport(_summary(recipe, digest, mixture, history))
    if partial_ones:
        report["left_out"] = partial_ones
    for name, share in report.get("residuals", {}).items():
        if share > MOSTLY:
            note(f"{name}: {share:.1%} of its update is no shift of the base's singular values, and is left out")
    if accelerator.is_main_process:
        made = _composition(recipe, backbone, experts, mixture)
        save_composition(folder, replace(made, settings=_settings(recipe, domain)))
        report.evaluation = domain.finish(backbone, experts, mixture, progress)
        if report.evaluation is not None:
            report["evaluation"] = dict(report.evaluation)
            report["table"] = to_markdown(report.evaluation.table)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        write_text(folder / REPORT_FILE, json.dumps(report, indent=2, default=str) + "\n")
        discard_checkpoints(folder)
    accelerator.wait_for_everyone()
    return report


def domain_of(recipe: ComposeRecipe, note: Note = lambda text: None) -> Domain:
    """The recipe's domain, by its base. Raises: UserError for what is wrong with it there."""
    if find_base(recipe.base).pipeline:
        from molecli.engine.images.compose import PictureDomain  # which needs diffusers

        return PictureDomain(recipe, note)
    return TextDomain(recipe)


def _mixture(
    recipe: ComposeRecipe, domain: Domain, backbone: Backbone, experts: Sequence[Expert], progress: Progress | None
) -> Mixture:
    with seeded(recipe.seed, backbone.device):  # a low-rank head starts at random, and where told every head
        return build_mixture(
            backbone.model,
            experts,
            mode=recipe.mode,
            gate=recipe.gate,
            weights={lora.name: lora.weight for lora in recipe.loras},
            only=next(iter(recipe.only), None),
            method=recipe.method,
            triggers=domain.triggers,
            kinds=domain.kinds,
            branches_at_once=recipe.image.branches_at_once,
            told=None if progress is None or get_method(recipe.mode).trained else partial(progress, "merging"),
        )


def _fitted(
    domain: Domain,
    backbone: Backbone,
    mixture: Mixture,
    accelerator: Accelerator,
    resume: bool,
    progress: Progress | None,
) -> list[Record]:
    label = "search" if get_method(domain.recipe.mode).merges else "gates"

    def told(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress(label, done, total)

    with mixture:
        return domain.learn(
            backbone, mixture, folder=domain.recipe.output, resume=resume, accelerator=accelerator, progress=told
        )


def _composition(recipe: ComposeRecipe, backbone: Backbone, experts: Sequence[Expert], mixture: Mixture) -> Composition:
    return Composition(
        mode=recipe.mode,
        level=get_method(recipe.mode).level,
        base=recipe.base.id,
        base_fingerprint=backbone.fingerprint(),
        experts=tuple(record_of(expert) for expert in experts),
        gate=recipe.gate.model_dump(mode="json") if get_method(recipe.mode).gated else None,
        settings={},
        recipe=dump_recipe(recipe),
        tensors=mixture.state_dict(),
        version=__version__,
    )


def _settings(recipe: ComposeRecipe, domain: Domain) -> dict[str, Any]:
    """What a mixture is built with again that is in no tensor."""
    if get_method(recipe.mode).merges or get_method(recipe.mode).through_peft:
        return {"method": recipe.method.model_dump(mode="json")}
    if get_method(recipe.mode).level == "output":
        method = recipe.method.model_dump(mode="json")
        return {"method": method, "triggers": dict(domain.triggers), "kinds": dict(domain.kinds)}
    only = {"only": next(iter(recipe.only), None)} if recipe.mode == "single" else {}
    layers = {} if recipe.method.layers is None else {"method": {"layers": recipe.method.layers}}
    return {**only, **layers}


def _truncation(mixture: Mixture) -> dict[str, Any]:
    """What the rank of a merged LoRA cost, ‖meant − merged‖ / ‖meant‖ over its matrices."""
    if not isinstance(mixture, MergedMixture):
        return {}
    errors = mixture.merged().errors
    worst = max(errors, key=errors.__getitem__)
    return {"truncation": {"mean": fmean(errors.values()), "worst": errors[worst], "matrix": worst}}


def _residuals(recipe: ComposeRecipe, mixture: Mixture) -> dict[str, Any]:
    """Of mode svdiff: by expert, how much of its update is no shift of singular values, ‖ΔW − shifts‖ / ‖ΔW‖."""
    if recipe.mode != "svdiff":
        return {}
    spectrum = BaseWeights(mixture.model).spectrum
    return {"residuals": {expert.name: unshifted(expert, spectrum) for expert in mixture.bank.experts}}


def _summary(recipe: ComposeRecipe, digest: str, mixture: Mixture, history: Sequence[Record]) -> dict[str, Any]:
    trained = sum(parameter.numel() for parameter in mixture.named_parameters().values())
    return {
        **_truncation(mixture),
        **_residuals(recipe, mixture),
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
