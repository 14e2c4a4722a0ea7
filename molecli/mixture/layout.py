"""What a mixture needs to know about its model, a language model or a diffusion pipeline.

Contents: Layout, layout_of, blocks_of, host_of, adaptable_matrices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from molecli.bases.pipeline import PipelineModules
from molecli.errors import UsageError
from molecli.mixture.language_layout import TextLayout
from molecli.mixture.pipeline_layout import PipelineLayout
from molecli.mixture.streams import Layout
from molecli.protocols import Shape


def layout_of(model: nn.Module) -> Layout:
    """The layout of a language model, or of the modules of a diffusion pipeline."""
    return PipelineLayout(model) if isinstance(model, PipelineModules) else TextLayout(model)


def blocks_of(layout: Layout) -> list[tuple[str, ...]]:
    """The adaptable matrices by block, in the order of a forward pass: an encoder's blocks before the decoder's.

    A block is a site of granularity `block`, together with its matrices that work on other tokens.
    """
    blocks: dict[str, list[str]] = {}
    for site in layout.sites(layout.in_order(layout.matrices()), "block", per_token=False):
        blocks.setdefault(site.name.removesuffix(".memory").removesuffix(".time"), []).extend(site.matrices)
    return [tuple(matrices) for matrices in blocks.values()]


def host_of(model: Any) -> nn.Module:
    """The module that experts are attached to: `model` itself, or the parts of a diffusers pipeline.

    Raises: UsageError for anything else.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(getattr(model, "unet", None), nn.Module):
        return PipelineModules(model)
    what = f"LoRAs are attached to a model or a diffusers pipeline with a UNet, not to a {type(model).__name__}"
    raise UsageError("attach", what, "Give a transformers model or a StableDiffusion(XL)Pipeline.")


def adaptable_matrices(model: nn.Module) -> dict[str, Shape]:
    """The adaptable matrices of a language model or pipeline: name -> shape."""
    return layout_of(model).matrices()
