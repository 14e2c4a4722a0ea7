"""`mole inspect-gates` on a diffusion base: the gates while pictures of some prompts are drawn.

inspect_gates   recipe -> GateReport, by prompt and step    default_prompts   the prompts of a composition's concepts
traced          the gates while prompts are drawn           defaults          defaults that depend on the composition
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from molecli.bases.loading import load_backbone
from molecli.config import ConceptConfig, ImageConfig, InspectGatesRecipe
from molecli.errors import UsageError
from molecli.evaluation.gate_report import GateReport, entropy_course, switch_some
from molecli.files.composition import Composition
from molecli.files.lora_spec import LoraSpec
from molecli.images.clip_skip import use_clip_skip
from molecli.images.columns import read_concepts
from molecli.images.drawing import options, warnings_as_notes
from molecli.images.gate_trace import GateRecorder, Trace, step_report
from molecli.images.joint_prompts import prompts_of
from molecli.mixture.attach import attach_composition, base_of
from molecli.mixture.mixture import Mixture
from molecli.protocols import Note, Progress


def inspect_gates(
    recipe: InspectGatesRecipe,
    composition: Composition,
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> GateReport:
    """The report on `images` pictures of every prompt, with seeds from `recipe.seed` on. The pictures are not kept.

    Raises: UsageError without a prompt; MismatchError if base, LoRAs and gates do not fit together.
    """
    path = str(recipe.composition)
    prompts = recipe.prompts or default_prompts(composition)
    backbone: Any = load_backbone(base_of(recipe.base, composition), recipe.device)
    use_clip_skip(backbone, recipe.image.clip_skip, [composition])
    mixture = attach_composition(backbone.model, composition, loras=list(recipe.loras) or None)
    switch_some(recipe, mixture)
    seeds = range(recipe.seed, recipe.seed + recipe.images)
    with mixture, warnings_as_notes(note):
        traces = traced(
            backbone, mixture, prompts, recipe.image, seeds, batch_size=recipe.batch_size, progress=progress
        )
    return step_report(traces, mixture.names, composition=path, course=entropy_course(path))


def defaults(composition: Composition) -> dict[str, Any]:
    """Nothing: the prompts are those of the concepts, which are read later, when the pictures are drawn."""
    return {}


def traced(
    backbone: Any,
    mixture: Mixture,
    prompts: Sequence[str],
    image: ImageConfig,
    seeds: Sequence[int],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Trace]:
    """{prompt: the gates of the attached mixture while its pictures are drawn, one per seed}. No picture is kept."""
    traces = {}
    for done, prompt in enumerate(dict.fromkeys(prompts), start=1):
        traces[prompt] = _trace(backbone, mixture, prompt, image, seeds, batch_size)
        if progress is not None:
            progress("gates", done, len(prompts))
    return traces


def default_prompts(composition: Composition) -> tuple[str, ...]:
    """The prompts of a composition's concepts, and one that names all of them. Raises: UsageError."""
    recipe = yaml.safe_load(composition.recipe)
    given = {name: ConceptConfig.model_validate(entry) for name, entry in (recipe.get("concepts") or {}).items()}
    loras = [LoraSpec(record.name, record.source) for record in composition.experts]
    prompts = prompts_of(list(read_concepts(loras, given).values()))
    if not prompts:
        what = "no prompt is given, and no LoRA has a concept.json with a prompt"
        raise UsageError("mole inspect-gates", what, "Write --prompt TEXT.")
    return prompts


def _trace(
    backbone: Any, mixture: Mixture, prompt: str, image: ImageConfig, seeds: Sequence[int], batch_size: int
) -> Trace:
    with GateRecorder(mixture) as recorder:
        for start in range(0, len(seeds), batch_size):
            batch = seeds[start : start + batch_size]
            backbone.generate(
                [prompt] * len(batch),
                seeds=batch,
                **options(image),
                on_step=recorder,
            )
    return recorder.trace()
