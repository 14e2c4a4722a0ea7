"""What a run on a diffusion base would do, in numbers and without weights: the parts of a plan that only pictures have.

Contents: plan_pictures, activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from molecli.backbones.pipeline import TEXT_ENCODERS, PipelineModules
from molecli.backbones.pipeline_sites import pipeline_stream_of
from molecli.engine.images.pictures import instance_pictures
from molecli.engine.images.targets import picture_targets
from molecli.engine.images.train_lora import check_pictures
from molecli.files.recipe import TrainLoraRecipe
from molecli.protocols import Shape

Shapes = Mapping[str, Shape]


def plan_pictures(recipe: TrainLoraRecipe, shapes: Shapes) -> tuple[list[str], int]:
    """(the matrices that would be adapted, the pictures of the subject). Raises: UserError as the run would."""
    config = check_pictures(recipe)
    targets = picture_targets(recipe.adapter.targets, shapes, text_encoder=config.text_encoder)
    return targets, len(instance_pictures(config, Path(config.instance_dir).name))


def activations(skeleton: nn.Module, shapes: Shapes) -> int:
    """Numbers that one picture leaves at all matrices' inputs and outputs.

    Without gradient checkpointing, and without the VAE, which only CLIP guidance trains through.
    """
    assert isinstance(skeleton, PipelineModules)
    positions = {name: _positions(skeleton, name) for name in shapes}
    return sum(sum(shape[:2]) * positions[name] for name, shape in shapes.items())


def _positions(model: PipelineModules, matrix: str) -> int:
    """How many vectors of one picture the matrix is multiplied with."""
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
