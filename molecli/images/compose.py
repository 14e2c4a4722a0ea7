"""`mole compose` on a diffusion base: gates that learn from the LoRAs' concepts, and preview pictures of the result.

prepare       recipe -> PictureTask, checked
PictureTask   what `commands.compose` needs from a kind of base: how gates learn, and the preview
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.bases.diffusion import Diffusion
from molecli.bases.pipeline import TEXT_ENCODERS
from molecli.catalog.builtin import BUILTIN_PREFIX
from molecli.catalog.methods import ALONE, BASE, check_runs_on, get_method
from molecli.config import ComposeRecipe, DataConfig, EvalConfig, SampleRecipe
from molecli.config.unread import check_options, composing
from molecli.errors import UsageError
from molecli.evaluation.gate_report import entropy_course, write_report
from molecli.experts import Expert
from molecli.images.clip_guidance import ClipGuide, themes
from molecli.images.columns import Column, ColumnBuilder, read_concepts
from molecli.images.denoising import Prompts, checkpointed, scaled_gradients
from molecli.images.drawing import warnings_as_notes
from molecli.images.gate_trace import step_report
from molecli.images.inspect_gates import traced
from molecli.images.joint_prompts import prompts_of
from molecli.images.objective import Objective, check_objective
from molecli.images.pictures import Album, concept_pictures, concept_rows
from molecli.images.sample import sample_pictures
from molecli.metrics.clip import load_clip, source_of
from molecli.mixture.mixture import Mixture
from molecli.protocols import Note, Picture, Progress
from molecli.training.learner import learner
from molecli.training.loop import Record

if TYPE_CHECKING:
    from molecli.catalog.methods import Method
    from molecli.evaluation.report import EvaluationReport
    from molecli.files.concepts import Concept

PREVIEW_FOLDER = "preview"
PREVIEW_BATCH = 4  # pictures at once


def prepare(recipe: ComposeRecipe, note: Note = lambda text: None) -> PictureTask:
    """The task of a recipe. Raises: UserError for anything that gates cannot learn from or that would be ignored."""
    row = get_method(recipe.mode)
    check_runs_on(recipe.mode, "pictures")
    for mode in recipe.preview:
        check_runs_on(mode, "pictures", "--preview")
    # Nobody asked for the methods of the default preview, so no setting is meant for them.
    shown = recipe.preview if "preview" in recipe.model_fields_set else ()
    check_options(recipe.method, [recipe.mode, *composing(shown)])
    _check_sections(recipe)
    found = read_concepts(recipe.loras, recipe.concepts)
    # From here on a concept has its LoRA's name, whatever name concept.json gives it.
    concepts = {name: replace(concept, name=name) for name, concept in found.items()}
    pictures: list[Picture] = []
    if row.trained:
        check_objective(recipe.objective, list(concepts.values()))
        pictures = concept_pictures([lora.name for lora in recipe.loras], concepts)
    task = PictureTask(recipe, row, concepts, pictures, concept_rows(pictures) if pictures else [], note)
    if row.trained and task.guided:
        source_of(recipe.objective.guide, builtin=task.builtin)
    return task


@dataclass(frozen=True)
class PictureTask:
    """A `commands.compose.Task` on a diffusion base."""

    recipe: ComposeRecipe
    row: Method
    concepts: Mapping[str, Concept]
    pictures: Sequence[Picture]
    rows: Sequence[Any]
    note: Note

    @property
    def triggers(self) -> dict[str, str]:
        return {name: concept.trigger for name, concept in self.concepts.items()}

    @property
    def kinds(self) -> dict[str, str]:
        return {name: concept.kind for name, concept in self.concepts.items()}

    @property
    def examples(self) -> int:
        return len(self.pictures)

    @property
    def scored(self) -> int:
        return 0

    @property
    def passes(self) -> float:
        objective = self.recipe.objective
        return self.row.passes * (float(objective.denoise > 0) + self.guided * (1 + objective.clip_steps) / 2)

    @property
    def guided(self) -> bool:
        """Whether CLIP guides what the gates learn."""
        return bool(self.recipe.objective.clip or self.recipe.objective.clip_local)

    @property
    def builtin(self) -> bool:
        """Whether the base is an embedded one."""
        return self.recipe.base.id.startswith(BUILTIN_PREFIX)

    def learn(self, backbone: Diffusion, mixture: Mixture, **how: Any) -> list[Record]:
        """The records of the training by the mode's `learner`, which receives the keywords `how`."""
        recipe, dtype = self.recipe, backbone.pipe.unet.dtype
        with (
            warnings_as_notes(self.note),
            checkpointed(backbone, recipe.objective.gradient_checkpointing),
            scaled_gradients(mixture.named_parameters().values(), dtype),
        ):
            task = self.task(backbone, mixture)
            return learner(self.row, recipe.method)(
                backbone, mixture, self.rows, recipe.train, seed=recipe.seed, task=task, **how
            )

    def task(self, backbone: Diffusion, mixture: Mixture) -> Objective:
        """The recipe's objective for the attached mixture."""
        config, side = self.recipe.objective, backbone.resolution
        backbone.clip_skip = self.recipe.image.clip_skip
        adapted = any(matrix.partition(".")[0] in TEXT_ENCODERS for site in mixture.sites for matrix in site.matrices)
        conditioning = Prompts(backbone, side, keep=not adapted)
        conditioning.look_at([picture.prompt for picture in self.pictures])
        guide = None
        if self.guided:
            chosen = themes(config.prompts, list(self.concepts.values()))
            conditioning.look_at([theme.prompt for theme in chosen])
            clip = load_clip(config.guide, device=backbone.device, builtin=self.builtin)
            guide = ClipGuide(
                backbone,
                clip,
                chosen,
                conditioning,
                self.recipe.image,
                steps=config.clip_steps,
                local=config.clip_local > 0,
            )
        return Objective(backbone, mixture, Album(self.pictures, side), self.concepts, config, conditioning, guide)

    def finish(
        self, backbone: Diffusion, experts: Sequence[Expert], mixture: Mixture, progress: Progress | None
    ) -> EvaluationReport | None:
        """None: pictures are scored by mole evaluate. Draws the preview, and reports the gates while it is drawn."""
        prompts = prompts_of(list(self.concepts.values()))
        if not self.recipe.preview:
            return None
        if not prompts:
            self.note("no preview is drawn: no LoRA has a concept.json with a prompt")
            return None
        with warnings_as_notes(self.note):
            self._draw(prompts, self._columns(backbone, experts, mixture), backbone, progress)
            if mixture.named_parameters():
                self._trace(prompts, backbone, mixture, progress)
        return None

    def _columns(self, backbone: Diffusion, experts: Sequence[Expert], mixture: Mixture) -> list[Column]:
        recipe = self.recipe
        weights = {lora.name: lora.weight for lora in recipe.loras}
        named = {expert.name: expert for expert in experts}
        builder = ColumnBuilder(
            backbone.model, named, weights, self.concepts, recipe.method, branches_at_once=recipe.image.branches_at_once
        )
        columns: list[Column] = []
        for mode in dict.fromkeys(recipe.preview):
            if mode == ALONE:
                columns += [builder.alone(name) for name in weights]
            elif mode == BASE or get_method(mode).name != self.row.name:
                columns.append(builder.fixed(mode, list(weights)))
        return [*columns, Column(recipe.mode, mixture, weights)]

    def _draw(
        self, prompts: Sequence[str], columns: Sequence[Column], backbone: Diffusion, progress: Progress | None
    ) -> None:
        """Writes preview/: a picture of every prompt by every column, and the contact sheet."""
        recipe = self.recipe
        jobs = SampleRecipe(
            prompts=tuple(prompts),
            image=recipe.image,
            seed=recipe.seed,
            output=str(Path(recipe.output) / PREVIEW_FOLDER),
            batch_size=PREVIEW_BATCH,
        )
        album = sample_pictures(jobs, columns, backbone, progress=progress, note=self.note)
        if album.failures:
            self.note(f"preview: {len(album.failures)} pictures could not be drawn ({album.failures[0].reason})")

    def _trace(self, prompts: Sequence[str], backbone: Diffusion, mixture: Mixture, progress: Progress | None) -> None:
        """Writes gates.png, .csv and .json and entropy.png: what the gates do while these prompts are drawn."""
        recipe = self.recipe
        with mixture:
            traces = traced(
                backbone, mixture, prompts, recipe.image, [recipe.seed], batch_size=PREVIEW_BATCH, progress=progress
            )
        course = entropy_course(recipe.output)
        report = step_report(traces, mixture.names, composition=recipe.output, course=course)
        write_report(report, Path(recipe.output))


def _check_sections(recipe: ComposeRecipe) -> None:
    """Raises: UsageError for a section that only a language model reads."""
    if recipe.data != DataConfig():
        changed = next(key for key, value in recipe.data if value != getattr(DataConfig(), key))
        what = "on a diffusion base, gates learn from the concepts' pictures, not from a suite's tasks"
        raise UsageError(f"data.{changed}", what, "Leave it out.")
    if recipe.evaluate not in (None, EvalConfig()):
        what = "a composition on a diffusion base is scored only after it is finished"
        raise UsageError("evaluate", what, f"Leave it out, and run mole evaluate {recipe.output} afterwards.")
