"""`mole evaluate` on a diffusion base: every method draws every scene from the same seeds, and every picture is scored.

evaluate       recipe -> EvaluationReport: the whole command
Setting        what is known before the base is loaded: compositions, LoRAs, concepts, scenes (read_setting checks it)
switched_off   the LoRAs that --mask and --only switch off            sheet_rows   the rows of the contact sheet
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import BUILTIN_IMAGE_BASE, builtin_loras
from molecli.catalog.methods import BASE, check_runs_on, shown_beside
from molecli.catalog.metrics import metric_row
from molecli.config import BaseConfig, EvaluateRecipe
from molecli.config.unread import check_options, composing
from molecli.errors import RunError, UsageError
from molecli.evaluation.columns import folder_names
from molecli.evaluation.report import EvaluationReport, missing, recorded_loras, usual_modes
from molecli.evaluation.results import compare, document, intervals, write
from molecli.evaluation.tables import score_table
from molecli.files.composition import Composition
from molecli.files.lora_spec import LoraLike, LoraSpec
from molecli.images.clip_skip import use_clip_skip
from molecli.images.columns import ColumnBuilder, read_concepts
from molecli.images.draw_scenes import DrawingPlan, draw_planned
from molecli.images.drawing import Failure, check_drawn, warnings_as_notes
from molecli.images.judge import Case, JudgeReport, check_judge, pair_up, run_judge
from molecli.images.scene_columns import Learned, SceneColumn, scene_columns
from molecli.images.scenes import Concepts, PlannedPicture, SceneBench, load_scenes, plan_pictures
from molecli.images.scoring import PictureResult, make_instruments, paired, score_files
from molecli.images.sheet import SheetRow, write_sheets
from molecli.metrics.clip import source_of
from molecli.metrics.image_batch import Instruments
from molecli.mixture.attach import base_of, read_experts
from molecli.protocols import Note, Progress

SHEET_ROWS = 12
# Drawn pictures are kept, so that an interrupted run can be resumed.
RESUMES = True


@dataclass(frozen=True)
class Setting:
    """What an evaluation compares and scores, checked without loading the base. loras: of the recipe, or recorded."""

    base: BaseConfig
    compositions: Mapping[str, Composition]
    paths: Mapping[str, str]
    loras: Sequence[LoraLike]
    concepts: Concepts
    modes: Sequence[str]
    bench: SceneBench

    @property
    def builtin(self) -> bool:
        return self.base.id == BUILTIN_IMAGE_BASE

    @property
    def needed(self) -> list[LoraLike]:
        """The LoRAs that the fixed methods use."""
        fixed = set(self.modes) - {BASE}
        return [lora for lora in self.loras if lora.name in self.bench.loras] if fixed else []


def read_setting(
    recipe: EvaluateRecipe, compositions: Mapping[str, Composition], *, note: Note = lambda text: None
) -> Setting:
    """The setting of a recipe. Raises: UsageError and MismatchError for anything that the run could not use."""
    for mode in recipe.modes:
        check_runs_on(mode, "pictures", "--modes")
    paths = folder_names(recipe.compositions)
    base = base_of(recipe.base, next(iter(compositions.values()), None))
    builtin = base.id == BUILTIN_IMAGE_BASE
    loras: list[LoraLike] = list(recipe.loras) or recorded_loras(compositions.values())
    if not loras and builtin:
        loras = [LoraSpec(name, str(path)) for name, path in builtin_loras(BUILTIN_IMAGE_BASE).items()]
    gone = missing(loras, compositions.values())
    known = read_concepts(
        [lora for lora in loras if lora.name not in gone or lora.name in recipe.concepts], recipe.concepts
    )
    concepts = {lora.name: known.get(lora.name) for lora in loras}
    bench = load_scenes(recipe.eval, concepts, builtin=builtin, note=note)
    if bench.asks_clip:
        source_of(recipe.eval.clip, builtin=builtin)
    modes: Sequence[str] = recipe.modes
    if not modes and (recipe.eval.baselines or not compositions):
        modes = usual_modes(
            shown_beside("pictures"), [lora for lora in loras if lora.name in bench.loras], compositions
        )
    check_options(recipe.method, composing(modes))
    return Setting(base, compositions, paths, loras, concepts, modes, bench)


def evaluate(
    recipe: EvaluateRecipe,
    compositions: Mapping[str, Composition],
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> EvaluationReport:
    """The report of a whole run. results.json, the samples and sheet.png are rewritten after every method.

    A picture is written as soon as it is drawn. One that is already in `recipe.output` from the same run is not drawn
    again. `note` receives a line when words of a prompt are cut, and for each metric that cannot be computed.
    Raises: UsageError, MismatchError and RunError, from loading the scenes, the CLIP, the base and the LoRAs; RunError
    at the end if a picture could not be drawn or the judge failed. The other pictures are kept.
    """
    setting = read_setting(recipe, compositions, note=note)
    backbone: Any = load_backbone(setting.base, recipe.device)
    use_clip_skip(backbone, recipe.image.clip_skip, compositions.values())
    with warnings_as_notes(note):
        instruments = make_instruments(setting.bench, recipe.eval.clip, device=backbone.device, builtin=setting.builtin)
        columns = _columns(recipe, setting, backbone)
        if recipe.judge is not None:
            check_judge(recipe.judge, [column.name for column in columns])
        pictures = plan_pictures(setting.bench.all, recipe.eval.images, recipe.seed)
        names = [column.name for column in columns]
        plan = DrawingPlan(Path(recipe.output), pictures, names, backbone, recipe.image, recipe.eval.batch_size)
        return _Run(recipe, setting.bench, plan, instruments).draw_and_score(columns, progress, note)


class _Run:
    """One evaluation while it runs: what was drawn and scored so far, by method."""

    def __init__(self, recipe: EvaluateRecipe, bench: SceneBench, plan: DrawingPlan, instruments: Instruments) -> None:
        self.recipe, self.bench, self.plan, self.instruments = recipe, bench, plan, instruments
        self.files: dict[str, dict[PlannedPicture, Path]] = {}
        self.scored: dict[str, dict[PlannedPicture, dict[str, float]]] = {}
        self.failures: list[Failure] = []

    def draw_and_score(self, columns: Sequence[SceneColumn], progress: Progress | None, note: Note) -> EvaluationReport:
        """The final report. Raises: RunError if a picture could not be drawn or judged."""
        for column in columns:
            found, failures = draw_planned(self.plan, column, progress=progress, note=note)
            self.files[column.name] = found
            self.scored[column.name] = score_files(
                self.bench, found, self.instruments, label=f"{column.name}: scores", progress=progress
            )
            self.failures += failures
            if found:
                self.write(self.report(samples=0))
        report = self.write(self.report(samples=self.recipe.eval.bootstrap))
        if self.recipe.judge is not None:
            report = self.write(self.report(samples=self.recipe.eval.bootstrap, judged=self.judge(progress)))
        self.check()
        return report

    def report(self, *, samples: int, judged: JudgeReport | None = None) -> EvaluationReport:
        """The report on what was scored so far. Raises: RunError if no picture was drawn by every method."""
        results, seed = self.results(), self.recipe.seed
        subject = list(results)[-1]
        metrics = list(dict.fromkeys(m for result in results[subject] for m in result.scores))
        if not metrics:
            self.check()
            raise RunError("pictures", "no picture was drawn by every method", "Run it again with --resume.")
        rows = [c for m in metrics for c in compare(results, subject, samples=samples, seed=seed, metric=m)]
        config = self.recipe.model_dump(mode="json")
        device = self.plan.backbone.device
        content = document(results, subject, suite=self.bench.suite, comparisons=rows, config=config, device=device)
        content["averages"] = {
            metric: dict(zip(table.columns, table.rows[-1].scores, strict=True))
            for metric, table in ((metric, score_table(results, metric)) for metric in metrics)
        }
        content["intervals"] = intervals(results, samples=samples, seed=seed)
        content["images"] = self.recipe.eval.images
        if any(metric_row(metric).asks_clip for metric in metrics):
            content["clip"] = self.instruments.clip.name
        content["failed"] = [
            {"picture": _inside(f.job.name, self.plan.folder), "reason": f.reason} for f in self.failures
        ]
        lines = [str(row) for row in rows]
        if judged is not None:
            content["judge"] = judged.document()
            lines += judged.lines()
        tables = [score_table(results, metric) for metric in metrics]
        return EvaluationReport(content, tables[0], lines, tables[1:])

    def results(self) -> dict[str, list[PictureResult]]:
        return paired(self.bench, self.plan.pictures, self.files, self.scored, self.plan.folder)

    def write(self, report: EvaluationReport) -> EvaluationReport:
        """The same report, after writing all files of the run."""
        write_sheets(self.plan.folder, list(self.files), sheet_rows(self.plan.pictures, self.files))
        write(self.plan.folder, report, self.results())
        return report

    def judge(self, progress: Progress | None) -> JudgeReport:
        """The judge's report: every picture against the baseline's of the same scene and seed. Raises: RunError."""
        config = self.recipe.judge
        assert config is not None
        cases = [Case(t.scene.task, f"{t.scene.name} #{t.number}", t.scene.elements) for t in self.plan.pictures]
        drawn = {name: [found.get(picture) for picture in self.plan.pictures] for name, found in self.files.items()}
        samples, seed = self.recipe.eval.bootstrap, self.recipe.seed
        pairs = pair_up(cases, drawn, config.baseline)
        return run_judge(config, pairs, self.plan.folder, samples=samples, seed=seed, progress=progress)

    def check(self) -> None:
        """Raises: RunError if a picture could not be drawn."""
        check_drawn(self.failures, len(self.plan.pictures) * len(self.plan.columns))


def sheet_rows(planned: Sequence[PlannedPicture], files: Mapping[str, Mapping[PlannedPicture, Path]]) -> list[SheetRow]:
    """The first picture of at most SHEET_ROWS scenes, which are spread evenly over all scenes."""
    first = [picture for picture in planned if picture.number == 0]
    count = min(SHEET_ROWS, len(first))
    shown = [first[i * len(first) // count] for i in range(count)]
    return [
        SheetRow(t.scene.prompt, f"{t.scene.task}, seed {t.seed}", tuple(found.get(t) for found in files.values()))
        for t in shown
    ]


def _columns(recipe: EvaluateRecipe, setting: Setting, backbone: Any) -> list[SceneColumn]:
    """The columns, built and checked. Raises: UsageError, MismatchError."""
    # A LoRA that a composition records may match the base only in part: that was accepted when it was composed.
    experts = read_experts(backbone.model, setting.needed, allow_partial=not recipe.loras)
    builder = ColumnBuilder(
        backbone.model,
        {expert.name: expert for expert in experts},
        {lora.name: getattr(lora, "weight", 1.0) for lora in setting.loras},
        {name: concept for name, concept in setting.concepts.items() if concept is not None},
        recipe.method,
        recipe.image.branches_at_once,
    )
    learned = {
        name: Learned(one, setting.paths[name], builder.composed(name, one, _own(one, recipe.loras)))
        for name, one in setting.compositions.items()
    }
    columns = scene_columns(builder, setting.bench, setting.modes, learned, off=switched_off(recipe, setting.loras))
    if missing(setting.loras, setting.compositions.values()):
        for column in columns:  # report a scene that needs a missing LoRA before the first picture is drawn
            for scene in setting.bench.all:
                column.of(scene.loras)
    return columns


def _own(composition: Composition, loras: Sequence[LoraLike]) -> list[LoraLike]:
    """The composition's LoRAs: as given here, otherwise as it records them. Empty if none of them is given here."""
    given = {lora.name: lora for lora in loras if lora.name in composition.names}
    if not given:
        return []
    return [given.get(record.name) or LoraSpec(record.name, record.source) for record in composition.experts]


def switched_off(recipe: EvaluateRecipe, loras: Sequence[LoraLike]) -> dict[str, list[str]]:
    """{suffix of a method's name: the LoRAs that --mask and --only switch off}; a single choice has no suffix.

    Raises: UsageError for a name that no LoRA has.
    """
    names = [lora.name for lora in loras]
    for name in (name for choice in recipe.switched for name in (*choice.mask, *choice.only)):
        if name not in names:
            raise UsageError("--mask", f"no LoRA is called {name!r}", f"There are: {', '.join(names) or 'none'}.")
    several = len(recipe.switched) > 1
    return {
        choice.label if several else "": [
            n for n in names if n in choice.mask or (choice.only and n not in choice.only)
        ]
        for choice in recipe.switched
    }


def _inside(path: str, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()
