"""Composing on a language model: the examples that gates learn from, and the scores of what was composed.

TextDomain    what `run_compose` asks of a kind of base, of language models
with_tasks    a recipe with its tasks named
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.backbones.hosting import Mixture
from molecli.compose import get_method
from molecli.compose.options import check_options
from molecli.engine.data import flatten, split_tasks
from molecli.engine.evaluate import Bench, EvaluationReport, make_bench, make_report, run_methods
from molecli.engine.inspect import Progress, collect, entropy_course, summarise, write_report
from molecli.engine.learn import learner
from molecli.engine.loop import Record
from molecli.engine.methods import Method, check_language, distinct, static_methods
from molecli.engine.sample import TEXT_BASE, check_fields, check_method
from molecli.experts import Expert
from molecli.protocols import Backbone, Example
from molecli.suites.builtin import BuiltinSuite

if TYPE_CHECKING:
    from molecli.files.recipe import ComposeRecipe, DataConfig, EvalConfig

PICTURE_FIELDS = ("concepts", "objective", "image", "preview")


class TextDomain:
    """A recipe on a language model, complete. Raises: UsageError for what cannot be learned from or scored."""

    triggers: Mapping[str, str] = {}
    kinds: Mapping[str, str] = {}

    def __init__(self, recipe: ComposeRecipe) -> None:
        check_language(recipe.mode, "--mode")
        check_fields(recipe, PICTURE_FIELDS, TEXT_BASE)
        check_method(recipe.method)
        check_options(recipe.method, [recipe.mode])
        if get_method(recipe.mode).through_peft:
            whose = f"gates are made by, and in mode {recipe.mode} PEFT routes as `method` says"
            check_fields(recipe, ("gate",), whose)
        self.recipe = with_tasks(recipe)
        self.passes = 2.0 if recipe.mode == "xlora" else 1.0
        self.rows: Sequence[Any] = _examples(self.recipe)
        self.examples = len(self.rows)
        settings = self.recipe.evaluate
        self.bench = make_bench(settings) if settings is not None else None  # what is wrong there shows now

    def learn(self, backbone: Backbone, mixture: Mixture, **how: Any) -> list[Record]:
        """The records of the training, by the mode's `learner` with the keywords `how`."""
        learn = learner(self.recipe)
        return learn(backbone, mixture, self.rows, self.recipe.train, seed=self.recipe.seed, **how)

    def finish(
        self, backbone: Backbone, experts: Sequence[Expert], mixture: Mixture, progress: Progress | None
    ) -> EvaluationReport | None:
        """The scores, where the recipe asks for them; beside them what the gates do, drawn."""
        recipe, bench = self.recipe, self.bench
        if recipe.evaluate is None or bench is None:
            return None
        found = _evaluate(recipe, recipe.evaluate, bench, backbone, experts, mixture, progress)
        if mixture.named_parameters():
            _draw(recipe, bench, backbone, mixture, progress)
        return found


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
        device=backbone.device,
    )


def _draw(recipe: ComposeRecipe, bench: Bench, backbone: Backbone, mixture: Mixture, progress: Progress | None) -> None:
    """gates.png, .csv and .json and entropy.png in the output folder: what the gates do on the examples scored."""
    with mixture:
        values = collect(backbone, mixture, bench.tasks, batch_size=bench.batch_size, progress=progress)
    report = summarise(values, mixture.names, composition=recipe.output, course=entropy_course(recipe.output))
    write_report(report, Path(recipe.output))
