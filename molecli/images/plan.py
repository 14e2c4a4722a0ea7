"""The parts of a run's plan that only diffusion bases have: numbers, computed without loading weights.

Contents: to_train, to_evaluate, kept_bytes, at_once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from molecli.bases.pipeline import TEXT_ENCODERS, PipelineModules
from molecli.catalog.methods import ALONE, BASE, get_method
from molecli.config import EvaluateRecipe, TrainLoraRecipe
from molecli.files.composition import Composition
from molecli.images.evaluate import Setting, read_setting, switched_off
from molecli.images.judge import check_judge
from molecli.images.pictures import instance_pictures
from molecli.images.scene_columns import ALL_ON, Off, left_alone
from molecli.images.targets import picture_targets
from molecli.images.train_lora import check_recipe
from molecli.mixture.pipeline_layout import pipeline_stream_of
from molecli.protocols import Shape
from molecli.training.planned_work import PlannedWork

LEARNS_FROM = "pictures"
Shapes = Mapping[str, Shape]


def to_train(recipe: TrainLoraRecipe, shapes: Shapes, *, fetch: bool) -> PlannedWork:
    """The matrices that would be adapted, and the number of pictures of the subject. Raises: UserError like the run."""
    config = check_recipe(recipe)
    targets = picture_targets(recipe.adapter.targets, shapes, text_encoder=config.text_encoder)
    return PlannedWork(len(instance_pictures(config, Path(config.instance_dir).name)), targets=targets)


def to_evaluate(recipe: EvaluateRecipe, compositions: Mapping[str, Composition], *, fetch: bool) -> PlannedWork:
    """The LoRAs that are needed, the number of pictures and of UNet passes. Raises: UserError like the run."""
    setting = read_setting(recipe, compositions)
    methods = _methods(setting, switched_off(recipe, setting.loras))
    if recipe.judge is not None:
        check_judge(recipe.judge, [name for name, _ in methods])
    scenes = setting.bench.all
    calls = sum(_calls(mode, len(scene.loras)) for _, mode in methods for scene in scenes)
    pictures = len(methods) * len(scenes) * recipe.eval.images
    return PlannedWork(pictures, loras=setting.needed, passes=calls * recipe.eval.images * recipe.image.steps)


def kept_bytes(skeleton: nn.Module, shapes: Shapes, *, rows: int, width: int) -> int:
    """The bytes that the backward pass keeps for `rows` pictures, with `width` bytes per number.

    Without gradient checkpointing, and without the VAE, which has a backward pass only in CLIP guidance.
    """
    assert isinstance(skeleton, PipelineModules)
    positions = {name: _positions(skeleton, name) for name in shapes}
    # Each matrix keeps its input and its output.
    return rows * sum(sum(shape[:2]) * positions[name] for name, shape in shapes.items()) * width


def at_once(rows: int) -> str:
    """The batch that the estimate of memory is for."""
    return f"{rows} picture{'s' if rows > 1 else ''} at once"


def _positions(model: PipelineModules, matrix: str) -> int:
    """How many vectors of one picture are multiplied with the matrix."""
    stream = pipeline_stream_of(matrix)
    if stream == "time":
        return 1
    if stream == "text":
        name = matrix.partition(".")[0]
        encoder: Any = model.text_encoders[name if name in TEXT_ENCODERS else TEXT_ENCODERS[0]]
        return int(encoder.config.max_position_embeddings)
    config: Any = model.get_submodule("unet").config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    names, levels = matrix.split("."), len(config.block_out_channels)
    level = {"down_blocks": 0, "mid_block": levels - 1, "up_blocks": levels - 1}.get(names[1], 0)
    if names[1] == "down_blocks":
        level = int(names[2])
    elif names[1] == "up_blocks":
        level = levels - 1 - int(names[2])
    return max(1, size >> level) ** 2


def _methods(setting: Setting, off: Off) -> list[tuple[str, str]]:
    """(name, mode) of every method."""
    loras = setting.bench.loras
    methods: list[tuple[str, str]] = []
    for mode in dict.fromkeys(setting.modes):
        if mode == ALONE:
            methods += [(name, ALONE) for name in left_alone(loras, off)]
        else:
            methods += [(mode + label, mode) for label in (ALL_ON if mode == BASE else off)]
    # Compositions of only some of the LoRAs share one column per mode.
    learned = {
        name if set(loras) <= set(composition.names) else composition.mode: composition.mode
        for name, composition in setting.compositions.items()
    }
    return methods + [(name + label, mode) for name, mode in learned.items() for label in off]


def _calls(mode: str, loras: int) -> int:
    """The UNet calls in one denoising step of one picture."""
    slope, constant = (0, 1) if mode == BASE else get_method(mode).calls
    return max(1, slope * loras + constant)
