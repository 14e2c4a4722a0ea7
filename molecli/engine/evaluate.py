"""`mole evaluate`: any number of methods on one load of the base, scored on the same examples.

Bench         the tasks, and how each is scored          run_methods    every method's results on a bench
make_bench    EvalConfig -> Bench                        make_report    results -> files' content and table
run_evaluate  recipe -> EvaluationReport: the whole command on a language model; on a diffusion base
              `images.evaluate.run_evaluate_pictures`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from molecli.backbones.loading import load_backbone
from molecli.catalog import BUILTIN_PREFIX, builtin_loras
from molecli.compose.options import check_options, told
from molecli.engine.attach import not_found, read_experts
from molecli.engine.data import Tasks, load_tasks, split_tasks
from molecli.engine.methods import STATIC, Method, composition_methods, distinct, folder_names, static_methods
from molecli.engine.results import compare, document, write
from molecli.engine.sample import TEXT_BASE, base_of, check_fields, check_method, draws_pictures
from molecli.engine.scoring import Progress, TaskResult, evaluate, own_lora
from molecli.engine.tables import ScoreTable, draw, score_table
from molecli.files.adapters import LoraLike, LoraSpec
from molecli.files.composition import Composition, load_composition
from molecli.metrics import metric_row
from molecli.suites import load_suite

if TYPE_CHECKING:
    from molecli.files.recipe import EvalConfig, EvaluateRecipe
    from molecli.protocols import Backbone

OWN_LORA = "own LoRA"
PICTURE_FIELDS = ("image", "concepts", "prompts", "judge")
Results = Mapping[str, Sequence[TaskResult]]


@dataclass(frozen=True)
class Bench:
    """Tasks, and for each its metrics and the longest completion; `suite` is its name and version."""

    tasks: Tasks
    metrics: Mapping[str, Sequence[str]]
    max_new_tokens: Mapping[str, int]
    batch_size: int
    suite: tuple[str, str]


class EvaluationReport(dict[str, Any]):
    """The content of results.json, with the tables that show it and what is said below them."""

    def __init__(
        self,
        content: Mapping[str, Any],
        table: ScoreTable,
        comparisons: Sequence[str] = (),
        more: Sequence[ScoreTable] = (),
    ) -> None:
        super().__init__(content)
        self.table, self.comparisons, self.more = table, tuple(comparisons), tuple(more)

    def document(self) -> dict[str, Any]:
        """The report as JSON would hold it."""
        return dict(self)

    def show(self) -> None:
        """Draws the tables on stdout, and what is said below them."""
        draw((self.table, *self.more), self.comparisons)


def make_bench(config: EvalConfig) -> Bench:
    """The examples that `config` names and how they are scored. Raises: UsageError for bad names, files and lines."""
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


def run_methods(
    backbone: Backbone,
    methods: Mapping[str, Method],
    bench: Bench,
    *,
    progress: Progress | None = None,
    after: Callable[[Results], object] = lambda results: None,
) -> dict[str, list[TaskResult]]:
    """The results of every method, attached one after another; `after` sees all there are after each."""
    results: dict[str, list[TaskResult]] = {}
    for name, method in methods.items():
        with method.context:
            results[name] = evaluate(
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
    """The report on `results` made on `device`, with `subject` compared to every other method by `samples` resamples.

    Where every task has a namesake among the methods in `singles`, a column "own LoRA" puts these results together.
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
    """The results with each task's own LoRA as one method, right before the first LoRA alone."""
    alone = {name: results[name] for name in singles if name in results}
    own = own_lora(alone) if len(alone) > 1 else None
    shown: dict[str, Sequence[TaskResult]] = {}
    for name, result in results.items():
        if own is not None and name == next(iter(alone)):
            shown[OWN_LORA] = own
        shown[name] = result
    return shown


def run_evaluate(
    recipe: EvaluateRecipe,
    *,
    progress: Progress | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> EvaluationReport:
    """The report of a whole run; results.json and the samples are complete after every method.

    Raises: UsageError, MismatchError and RunError as loading the examples, the base and the LoRAs does.
    """
    for name in recipe.eval.metrics or ():
        metric_row(name)
    if draws_pictures(recipe.base, next(iter(recipe.compositions), None)):
        from molecli.engine.images.evaluate import run_evaluate_pictures  # which needs diffusers, and this module

        return run_evaluate_pictures(recipe, progress=progress, note=note)
    check_fields(recipe, PICTURE_FIELDS, TEXT_BASE)
    check_method(recipe.method)
    bench = make_bench(recipe.eval)
    compositions = {name: load_composition(path) for name, path in folder_names(recipe.compositions).items()}
    base = base_of(recipe.base, next(iter(compositions.values()), None))
    loras, modes = chosen(recipe, compositions, builtin=base.id.startswith(BUILTIN_PREFIX))
    check_options(recipe.method, told(modes))
    backbone = load_backbone(base, recipe.device)
    methods = make_methods(recipe, backbone.model, compositions, loras, modes)
    singles = [name for name, method in methods.items() if method.single]
    config = recipe.model_dump(mode="json")

    def report(results: Results, samples: int) -> EvaluationReport:
        last = list(results)[-1]
        return make_report(
            results,
            bench,
            subject=last,
            singles=singles,
            samples=samples,
            seed=recipe.seed,
            config=config,
            device=backbone.device,
        )

    def keep(results: Results) -> None:
        write(recipe.output, report(results, 0), results)

    results = run_methods(backbone, methods, bench, progress=progress, after=keep)
    final = report(results, recipe.eval.bootstrap)
    write(recipe.output, final, results)
    return final


def make_methods(
    recipe: EvaluateRecipe,
    model: nn.Module,
    compositions: Mapping[str, Composition],
    loras: Sequence[LoraLike],
    modes: Sequence[str],
) -> dict[str, Method]:
    """What `recipe` compares, by name, in the order of the table: the fixed `modes` first, compositions last.

    Raises: UsageError, MismatchError.
    """
    # A LoRA that a composition remembers may match the base in part: that was accepted when it was composed.
    needed = loras if set(modes) - {"base"} else []
    experts = read_experts(model, needed, allow_partial=not recipe.loras)
    weights = {lora.name: lora.weight for lora in recipe.loras}
    on = recipe.switched
    fixed = static_methods(model, experts, modes=modes, weights=weights, method=recipe.method, switched=on)
    learned = composition_methods(model, compositions, loras=recipe.loras, experts=experts, switched=on)
    return distinct([*fixed, *learned])


def chosen(
    recipe: EvaluateRecipe, compositions: Mapping[str, Composition], *, builtin: bool
) -> tuple[list[LoraLike], Sequence[str]]:
    """(the LoRAs at hand, the fixed modes to score): those of the recipe, else what it leaves to be chosen.

    Without --modes these are the base, each LoRA alone, linear and nla, unless eval.baselines is off.
    """
    loras: list[LoraLike] = list(recipe.loras) or recorded_loras(compositions.values())
    if not loras and builtin:
        loras = [LoraSpec(name, str(path)) for name, path in builtin_loras().items()]
    baselines = not recipe.modes and (recipe.eval.baselines or not compositions)
    return loras, usual_modes(STATIC, loras, compositions) if baselines else recipe.modes


def usual_modes(
    modes: Sequence[str], loras: Sequence[LoraLike], compositions: Mapping[str, Composition]
) -> Sequence[str]:
    """`modes`, which compose `loras`; the base alone without any, and with a warning where some are missing."""
    gone = missing(loras, compositions.values())
    if gone:
        what = f"not all LoRAs are there (no {', no '.join(gone)}): of the fixed methods the base alone is scored"
        warnings.warn(what, stacklevel=2)
    return modes if loras and not gone else ("base",)


def missing(loras: Iterable[LoraLike], compositions: Iterable[Composition]) -> list[str]:
    """The names of those LoRAs that are not to be found, and that merged compositions can do without."""
    gone = {(record.name, record.source) for composition in compositions for record in not_found(composition)}
    return [lora.name for lora in loras if (lora.name, lora.source) in gone]


def recorded_loras(compositions: Iterable[Composition]) -> list[LoraLike]:
    """The LoRAs that the compositions remember; of two that share a name the first."""
    sources: dict[str, str] = {}
    for composition in compositions:
        for expert in composition.experts:
            sources.setdefault(expert.name, expert.source)
    return [LoraSpec(name, source) for name, source in sources.items()]
