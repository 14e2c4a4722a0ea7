"""`mole export`: writes a composition as one ordinary adapter and measures how far the two differ.

run_export    recipe -> ExportReport: the whole command
prepare       recipe -> Task, checked before anything is loaded
Task          a recipe on one kind of base: what a domain's `export.prepare` returns
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from molecli import __version__
from molecli.adapters import with_one_alpha
from molecli.bases import prompt_record
from molecli.bases.loading import load_backbone
from molecli.catalog.methods import BASE, DEFAULT, SUM, get_method
from molecli.commands.domain import Domain, domain_of
from molecli.errors import RunError, UsageError
from molecli.evaluation.export_error import ExportError, Observed
from molecli.evaluation.verify import Verification, verify
from molecli.experts import Expert, LowRank
from molecli.files.atomic import write_bytes, write_text
from molecli.files.composition import Composition, load_composition
from molecli.files.lora_spec import CONFIG_FILE
from molecli.files.tensor_file import in_fixed_order
from molecli.mixture.attach import attach_composition, base_of
from molecli.mixture.build import sum_of
from molecli.mixture.constant import Weights, constant_weights, fixed_mixture, limited, mean_weights, updates
from molecli.mixture.merged import MergedMixture
from molecli.mixture.mixture import Mixture, switch
from molecli.protocols import Note, Progress
from molecli.training.checkpoints import REPORT_FILE

if TYPE_CHECKING:
    from molecli.config import ExportRecipe
    from molecli.suites.origins import Sources

Factors = Mapping[str, LowRank]
# A gate that does not depend on the input needs nothing else.
_STILL = ("/logits", "/log_temperature")


class Task(Protocol):
    """A recipe on one kind of base, checked before anything is loaded.

    layouts: the file formats it can be written in, the usual one first.
    of: what the calibration inputs are called. sources: where they come from, if they are examples.
    unit: the unit of the loss.
    """

    layouts: tuple[str, ...]
    of: str
    unit: str

    @property
    def sources(self) -> Mapping[str, Sources]: ...

    @property
    def inputs(self) -> int: ...

    def count(self, *, fetch: bool) -> int:
        """How many inputs there are; of those in public places what the limit allows, unless they may be fetched."""
        ...

    def observe(
        self, backbone: Any, mixture: Mixture | None, *, gates: bool, label: str, progress: Progress | None
    ) -> Observed:
        """What the mixture (None: the base) does on the calibration inputs; its gates too, if they are asked for."""
        ...

    def write(self, folder: Path, layout: str, factors: Factors, backbone: Any) -> Path:
        """The new folder, holding the adapter."""
        ...

    def loaded(self, backbone: Any, folder: Path, layout: str) -> AbstractContextManager[None]:
        """A context in which the base has the adapter, loaded by its own library."""
        ...

    def probe(self, backbone: Any) -> Tensor:
        """The model's output on a few inputs, as it is now."""
        ...

    def library(self, layout: str) -> str:
        """The library that loads the adapter, with its version."""
        ...


class ExportReport(dict[str, Any]):
    """What was exported and how far it is from the composition; also in report.json."""

    def __init__(self, content: Mapping[str, Any], lines: list[str]) -> None:
        super().__init__(content)
        self.lines = lines

    def show(self) -> None:
        """Prints the report."""
        sys.stdout.write("\n".join(self.lines) + "\n")


def run_export(
    recipe: ExportRecipe,
    *,
    domain: Domain | None = None,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> ExportReport:
    """Writes the composition of `recipe` as an adapter into its output folder; returns the report, also written there.

    domain: that of the base, if it is known.
    Raises: UsageError if no single adapter can do what the composition does; MismatchError if base, LoRAs and
    composition do not belong together; RunError if --verify finds a difference too large for rounding (the files stay).
    """
    composition = load_composition(str(recipe.composition))
    task = prepare(recipe, composition, domain, note)
    layout = chosen_layout(recipe, task)
    if needs_inputs(recipe, composition):
        task.inputs  # noqa: B018 (what is wrong with them shows before the base is loaded)
    base = base_of(recipe.base, composition)
    if recipe.verify:
        base = base.model_copy(update={"dtype": "float32"})
    backbone = load_backbone(base, recipe.device)
    mixture = attach_composition(backbone.model, composition, loras=list(recipe.loras) or None)
    off = switch(mixture, mask=recipe.mask, only=recipe.only)
    if needs_inputs(recipe, composition):
        prompt_record.tell(backbone, note, base=base, compositions={str(recipe.composition): composition.settings})
    still = _still(composition, task, backbone, mixture, off, progress)
    meant = updates(still.mixture, still.weights, renormalize=_renormalizes(composition))
    if not meant:
        raise UsageError(
            str(recipe.composition), "its LoRAs add nothing to the base", "Check their weights and --mask."
        )
    factors, errors = limited(meant, recipe.rank, progress=progress)
    written = _as_stored(factors, layout, recipe.dtype)
    comparison = _compared(recipe, composition, task, backbone, mixture, still, written, progress)
    folder = Path(recipe.output)
    files = _write(folder, lambda scratch: task.write(scratch, layout, written, backbone))
    verification = None
    if recipe.verify:
        verification = verify(
            backbone.model,
            still.mixture,
            task.loaded(backbone, folder, layout),
            lambda: task.probe(backbone),
            meant=meant,
            written=written,
            exact=recipe.dtype == "float32" and not any(errors.values()),
            library=task.library(layout),
        )
    content = _Content(recipe, composition, layout, still, written, errors, files, task.of, comparison, verification)
    report = ExportReport(content.document(), content.lines())
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if verification is not None:
        verification.check(recipe.output)
    return report


def prepare(
    recipe: ExportRecipe, composition: Composition, domain: Domain | None = None, note: Note = lambda text: None
) -> Task:
    """The recipe on its kind of base. Raises: UsageError if no single adapter can hold it."""
    if get_method(composition.mode).level == "output":
        what = f"mode {composition.mode} composes the UNet's outputs step by step, which a single adapter cannot"
        raise UsageError(
            str(recipe.composition), what, f"Compose the LoRAs with --mode {DEFAULT} or {SUM}, and export that."
        )
    if set(recipe.mask) >= set(recipe.only or composition.names):
        raise UsageError("--mask", "every LoRA is switched off, and nothing is left to export", "Keep one.")
    domain = domain or domain_of(base_of(recipe.base, composition))
    task: Task = domain.command("export").prepare(recipe, composition, note)
    return task


def domain_for(recipe: ExportRecipe) -> Domain:
    """The domain of the recipe's base, or else of the composition's."""
    return domain_of(base_of(recipe.base, load_composition(str(recipe.composition))))


def needs_inputs(recipe: ExportRecipe, composition: Composition) -> bool:
    """Whether calibration inputs are needed: for gates that depend on the input, or to measure the error."""
    given = bool(recipe.calibration.examples or recipe.calibration.prompts)
    looking = not all(name.endswith(_STILL) for name in composition.tensors)
    return given or (get_method(composition.mode).level == "site" and looking)


def chosen_layout(recipe: ExportRecipe, task: Task) -> str:
    """The layout to write. Raises: UsageError if it is not for this kind of base."""
    if recipe.format == "auto":
        return task.layouts[0]
    if recipe.format not in task.layouts:
        what = "it is a layout of diffusion pipelines, and the base is a language model"
        raise UsageError(f"--format {recipe.format}", what, f"Write --format {task.layouts[0]}.")
    return recipe.format


@dataclass(frozen=True)
class _Still:
    """A composition that is the same for every input; `observed`: the original, where its gates were averaged."""

    mixture: Mixture
    weights: Weights
    observed: Observed | None = None


def _still(
    composition: Composition,
    task: Task,
    backbone: Any,
    mixture: Mixture,
    off: Collection[str],
    progress: Progress | None,
) -> _Still:
    constant = constant_weights(mixture, off)
    if constant is not None:
        return _Still(mixture, constant)
    observed = task.observe(backbone, mixture, gates=True, label="gates", progress=progress)
    weights = mean_weights(mixture, observed.gates)
    return _Still(fixed_mixture(mixture, weights, renormalize=_renormalizes(composition)), weights, observed)


def _renormalizes(composition: Composition) -> bool:
    return bool(composition.gate) and (composition.gate or {}).get("absent") == "renormalize"


def _as_stored(factors: Factors, layout: str, dtype: str) -> dict[str, LowRank]:
    """The factors in the file's dtype. Raises: RunError if they overflow it."""
    kind = getattr(torch, dtype)
    if layout == "kohya":
        factors = with_one_alpha(factors)
    stored = {name: LowRank(f.A.to(kind), f.B.to(kind), f.scaling) for name, f in factors.items()}
    for name, low_rank in stored.items():
        if not (low_rank.A.isfinite().all() and low_rank.B.isfinite().all()):
            raise RunError(name, f"its factors do not fit in {dtype}", "Write --dtype float32.")
    return stored


def _compared(
    recipe: ExportRecipe,
    composition: Composition,
    task: Task,
    backbone: Any,
    mixture: Mixture,
    still: _Still,
    written: Factors,
    progress: Progress | None,
) -> ExportError | None:
    """The export compared with the original and the base on the calibration inputs, if there are any."""
    if not needs_inputs(recipe, composition):
        return None

    def observe(which: Mixture | None, label: str) -> Observed:
        return task.observe(backbone, which, gates=False, label=label, progress=progress)

    own = still.observed or observe(mixture, composition.mode)
    export = sum_of(backbone.model, [Expert("export", written)])
    base, exported = observe(None, BASE), observe(export, "export")
    return ExportError(composition.mode, task.of, task.unit, base, own, exported, recipe.seed)


def _write(folder: Path, write: Callable[[Path], Path]) -> list[str]:
    """Moves the files that `write` makes in a new folder to `folder`, each atomically; returns their names."""
    with tempfile.TemporaryDirectory() as scratch:
        made = write(Path(scratch) / "adapter")
        # The configuration comes last, because readers look for it first.
        found = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda p: (p.name == CONFIG_FILE, p))
        for path in found:
            data = path.read_bytes()
            write_bytes(
                folder / path.relative_to(made), in_fixed_order(data) if path.suffix == ".safetensors" else data
            )
        return [path.relative_to(made).as_posix() for path in found]


@dataclass(frozen=True)
class _Content:
    """The content of the report."""

    recipe: ExportRecipe
    composition: Composition
    layout: str
    still: _Still
    written: Factors
    errors: Mapping[str, float]
    files: list[str]
    of: str
    comparison: ExportError | None
    verification: Verification | None

    @property
    def _ranks(self) -> list[int]:
        return [low_rank.rank for low_rank in self.written.values()]

    @property
    def _parameters(self) -> int:
        return sum(f.A.numel() + f.B.numel() for f in self.written.values())

    @property
    def _worst(self) -> str:
        return max(self.errors, key=self.errors.__getitem__)

    def document(self) -> dict[str, Any]:
        recipe, composition = self.recipe, self.composition
        merged = isinstance(self.still.mixture, MergedMixture)
        weights = {} if merged else {site: values.tolist() for site, values in self.still.weights.items()}
        return {
            "command": recipe.command,
            "molecli_version": __version__,
            "output": recipe.output,
            "composition": recipe.composition,
            "mode": composition.mode,
            "base": composition.base,
            "experts": list(composition.names),
            "format": self.layout,
            "dtype": recipe.dtype,
            "files": self.files,
            "matrices": len(self.written),
            "parameters": self._parameters,
            "rank": {"limit": recipe.rank, "smallest": min(self._ranks), "largest": max(self._ranks)},
            "error": {
                "mean": fmean(self.errors.values()),
                "worst": self.errors[self._worst],
                "matrix": self._worst,
                "by_matrix": {name: {"rank": self.written[name].rank, "error": e} for name, e in self.errors.items()},
            },
            "averaged_over": self._averaged_over,
            "weights": weights,
            "calibration": None if self.comparison is None else self.comparison.document(),
            "verification": None if self.verification is None else self.verification.document(),
        }

    @property
    def _averaged_over(self) -> int:
        observed = self.still.observed
        return 0 if observed is None else len(next(iter(observed.gates.values())))

    @property
    def _error_line(self) -> str:
        if any(self.errors.values()):
            mean, worst = fmean(self.errors.values()), self.errors[self._worst]
            return f"of rank {self.recipe.rank}: mean {mean:.4f}, worst {worst:.4f} ({self._worst})"
        return "none: exact" if self.recipe.dtype == "float32" else f"none but the rounding to {self.recipe.dtype}"

    def lines(self) -> list[str]:
        """The report as text."""
        recipe, ranks = self.recipe, self._ranks
        rank = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        named = f"{self.composition.mode} of {', '.join(self.composition.names)}"
        averaged = f", its gates averaged over {self._averaged_over} {self.of}" if self._averaged_over else ""
        return [
            f"exported  {recipe.output}: {self.layout}, {', '.join(self.files)}",
            f"of        {recipe.composition}: {named}{averaged}",
            f"factors   {len(ranks)} matrices, rank {rank}, {self._parameters:,} numbers in {recipe.dtype}",
            f"error     {self._error_line}",
            *(self.comparison.lines() if self.comparison is not None else []),
            *([f"verified  {self.verification.line()}"] if self.verification is not None else []),
        ]
