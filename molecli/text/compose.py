"""`mole compose` on a language model: the examples that gates learn from, and the scores of the composition.

prepare       recipe -> TextTask, checked
TextTask      what `commands.compose` needs from a kind of base
with_tasks    a recipe with its tasks named
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.catalog.methods import check_runs_on, get_method
from molecli.catalog.suites import SUITES
from molecli.config.unread import check_fields, check_options, check_unused
from molecli.evaluation.columns import Column, distinct, fixed_columns
from molecli.evaluation.gate_report import entropy_course, summarise, write_report
from molecli.suites import load_suite
from molecli.text.evaluate import Bench, make_bench, make_report, run_columns
from molecli.text.inspect_gates import collect
from molecli.training.examples import flatten, split_tasks
from molecli.training.learner import learner

if TYPE_CHECKING:
    from molecli.catalog.methods import Method
    from molecli.config import ComposeRecipe, DataConfig, EvalConfig
    from molecli.evaluation.report import EvaluationReport
    from molecli.experts import Expert
    from molecli.mixture.mixture import Mixture
    from molecli.protocols import Backbone, Example, Note, Progress
    from molecli.training.loop import Record

PICTURE_FIELDS = ("concepts", "objective", "image", "preview")


def prepare(recipe: ComposeRecipe, note: Note = lambda text: None) -> TextTask:
    """The task of a recipe. Raises: UsageError for anything that cannot be learned or scored, or would be ignored."""
    row = get_method(recipe.mode)
    check_runs_on(recipe.mode, "texts")
    check_fields(recipe, PICTURE_FIELDS, "pictures")
    check_options(recipe.method, [recipe.mode])
    if row.family == "peft":
        check_unused(recipe, ("gate",), f"mode {recipe.mode} has no gates; PEFT routes as `method` says")
    complete = with_tasks(recipe)
    rows = flatten(split_tasks(complete.data)[0]) if row.trained else []
    bench = None if complete.evaluate is None else make_bench(complete.evaluate)
    return TextTask(complete, row, rows, bench)


def with_tasks(recipe: ComposeRecipe) -> ComposeRecipe:
    """The recipe with its tasks named, if the suite knows which tasks the LoRAs are for."""
    update: dict[str, Any] = {"data": _narrowed(recipe.data, recipe)}
    if recipe.evaluate is not None:
        data = _narrowed(recipe.evaluate.data, recipe)
        update["evaluate"] = recipe.evaluate.model_copy(update={"data": data})
    return recipe.model_copy(update=update)


@dataclass(frozen=True)
class TextTask:
    """A `commands.compose.Task` on a language model. `bench` is what is scored; None if nothing is."""

    recipe: ComposeRecipe
    row: Method
    rows: Sequence[Example]
    bench: Bench | None
    triggers: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        return len(self.rows)

    @property
    def passes(self) -> float:
        return self.row.passes

    @property
    def scored(self) -> int:
        return 0 if self.bench is None else sum(map(len, self.bench.tasks.values()))

    def learn(self, backbone: Backbone, mixture: Mixture, **how: Any) -> list[Record]:
        """The records of the training by the mode's `learner`, which receives the keywords `how`."""
        recipe = self.recipe
        learn = learner(self.row, recipe.method)
        return learn(backbone, mixture, self.rows, recipe.train, seed=recipe.seed, **how)

    def finish(
        self, backbone: Backbone, experts: Sequence[Expert], mixture: Mixture, progress: Progress | None
    ) -> EvaluationReport | None:
        """The scores, if the recipe asks for them; then it also draws the gates on the scored examples."""
        if self.recipe.evaluate is None or self.bench is None:
            return None
        found = self._scores(self.recipe.evaluate, self.bench, backbone, experts, mixture, progress)
        if mixture.named_parameters():
            self._draw(self.bench, backbone, mixture, progress)
        return found

    def _scores(
        self,
        settings: EvalConfig,
        bench: Bench,
        backbone: Backbone,
        experts: Sequence[Expert],
        mixture: Mixture,
        progress: Progress | None,
    ) -> EvaluationReport:
        """The scores of the composition, the base, each LoRA alone and the fixed mixtures, on one loaded base."""
        recipe = self.recipe
        weights = {lora.name: lora.weight for lora in recipe.loras}
        fixed = fixed_columns(backbone.model, experts, weights=weights) if settings.baselines else []
        # A fixed mode is in the table already. A LoRA can have the name of a mode.
        own = next((column for column in fixed if column.name == recipe.mode and not column.single), None)
        if own is None:
            own = Column(recipe.mode, mixture)
            fixed.append(own)
        columns = distinct(fixed)
        return make_report(
            run_columns(backbone, columns, bench, progress=progress),
            bench,
            subject=next(name for name, column in columns.items() if column is own),
            singles=[name for name, column in columns.items() if column.single],
            samples=settings.bootstrap,
            seed=recipe.seed,
            config=recipe.model_dump(mode="json"),
            device=backbone.device,
        )

    def _draw(self, bench: Bench, backbone: Backbone, mixture: Mixture, progress: Progress | None) -> None:
        """Writes gates.png, .csv and .json and entropy.png: the gates on the scored examples."""
        output = self.recipe.output
        with mixture:
            values = collect(backbone, mixture, bench.tasks, batch_size=bench.batch_size, progress=progress)
        report = summarise(values, mixture.names, composition=output, course=entropy_course(output))
        write_report(report, Path(output))


def _narrowed(data: DataConfig, recipe: ComposeRecipe) -> DataConfig:
    row = SUITES.get(data.suite)
    if row is None or row.holds != "texts" or data.tasks:
        return data
    tasks_for = getattr(load_suite(data.suite, files=data.files), "tasks_for", None)
    if tasks_for is None:
        return data
    return data.model_copy(update={"tasks": tuple(tasks_for([lora.name for lora in recipe.loras]))})
