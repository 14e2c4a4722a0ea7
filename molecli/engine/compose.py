"""`mole compose`: trained LoRAs into one composition, learned or fixed, scored beside what it is made of."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli import __version__
from molecli.backbones.hosting import Mixture
from molecli.backbones.loading import load_backbone
from molecli.backbones.text import seeded
from molecli.compose import get_method
from molecli.engine.attach import read_experts
from molecli.engine.checkpoints import REPORT_FILE, discard_checkpoints, finished_report, recipe_digest
from molecli.engine.data import flatten, split_tasks
from molecli.engine.evaluate import Bench, EvaluationReport, make_bench, make_report, run_methods
from molecli.engine.fit import fit
from molecli.engine.inspect import collect, entropy_course, summarise, write_report
from molecli.engine.loop import Record
from molecli.engine.methods import Method, distinct, static_methods
from molecli.engine.mixing import build_mixture
from molecli.engine.ranks import accelerator_for, share_from_main
from molecli.engine.tables import to_markdown
from molecli.experts import Expert
from molecli.files.atomic import write_text
from molecli.files.composition import Composition, record_of, save_composition
from molecli.files.recipe import dump_recipe
from molecli.protocols import Backbone, Example
from molecli.suites.builtin import BuiltinSuite

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.files.recipe import ComposeRecipe, DataConfig, EvalConfig

# label, done, total
Progress = Callable[[str, int, int], None]


class ComposeReport(dict[str, Any]):
    """What a composition is and how it scores; also in report.json."""

    evaluation: EvaluationReport | None = None

    def show(self) -> None:
        """The score table on stdout, or where the composition is when nothing was scored."""
        if self.evaluation is not None:
            self.evaluation.show()
        else:
            sys.stdout.write(self.get("table", f"{self['output']}\n"))


def run_compose(recipe: ComposeRecipe, *, resume: bool = False, progress: Progress | None = None) -> ComposeReport:
    """Composes the LoRAs of `recipe` into its output folder; returns the report, which is also written there.

    A run that is already finished is returned as it is (with `resume`). Raises: UserError.
    """
    accelerator = accelerator_for(recipe.device)
    folder = Path(recipe.output)
    found = finished_report(folder, recipe) if resume and accelerator.is_main_process else None
    done: Any = share_from_main(found, accelerator)
    if done is not None:
        return ComposeReport(done)
    start_s = time.monotonic()
    digest, recipe = recipe_digest(recipe), with_tasks(recipe)
    examples = _examples(recipe)
    bench = make_bench(recipe.evaluate) if recipe.evaluate is not None else None  # what is wrong there shows now
    backbone = load_backbone(recipe.base, accelerator.device)
    experts = read_experts(backbone.model, recipe.loras, allow_partial=recipe.allow_partial)
    with seeded(recipe.seed, accelerator.device):  # a low-rank head starts at random
        mixture = build_mixture(
            backbone.model,
            experts,
            mode=recipe.mode,
            gate=recipe.gate,
            weights={lora.name: lora.weight for lora in recipe.loras},
            only=next(iter(recipe.only), None),
        )
    history = _fitted(recipe, backbone, mixture, examples, accelerator, resume, progress) if examples else []
    report = ComposeReport(_summary(recipe, digest, mixture, history))
    if accelerator.is_main_process:
        save_composition(folder, _composition(recipe, backbone, mixture))
        if recipe.evaluate is not None and bench is not None:
            report.evaluation = _evaluate(recipe, recipe.evaluate, bench, backbone, experts, mixture, progress)
            if mixture.named_parameters():
                _draw(recipe, bench, backbone, mixture, progress)
            report["evaluation"] = dict(report.evaluation)
            report["table"] = to_markdown(report.evaluation.table)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        write_text(folder / REPORT_FILE, json.dumps(report, indent=2, default=str) + "\n")
        discard_checkpoints(folder)
    accelerator.wait_for_everyone()
    return report


def with_tasks(recipe: ComposeRecipe) -> ComposeRecipe:
    """The recipe with its tasks named, where the suite knows which tasks its LoRAs are for."""
    update: dict[str, Any] = {"data": _narrowed(recipe.data, recipe)}
    if recipe.evaluate is not None:
        data = _narrowed(recipe.evaluate.data, recipe)
        update["evaluate"] = recipe.evaluate.model_copy(update={"data": data})
    return recipe.model_copy(update=update)


def _narrowed(data: DataConfig, recipe: ComposeRecipe) -> DataConfig:
    if data.suite != "builtin" or data.tasks:
        return data
    return data.model_copy(update={"tasks": tuple(BuiltinSuite().tasks_for([lora.name for lora in recipe.loras]))})


def _examples(recipe: ComposeRecipe) -> list[Example]:
    """What the gates learn from; nothing for a mode that learns nothing."""
    if not get_method(recipe.mode).trained:
        return []
    kept, _ = split_tasks(recipe.data)
    return flatten(kept)


def _fitted(
    recipe: ComposeRecipe,
    backbone: Backbone,
    mixture: Mixture,
    examples: Sequence[Example],
    accelerator: Accelerator,
    resume: bool,
    progress: Progress | None,
) -> list[Record]:
    def told(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress("gates", done, total)

    with mixture:
        return fit(
            backbone,
            mixture,
            examples,
            recipe.train,
            seed=recipe.seed,
            folder=recipe.output,
            resume=resume,
            accelerator=accelerator,
            progress=told,
        )


def _composition(recipe: ComposeRecipe, backbone: Backbone, mixture: Mixture) -> Composition:
    return Composition(
        mode=recipe.mode,
        level=get_method(recipe.mode).level,
        base=recipe.base.id,
        base_fingerprint=backbone.fingerprint(),
        experts=tuple(record_of(expert) for expert in mixture.bank.experts),
        gate=recipe.gate.model_dump(mode="json") if recipe.mode == "gated" else None,
        settings={"only": next(iter(recipe.only), None)} if recipe.mode == "single" else {},
        recipe=dump_recipe(recipe),
        tensors=mixture.state_dict(),
        version=__version__,
    )


def _evaluate(
    recipe: ComposeRecipe,
    settings: EvalConfig,
    bench: Bench,
    backbone: Backbone,
    experts: Sequence[Expert],
    mixture: Mixture,
    progress: Progress | None,
) -> EvaluationReport:
    """The composition beside the base, each LoRA alone and the fixed mixtures, on one load of the base."""
    weights = {lora.name: lora.weight for lora in recipe.loras}
    fixed = static_methods(backbone.model, experts, weights=weights) if settings.baselines else []
    # A fixed mode stands in the table already; a LoRA may be called like a mode.
    own = next((method for method in fixed if method.name == recipe.mode and not method.single), None)
    if own is None:
        own = Method(recipe.mode, mixture)
        fixed.append(own)
    methods = distinct(fixed)
    subject = next(name for name, method in methods.items() if method is own)
    singles = [name for name, method in methods.items() if method.single]
    results = run_methods(backbone, methods, bench, progress=progress)
    return make_report(
        results,
        bench,
        subject=subject,
        singles=singles,
        samples=settings.bootstrap,
        seed=recipe.seed,
        config=recipe.model_dump(mode="json"),
    )


def _draw(recipe: ComposeRecipe, bench: Bench, backbone: Backbone, mixture: Mixture, progress: Progress | None) -> None:
    """gates.png, .csv and .json and entropy.png in the output folder: what the gates do on the examples scored."""
    with mixture:
        values = collect(backbone, mixture, bench.tasks, batch_size=bench.batch_size, progress=progress)
    report = summarise(values, mixture.names, composition=recipe.output, course=entropy_course(recipe.output))
    write_report(report, Path(recipe.output))


def _summary(recipe: ComposeRecipe, digest: str, mixture: Mixture, history: Sequence[Record]) -> dict[str, Any]:
    trained = sum(parameter.numel() for parameter in mixture.named_parameters().values())
    return {
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
