"""`mole evaluate` on a language model: any number of methods on one load of the base, scored on the same examples.

evaluate       recipe -> EvaluationReport: the whole command
Bench          the tasks, and how each is scored         run_columns    every column's results on a bench
make_bench     EvalConfig -> Bench                       make_report    results -> EvaluationReport
make_columns   the columns of a recipe                   chosen         the LoRAs and modes of a recipe
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from molecli.adapters import LoraLike, LoraSpec
from molecli.bases import prompt_record
from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import BUILTIN_PREFIX, builtin_loras
from molecli.catalog.methods import BASE, check_runs_on, shown_beside
from molecli.catalog.metrics import metric_row
from molecli.config.unread import check_fields, check_options, composing
from molecli.evaluation.columns import Column, composed_columns, distinct, fixed_columns
from molecli.evaluation.report import EvaluationReport, recorded_loras, usual_modes
from molecli.evaluation.results import compare, document, write
from molecli.evaluation.scoring import OWN_LORA, TaskResult, own_lora, score_tasks
from molecli.evaluation.tables import score_table
from molecli.files.composition import Composition
from molecli.mixture.attach import base_of, read_experts
from molecli.protocols import Note, Progress
from molecli.suites import load_suite
from molecli.training.examples import Tasks, load_tasks, split_tasks

if TYPE_CHECKING:
    from molecli.config import BaseConfig, EvalConfig, EvaluateRecipe
    from molecli.protocols import Backbone

# An interrupted evaluation of a language model keeps nothing from which it could be resumed.
RESUMES = False
PICTURE_FIELDS = ("image", "concepts", "judge")
Results = Mapping[str, Sequence[TaskResult]]


@dataclass(frozen=True)
class Bench:
    """Tasks, and for each its metrics and longest completion; `suite` is the suite's name and version."""

    tasks: Tasks
    metrics: Mapping[str, Sequence[str]]
    max_new_tokens: Mapping[str, int]
    batch_size: int
    suite: tuple[str, str]


def evaluate(
    recipe: EvaluateRecipe,
    compositions: Mapping[str, Composition],
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> EvaluationReport:
    """The report of a whole run. results.json and the samples are rewritten after every method.

    Raises: UsageError, MismatchError and RunError, from loading the examples, the base and the LoRAs.
    """
    base, loras, modes = check(recipe, compositions)
    bench = make_bench(recipe.eval)
    backbone = load_backbone(base, recipe.device)
    columns = make_columns(recipe, backbone.model, compositions, loras, modes)
    made = {name: composition.settings for name, composition in compositions.items()}
    prompt_record.tell(backbone, note, base=base, loras=loras, compositions=made)
    singles = [name for name, column in columns.items() if column.single]
    config = recipe.model_dump(mode="json")

    def report(results: Results, samples: int) -> EvaluationReport:
        return make_report(
            results,
            bench,
            subject=list(results)[-1],
            singles=singles,
            samples=samples,
            seed=recipe.seed,
            config=config,
            device=backbone.device,
        )

    def keep(results: Results) -> None:
        write(recipe.output, report(results, 0), results)

    results = run_columns(backbone, columns, bench, progress=progress, after=keep)
    final = report(results, recipe.eval.bootstrap)
    write(recipe.output, final, results)
    return final


def check(
    recipe: EvaluateRecipe, compositions: Mapping[str, Composition]
) -> tuple[BaseConfig, list[LoraLike], Sequence[str]]:
    """(the base, the available LoRAs, the fixed modes to score). Raises: UsageError for settings that are ignored."""
    check_fields(recipe, PICTURE_FIELDS, "pictures")
    base = base_of(recipe.base, next(iter(compositions.values()), None))
    loras, modes = chosen(recipe, compositions, builtin=base.id.startswith(BUILTIN_PREFIX))
    for mode in modes:
        check_runs_on(mode, "texts", "--modes")
    check_options(recipe.method, composing(modes))
    return base, loras, modes


def make_bench(config: EvalConfig) -> Bench:
    """The examples that `config` names, and how they are scored. Raises: UsageError for bad names, files or lines."""
    for name in config.metrics or ():
        metric_row(name)
    suite = load_suite(config.data.suite, files=config.data.files)
    tasks = load_tasks(config.data, suite) if config.data.holdout == 0 else split_tasks(config.data, suite)[1]
    return Bench(
        tasks,
        {task: config.metrics or suite.metrics(task) for task in tasks},
        {task: config.max_new_tokens or suite.max_new_tokens(task) for task in tasks},
        config.batch_size,
        (suite.name, suite.version),
    )


def run_columns(
    backbone: Backbone,
    columns: Mapping[str, Column],
    bench: Bench,
    *,
    progress: Progress | None = None,
    after: Callable[[Results], object] = lambda results: None,
) -> dict[str, list[TaskResult]]:
    """The results of every column, attached one after another. After each, `after` receives all results so far."""
    results: dict[str, list[TaskResult]] = {}
    for name, column in columns.items():
        with column.context:
            results[name] = score_tasks(
                backbone,
                bench.tasks,
                metrics=bench.metrics,
                max_new_tokens=bench.max_new_tokens,
                batch_size=bench.batch_size,
                progress=progress,
                label=name,
            )
        after(results)
    return results


def make_report(
    results: Results,
    bench: Bench,
    *,
    subject: str,
    singles: Sequence[str] = (),
    samples: int = 0,
    seed: int = 0,
    config: Any = None,
    device: torch.device | str,
) -> EvaluationReport:
    """The report on `results` from `device`. `subject` is compared with every other method by `samples` resamples.

    If every task has a method of the same name in `singles`, a column "own LoRA" collects these results.
    """
    shown = with_own_lora(results, singles)
    comparisons = compare(shown, subject, samples=samples, seed=seed)
    content = document(
        shown,
        subject,
        suite=bench.suite,
        comparisons=comparisons,
        max_new_tokens=bench.max_new_tokens,
        config=config,
        device=device,
    )
    return EvaluationReport(content, score_table(shown), [str(comparison) for comparison in comparisons])


def with_own_lora(results: Results, singles: Sequence[str]) -> dict[str, Sequence[TaskResult]]:
    """The results with "own LoRA" (each task's own LoRA) as one more method, right before the first single LoRA."""
    alone = {name: results[name] for name in singles if name in results}
    own = own_lora(alone) if len(alone) > 1 else None
    shown: dict[str, Sequence[TaskResult]] = {}
    for name, result in results.items():
        if own is not None and name == next(iter(alone)):
            shown[OWN_LORA] = own
        shown[name] = result
    return shown


def make_columns(
    recipe: EvaluateRecipe,
    model: nn.Module,
    compositions: Mapping[str, Composition],
    loras: Sequence[LoraLike],
    modes: Sequence[str],
) -> dict[str, Column]:
    """The columns that `recipe` compares, by name, in the order of the table: fixed `modes` first, compositions last.

    Raises: UsageError, MismatchError.
    """
    # A LoRA that a composition records may match the base only in part: that was accepted when it was composed.
    needed = loras if set(modes) - {BASE} else []
    experts = read_experts(model, needed, allow_partial=not recipe.loras)
    weights = {lora.name: lora.weight for lora in recipe.loras}
    on = recipe.switched
    fixed = fixed_columns(model, experts, modes=modes, weights=weights, method=recipe.method, switched=on)
    learned = composed_columns(model, compositions, loras=recipe.loras, experts=experts, switched=on)
    return distinct([*fixed, *learned])


def chosen(
    recipe: EvaluateRecipe, compositions: Mapping[str, Composition], *, builtin: bool
) -> tuple[list[LoraLike], Sequence[str]]:
    """(the available LoRAs, the fixed modes to score): those of the recipe, otherwise the defaults.

    The default modes are the base, each LoRA alone, linear and nla; none if eval.baselines is off.
    """
    loras: list[LoraLike] = list(recipe.loras) or recorded_loras(compositions.values())
    if not loras and builtin:
        loras = [LoraSpec(name, str(path)) for name, path in builtin_loras().items()]
    baselines = not recipe.modes and (recipe.eval.baselines or not compositions)
    return loras, usual_modes(shown_beside("texts"), loras, compositions) if baselines else recipe.modes
