"""`mole compose` on a diffusion base: gates that learn from the LoRAs' concepts, and pictures of what was composed.

PictureDomain    what `compose.run_compose` asks of a kind of base
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.backbones.diffusion import Diffusion
from molecli.backbones.hosting import Mixture
from molecli.backbones.pipeline import TEXT_ENCODERS
from molecli.catalog import BUILTIN_PREFIX
from molecli.compose import get_method
from molecli.compose.options import check_options, told
from molecli.engine.images.checkpointing import checkpointed
from molecli.engine.images.columns import Column, Studio, read_concepts
from molecli.engine.images.concept_pictures import concept_pictures, concept_rows
from molecli.engine.images.denoising import Prompts, scaled_gradients
from molecli.engine.images.drawing import warnings_as_notes
from molecli.engine.images.gates import step_report
from molecli.engine.images.guidance import ClipGuide, themes
from molecli.engine.images.inspect import traced
from molecli.engine.images.joint import prompts_of
from molecli.engine.images.objective import Objective, check_objective
from molecli.engine.images.pictures import Album
from molecli.engine.images.sample import sample_pictures
from molecli.engine.inspect import Progress, entropy_course, write_report
from molecli.engine.learn import learner
from molecli.engine.loop import Record
from molecli.engine.mixing import check_pictures
from molecli.errors import UsageError
from molecli.experts import Expert
from molecli.files.recipe import ComposeRecipe, DataConfig, EvalConfig, SampleRecipe
from molecli.metrics.clip import load_clip, source_of
from molecli.protocols import Picture

if TYPE_CHECKING:
    from molecli.engine.evaluate import EvaluationReport

PREVIEW_FOLDER = "preview"
PREVIEW_BATCH = 4  # pictures at once


class PictureDomain:
    """A recipe on a diffusion base. Raises: UserError for what cannot be learned from or would be ignored."""

    def __init__(self, recipe: ComposeRecipe, note: Callable[[str], object] = lambda text: None) -> None:
        check_pictures(recipe.mode)
        for mode in recipe.preview:
            check_pictures(mode, "--preview")
        # A method of the default preview is nobody's wish.
        shown = recipe.preview if "preview" in recipe.model_fields_set else ()
        check_options(recipe.method, [recipe.mode, *told(shown)])
        _check_sections(recipe)
        self.recipe, self.note = recipe, note
        found = read_concepts(recipe.loras, recipe.concepts)
        # Named like the LoRA from here on, whatever concept.json calls it.
        self.concepts = {name: replace(concept, name=name) for name, concept in found.items()}
        self.triggers: Mapping[str, str] = {name: concept.trigger for name, concept in self.concepts.items()}
        self.kinds: Mapping[str, str] = {name: concept.kind for name, concept in self.concepts.items()}
        self.pictures: list[Picture] = []
        if get_method(recipe.mode).trained:
            check_objective(recipe.objective, list(self.concepts.values()))
            self.pictures = concept_pictures([lora.name for lora in recipe.loras], self.concepts)
            if self._guided:
                source_of(recipe.objective.guide, builtin=self._builtin)
        self.rows: Sequence[Any] = concept_rows(self.pictures) if self.pictures else []
        self.examples = len(self.pictures)
        self.passes = float(recipe.objective.denoise > 0) + self._guided * (1 + recipe.objective.clip_steps) / 2

    def learn(self, backbone: Diffusion, mixture: Mixture, **how: Any) -> list[Record]:
        """The records of the training, by the mode's `learner` with the keywords `how`."""
        recipe, dtype = self.recipe, backbone.pipe.unet.dtype
        with (
            warnings_as_notes(self.note),
            checkpointed(backbone, recipe.objective.gradient_checkpointing),
            scaled_gradients(mixture.named_parameters().values(), dtype),
        ):
            task = self.task(backbone, mixture)
            return learner(recipe)(backbone, mixture, self.rows, recipe.train, seed=recipe.seed, task=task, **how)

    def task(self, backbone: Diffusion, mixture: Mixture) -> Objective:
        """What the recipe's objective asks of the attached mixture."""
        config, side = self.recipe.objective, backbone.resolution
        adapted = any(matrix.partition(".")[0] in TEXT_ENCODERS for site in mixture.sites for matrix in site.matrices)
        told = Prompts(backbone, side, keep=not adapted)
        told.look_at([picture.prompt for picture in self.pictures])
        guide = None
        if self._guided:
            chosen = themes(config.prompts, list(self.concepts.values()))
            told.look_at([theme.prompt for theme in chosen])
            clip = load_clip(config.guide, device=backbone.device, builtin=self._builtin)
            guide = ClipGuide(
                backbone, clip, chosen, told, self.recipe.image, steps=config.clip_steps, local=config.clip_local > 0
            )
        return Objective(backbone, mixture, Album(self.pictures, side), self.concepts, config, told, guide)

    def finish(
        self, backbone: Diffusion, experts: Sequence[Expert], mixture: Mixture, progress: Progress | None
    ) -> EvaluationReport | None:
        """None: pictures are scored by mole evaluate. Draws the preview, and what gates did in it."""
        prompts = prompts_of(list(self.concepts.values()))
        if not self.recipe.preview:
            return None
        if not prompts:
            self.note("no preview is drawn: the LoRAs have no concept.json that says a prompt")
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
        studio = Studio(
            backbone.model, named, weights, self.concepts, recipe.method, branches_at_once=recipe.image.branches_at_once
        )
        columns: list[Column] = []
        for mode in dict.fromkeys(recipe.preview):
            if mode == "single":
                columns += [studio.alone(name) for name in weights]
            elif get_method(recipe.mode).name != (mode if mode == "base" else get_method(mode).name):
                columns.append(studio.fixed(mode, list(weights)))
        return [*columns, Column(recipe.mode, mixture, weights)]

    def _draw(
        self, prompts: Sequence[str], columns: Sequence[Column], backbone: Diffusion, progress: Progress | None
    ) -> None:
        """Writes preview/: a picture of every prompt by every column, and the sheet of them."""
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

    @property
    def _guided(self) -> bool:
        return bool(self.recipe.objective.clip or self.recipe.objective.clip_local)

    @property
    def _builtin(self) -> bool:
        return self.recipe.base.id.startswith(BUILTIN_PREFIX)


def _check_sections(recipe: ComposeRecipe) -> None:
    """Nothing, or UsageError for a section that only a language model reads."""
    if recipe.data != DataConfig():
        changed = next(key for key, value in recipe.data if value != getattr(DataConfig(), key))
        what = "a suite's tasks teach gates on a language model; on a diffusion base the concepts' pictures do"
        raise UsageError(f"data.{changed}", what, "Leave it out.")
    if recipe.evaluate not in (None, EvalConfig()):
        what = "a composition on a diffusion base is scored when it is finished"
        raise UsageError("evaluate", what, f"Leave it out, and write mole evaluate {recipe.output} afterwards.")
