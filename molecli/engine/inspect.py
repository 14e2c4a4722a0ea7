"""What the gates of a composition do: weights by site, expert and task, their entropy, and experts nobody asks.

run_inspect      evaluate-shaped recipe -> GateReport, saved where the recipe names an output
collect          gate values of an attached mixture over examples
report_lines     a GateReport as text
as_csv           a GateReport as CSV, one row per task, site and expert
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molecli.backbones.hosting import Mixture
from molecli.backbones.loading import load_backbone
from molecli.backbones.sources import find_base
from molecli.compose import get_method
from molecli.engine.attach import attach
from molecli.engine.evaluate import make_bench
from molecli.engine.sample import TEXT_BASE, base_of, check_fields, switch
from molecli.engine.train_log import read_log
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.files.composition import Composition, find_composition, load_composition
from molecli.files.recipe import EvaluateRecipe
from molecli.protocols import Backbone, Example

# label, done, total
Progress = Callable[[str, int, int], None]
ALL = "all"
# An expert is dead where it gets less than this part of its fair share 1/N.
DEAD_SHARE = 0.1


@dataclass(frozen=True)
class GateReport:
    """Gate values of one composition.

    weights[task][site][expert] is the mean over that task's examples, with the task "all" over every example;
    entropy[task][site] is the mean over examples of the gate's entropy, in nats, at most ln N;
    course holds the entropy at each logged training step, as (step, entropy).
    """

    composition: str
    experts: tuple[str, ...]
    sites: tuple[str, ...]
    tasks: tuple[str, ...]
    examples: dict[str, int]
    weights: dict[str, tuple[tuple[float, ...], ...]]
    entropy: dict[str, tuple[float, ...]]
    course: tuple[tuple[int, float], ...] = ()

    @property
    def max_entropy(self) -> float:
        """Entropy of the uniform gate, ln N."""
        return math.log(len(self.experts))

    @property
    def mean_entropy(self) -> float:
        """Entropy averaged over sites and examples."""
        return sum(self.entropy[ALL]) / len(self.sites)

    def by_expert(self, task: str) -> tuple[float, ...]:
        """The weight of each expert on `task`, averaged over sites."""
        rows = self.weights[task]
        return tuple(sum(row[i] for row in rows) / len(rows) for i in range(len(self.experts)))

    @property
    def dead(self) -> tuple[str, ...]:
        """Experts that get less than a tenth of their fair share at every site, on every task."""
        least = DEAD_SHARE / len(self.experts)
        rows = [row for task in self.weights for row in self.weights[task]]
        return tuple(name for i, name in enumerate(self.experts) if all(row[i] < least for row in rows))

    def document(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        summary = {"max_entropy": self.max_entropy, "mean_entropy": self.mean_entropy, "dead": list(self.dead)}
        return {**asdict(self), **summary, "by_task": {task: self.by_expert(task) for task in self.weights}}

    def lines(self) -> list[str]:
        """The report as text."""
        return report_lines(self)

    def csv(self) -> str:
        """The report as CSV."""
        return as_csv(self)

    def draw(self, path: str | Path) -> Path:
        """The path of a picture of the report."""
        from molecli.engine.heatmap import heatmap_png

        return heatmap_png(self, path)


def run_inspect(
    recipe: EvaluateRecipe,
    *,
    progress: Progress | None = None,
    note: Callable[[str], object] = lambda text: None,
    save: bool = False,
) -> GateReport:
    """The report on the one composition of `recipe`; with `save` also gates.json, .csv, .png and entropy.png.

    On a diffusion base it is by denoising step, and `note` is told what a prompt loses.
    Raises: UsageError for a composition without gates; MismatchError where base, LoRAs and gates do not fit.
    """
    path = recipe.compositions[0]
    if len(recipe.switched) > 1:
        what = f"the gates are looked at with one choice of LoRAs on, and {len(recipe.switched)} are given"
        raise UsageError("mask, only", what, "Write one list of names.")
    composition = load_composition(path)
    row = get_method(composition.mode)
    if row.level != "site" or not row.trained:
        raise UsageError(path, f"a composition of mode {composition.mode} has no gates", "Name one of mode gated.")
    if find_base(base_of(recipe.base, composition)).pipeline:
        from molecli.engine.images.inspect import inspect_pictures  # which needs diffusers, and this module

        report = inspect_pictures(recipe, composition, progress=progress, note=note)
    else:
        report = _inspect_text(recipe, composition, progress)
    if save:
        write_report(report, Path(recipe.output))
    return report


def _inspect_text(recipe: EvaluateRecipe, composition: Composition, progress: Progress | None) -> GateReport:
    path = recipe.compositions[0]
    if recipe.prompts:
        what = "a language model's gates are looked at on examples, which have answers"
        raise UsageError("--prompt", what, "Write --files FILE.jsonl.")
    check_fields(recipe, ("image",), TEXT_BASE)
    tasks = make_bench(recipe.eval).tasks
    backbone = load_backbone(base_of(recipe.base, composition), recipe.device)
    loras: dict[str, Any] = {lora.name: lora.source for lora in recipe.loras}
    with attach(backbone.model, loras=loras or None, composition=path) as mixture:
        switch_some(recipe, mixture)
        values = collect(backbone, mixture, tasks, batch_size=recipe.eval.batch_size, progress=progress)
        return summarise(values, mixture.names, composition=path, course=entropy_course(path))


def switch_some(recipe: EvaluateRecipe, mixture: Mixture) -> None:
    """Switches off what the recipe says. Raises: UsageError for an unknown LoRA, and where none is left to ask."""
    (choice,) = recipe.switched
    switch(mixture, mask=choice.mask, only=choice.only)
    if set(choice.mask) >= set(choice.only or mixture.names):
        raise UsageError("--mask", "every LoRA is switched off, and no gate is asked", "Keep one.")


@torch.no_grad()
def collect(
    backbone: Backbone,
    mixture: Mixture,
    tasks: Mapping[str, Sequence[Example]],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, dict[str, Tensor]]:
    """{task: {site: [examples, N]}}: the gates with teacher forcing, averaged over each example's tokens."""
    values: dict[str, dict[str, Tensor]] = {}
    done, total = 0, sum(map(len, tasks.values()))
    for task, examples in tasks.items():
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            backbone.token_loss(backbone.collate(batch))
            for site, gate in mixture.gates().items():
                parts.setdefault(site, []).append(gate.float().cpu().expand(len(batch), -1))
            done += len(batch)
            if progress is not None:
                progress("gates", done, total)
        values[task] = {site: torch.cat(gates) for site, gates in parts.items()}
    return values


def summarise(
    values: Mapping[str, Mapping[str, Tensor]],
    experts: Sequence[str],
    *,
    composition: str = "",
    course: Sequence[tuple[int, float]] = (),
) -> GateReport:
    """The report on gate values {task: {site: [examples, N]}}."""
    sites = tuple(next(iter(values.values())))
    everything = {site: torch.cat([gates[site] for gates in values.values()]) for site in sites}
    named = {ALL: everything, **values}
    return GateReport(
        composition=composition,
        experts=tuple(experts),
        sites=sites,
        tasks=tuple(values),
        examples={task: len(gates[sites[0]]) for task, gates in named.items()},
        weights={task: tuple(tuple(gates[s].mean(0).tolist()) for s in sites) for task, gates in named.items()},
        entropy={task: tuple(float(entropies(gates[s]).mean()) for s in sites) for task, gates in named.items()},
        course=tuple(course),
    )


def entropy_course(composition: str) -> list[tuple[int, float]]:
    """(step, gate entropy) from the train_log.jsonl beside the composition; [] where there is none."""
    records = read_log(find_composition(composition).parent)
    return [(int(record["step"]), record["entropy"]) for record in records if "entropy" in record]


def write_report(report: GateReport, folder: Path) -> None:
    """Writes gates.json, gates.csv and gates.png, and entropy.png where the training was logged."""
    from molecli.engine.heatmap import entropy_png

    write_text(folder / "gates.json", json.dumps(report.document(), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "gates.csv", report.csv())
    report.draw(folder / "gates.png")
    if report.course:
        entropy_png(report, folder / "entropy.png")


def as_csv(report: GateReport) -> str:
    """The report as CSV: task, site, expert, weight, entropy of the site's gate."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["task", "site", "expert", "weight", "entropy"])
    for task in report.weights:
        for site, weights, entropy in zip(report.sites, report.weights[task], report.entropy[task], strict=True):
            for expert, weight in zip(report.experts, weights, strict=True):
                rows.writerow([task, site, expert, f"{weight:.6f}", f"{entropy:.6f}"])
    return text.getvalue()


def report_lines(report: GateReport) -> list[str]:
    """The report as text: sites by experts, tasks by experts, entropy and dead experts."""
    head = [*report.experts, "entropy"]
    sites = [[*w, h] for w, h in zip(report.weights[ALL], report.entropy[ALL], strict=True)]
    tasks = [[*report.by_expert(task), sum(report.entropy[task]) / len(report.sites)] for task in report.weights]
    lines = [
        *table_lines("site", head, report.sites, sites),
        "",
        *table_lines("task", head, tuple(report.weights), tasks),
        "",
    ]
    lines.append(f"mean entropy {report.mean_entropy:.2f} of at most {report.max_entropy:.2f}")
    if report.course:
        (first, before), (last, after) = report.course[0], report.course[-1]
        lines.append(f"in training  {before:.2f} at step {first}, {after:.2f} at step {last}")
    lines.append(f"dead experts {', '.join(report.dead) or 'none'}")
    return lines


def table_lines(corner: str, head: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[float]]) -> list[str]:
    """A table of numbers as lines of text."""
    first = max(len(corner), *map(len, labels))
    widths = [max(len(name), 5) for name in head]
    lines = [f"{corner:{first}}  " + "  ".join(f"{name:>{w}}" for name, w in zip(head, widths, strict=True))]
    for label, row in zip(labels, rows, strict=True):
        lines.append(f"{label:{first}}  " + "  ".join(f"{v:>{w}.2f}" for v, w in zip(row, widths, strict=True)))
    return lines


def entropies(gates: Tensor) -> Tensor:
    """Entropy in nats of each row of [..., N]; a weight of 0 adds nothing."""
    return -torch.special.xlogy(gates, gates).sum(-1)
