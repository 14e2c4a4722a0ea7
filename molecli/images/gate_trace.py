"""The gates while pictures are denoised: a report by prompt, denoising step, site and expert, as text, CSV and PNG.

Contents: Trace, StepReport, step_report, step_lines, step_csv, step_png, GateRecorder.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.bases.pipeline import TEXT_ENCODERS, PipelineModules
from molecli.errors import RunError
from molecli.evaluation.figures import figure_of, save_figure, spread
from molecli.evaluation.gate_report import ALL, GateReport, entropies, summarise, table_lines
from molecli.mixture.mixture import Mixture
from molecli.protocols import Moment

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"


@dataclass(frozen=True)
class Trace:
    """The gates of one prompt's pictures.

    steps[rows] [P, S, M, N]: P pictures, S denoising steps, M sites of the UNet, N experts. `rows` is "conditional" or,
    with guidance, also "unconditional". text [P, m, N]: the m sites in the text encoders, on the prompt itself.
    """

    sites: tuple[str, ...]
    text_sites: tuple[str, ...]
    timesteps: tuple[float, ...]
    steps: Mapping[str, Tensor]
    text: Tensor


@dataclass(frozen=True)
class StepReport(GateReport):
    """A GateReport of the conditional rows, averaged over the denoising steps. Its tasks are the prompts.

    by_step[rows][step][site][expert] is the mean over all pictures. `step_sites` are the UNet's sites.
    """

    step_sites: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    by_step: Mapping[str, tuple[tuple[tuple[float, ...], ...], ...]] | None = None

    def expert_course(self, rows: str) -> list[list[float]]:
        """[step][expert]: the weight of each expert at each denoising step, averaged over the UNet's sites."""
        assert self.by_step is not None
        return torch.tensor(self.by_step[rows]).mean(1).tolist()

    def document(self) -> dict[str, Any]:
        rows = {name: self.expert_course(name) for name in self.by_step or {}}
        return {**super().document(), "by_step_mean": rows}

    def lines(self) -> list[str]:
        return step_lines(self)

    def csv(self) -> str:
        return step_csv(self)

    def draw(self, path: str | Path) -> Path:
        return step_png(self, path)


def step_report(
    traces: Mapping[str, Trace],
    experts: Sequence[str],
    *,
    composition: str = "",
    course: Sequence[tuple[int, float]] = (),
) -> GateReport:
    """The report on the traces of all prompts, which have the same sites and steps.

    A plain GateReport if no LoRA adapts the UNet: gates in the text encoders have no denoising steps.
    """
    first = next(iter(traces.values()))
    values = {prompt: _over_steps(trace) for prompt, trace in traces.items()}
    if not first.sites:
        by_site = {
            prompt: {site: rows[:, i] for i, site in enumerate(first.text_sites)} for prompt, rows in values.items()
        }
        return summarise(by_site, experts, composition=composition, course=course)
    values = {ALL: torch.cat(list(values.values())), **values}
    entropy = {prompt: _entropy_over_steps(trace) for prompt, trace in traces.items()}
    entropy = {ALL: torch.cat(list(entropy.values())), **entropy}
    by_step = {rows: torch.cat([trace.steps[rows] for trace in traces.values()]).mean(0) for rows in first.steps}
    return StepReport(
        composition=composition,
        experts=tuple(experts),
        sites=(*first.sites, *first.text_sites),
        tasks=tuple(traces),
        examples={prompt: len(rows) for prompt, rows in values.items()},
        weights={prompt: _nested(rows.mean(0)) for prompt, rows in values.items()},
        entropy={prompt: tuple(rows.mean(0).tolist()) for prompt, rows in entropy.items()},
        course=tuple(course),
        step_sites=first.sites,
        timesteps=first.timesteps,
        by_step={rows: _nested(mean) for rows, mean in by_step.items()},
    )


def step_lines(report: StepReport) -> list[str]:
    """The report as text: sites by experts, prompts by experts, denoising steps by experts."""
    assert report.by_step is not None
    lines = GateReport.lines(report)
    courses = {rows: report.expert_course(rows) for rows in report.by_step}
    head = [name if rows == CONDITIONAL else f"{name} ∅" for rows in courses for name in report.experts]
    labels = [f"{i + 1:>3}  t={timestep:g}" for i, timestep in enumerate(report.timesteps)]
    rows = [[value for course in courses.values() for value in course[i]] for i in range(len(labels))]
    if not rows:
        return lines
    note = ["", "∅: for the unconditional half of classifier-free guidance"] if len(courses) > 1 else []
    return [*lines, "", *table_lines("step", head, labels, rows), *note]


def step_csv(report: StepReport) -> str:
    """The report as CSV: rows (conditional or not), step from 1, timestep, site, expert, weight."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["rows", "step", "timestep", "site", "expert", "weight"])
    for kind, steps in (report.by_step or {}).items():
        for i, (timestep, sites) in enumerate(zip(report.timesteps, steps, strict=True)):
            for site, weights in zip(report.step_sites, sites, strict=True):
                for expert, weight in zip(report.experts, weights, strict=True):
                    rows.writerow([kind, i + 1, f"{timestep:g}", site, expert, f"{weight:.6f}"])
    return text.getvalue()


def step_png(report: StepReport, path: str | Path) -> Path:
    """The path of the picture: the experts' weights over the steps, and for each a heat map of sites by steps."""
    assert report.by_step is not None
    panels = len(report.experts) + 1
    longest = max(map(len, report.step_sites))
    height = min(24.0, max(3.2, 0.17 * min(len(report.step_sites), 60) + 1.7))
    figure = figure_of(min(30.0, 0.075 * longest + 2.6 * panels + 1.2), height)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    shown = range(1, len(report.timesteps) + 1)
    for i, expert in enumerate(report.experts):
        for rows, style in ((CONDITIONAL, "-"), (UNCONDITIONAL, ":")):
            if rows in report.by_step:
                course = [weights[i] for weights in report.expert_course(rows)]
                axes[0].plot(shown, course, style, color=f"C{i}", label=expert if rows == CONDITIONAL else None)
    axes[0].set(xlabel="denoising step", ylabel="mean gate weight", ylim=(0, 1))
    axes[0].set_title(
        "all sites (dotted: unconditional)" if UNCONDITIONAL in report.by_step else "all sites", fontsize=8
    )
    axes[0].legend(fontsize=7)
    maps = torch.tensor(report.by_step[CONDITIONAL])
    places = spread(len(report.step_sites))
    for i, expert in enumerate(report.experts):
        axis = axes[i + 1]
        image = axis.imshow(
            maps[:, :, i].T.numpy(),
            aspect="auto",
            cmap="viridis",
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
            extent=(0.5, len(report.timesteps) + 0.5, len(report.step_sites) - 0.5, -0.5),
        )
        axis.set_title(expert, fontsize=8)
        axis.set_xlabel("denoising step", fontsize=8)
        axis.set_yticks(places, [report.step_sites[j] for j in places] if i == 0 else [], fontsize=6)
    figure.colorbar(image, ax=list(axes[1:]), label="mean gate weight", fraction=0.03, pad=0.02)
    return save_figure(figure, path)


def _over_steps(trace: Trace) -> Tensor:
    """[P, M + m, N]: each picture's gates, those of the UNet averaged over the steps."""
    return torch.cat([trace.steps[CONDITIONAL].mean(1), trace.text], dim=1)


def _entropy_over_steps(trace: Trace) -> Tensor:
    """[P, M + m] in nats: the mean of the steps' entropies (not the entropy of the mean)."""
    return torch.cat([entropies(trace.steps[CONDITIONAL]).mean(1), entropies(trace.text)], dim=1)


def _nested(values: Tensor) -> Any:
    """A tensor as nested tuples."""
    return tuple(_nested(part) for part in values) if values.dim() > 1 else tuple(values.tolist())


class GateRecorder:
    """Called after every denoising step; keeps each picture's gates of that step, on the CPU.

    The unconditional and the conditional half of guidance are kept separately. Several generations with the same
    number of steps can be recorded one after another.
    """

    def __init__(self, mixture: Mixture) -> None:
        assert isinstance(mixture.model, PipelineModules)
        self.mixture, self.model = mixture, mixture.model
        part = {site.name: site.matrices[0].partition(".")[0] for site in mixture.sites}
        self.sites = tuple(name for name in part if part[name] == "unet")
        self._of_encoder = {e: [s for s in part if part[s] == e] for e in TEXT_ENCODERS if e in part.values()}
        self.text_sites = tuple(site for sites in self._of_encoder.values() for site in sites)
        self._handles: list[RemovableHandle] = []
        self._rows = 0  # of the UNet's last pass
        self._encoded: dict[str, list[Tensor]] = {}
        self._text: list[Tensor] = []
        self._timesteps: list[float] = []
        # {rows: a list per generation, with one tensor [M, B, N] per step}
        self._steps: dict[str, list[list[Tensor]]] = {}

    def __enter__(self) -> GateRecorder:
        def note_rows(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._rows = len(args[0])

        self._handles = [self.model.get_submodule("unet").register_forward_pre_hook(note_rows)]
        for encoder in self._of_encoder:
            module = self.model.text_encoders[encoder]
            self._handles.append(module.register_forward_hook(self._hook(encoder)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, moment: Moment) -> None:
        """Keeps the gates of the step that has just finished."""
        if moment.index == 0:
            self._timesteps = []
            self._keep_text(self._rows // 2 if moment.guided else self._rows)
        self._timesteps.append(moment.timestep)
        gates = self._stacked(self.sites, self._rows)
        halves = gates.chunk(2, dim=1) if moment.guided else (gates,)
        for rows, half in zip((UNCONDITIONAL, CONDITIONAL) if moment.guided else (CONDITIONAL,), halves, strict=True):
            generations = self._steps.setdefault(rows, [])
            if moment.index == 0:
                generations.append([])
            generations[-1].append(half)

    def trace(self) -> Trace:
        """The gates of all pictures so far. Raises: RunError if nothing was drawn."""
        if not self._timesteps:
            raise RunError("gates", "no picture was drawn while they were recorded", "Call the pipeline first.")
        steps = {
            rows: torch.cat([torch.stack(generation).permute(2, 0, 1, 3) for generation in generations])
            for rows, generations in self._steps.items()
        }
        text = torch.cat([part.transpose(0, 1) for part in self._text])
        return Trace(self.sites, self.text_sites, tuple(self._timesteps), steps, text)

    def _stacked(self, sites: Sequence[str], rows: int) -> Tensor:
        """[sites, rows, N] of the last pass; a gate that is the same for every input is repeated in each row."""
        gates = self.mixture.gates()
        empty = torch.zeros(0, rows, len(self.mixture.names))
        return torch.stack([gates[site].float().expand(rows, -1) for site in sites]).cpu() if sites else empty

    def _hook(self, encoder: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            self._encoded.setdefault(encoder, []).append(self._stacked(self._of_encoder[encoder], len(args[0])))

        return hook

    def _keep_text(self, pictures: int) -> None:
        """Keeps the text encoders' gates on the prompts; a pipeline encodes these before the negative prompts."""
        parts = [passes[0] for passes in self._encoded.values()]
        self._text.append(torch.cat(parts) if parts else torch.zeros(0, pictures, len(self.mixture.names)))
        self._encoded = {}
