"""What a mixture needs to know about its model, a language model or a diffusion pipeline.

Contents: Layout, layout_of, blocks_of, host_of, adaptable_matrices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from molecli.bases.pipeline import PipelineModules
from molecli.errors import UsageError
from molecli.mixture.language_layout import TextLayout
from molecli.mixture.peft_host import inside_peft
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
    """The module that experts are attached to: `model` itself, without wrappers that compile or copy it, or the parts
    of a diffusers pipeline.

    Raises: UsageError for anything else, and for a model that is spread over several devices in parts or copies.
    """
    if isinstance(model, nn.Module):
        return _whole(_unwrapped(model))
    if isinstance(getattr(model, "unet", None), nn.Module):
        return PipelineModules(model)
    what = f"LoRAs are attached to a model or a diffusers pipeline with a UNet, not to a {type(model).__name__}"
    raise UsageError("attach", what, "Give a transformers model or a StableDiffusion(XL)Pipeline.")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel, DistributedDataParallel and a PeftModel."""
    while True:
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            what = f"DataParallel copies the model to {len(model.device_ids)} devices, and LoRAs are attached to one"
            raise UsageError("attach", what, "Give the model itself, or use DistributedDataParallel.")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif (
            isinstance(inner := getattr(model, "_orig_mod", None), nn.Module)
            or (inner := inside_peft(model)) is not None
        ):
            model = inner
        else:
            return model


def _whole(model: nn.Module) -> nn.Module:
    """The model, if this process has its whole weights. Raises: UsageError if it has only its share of them."""
    kinds = {type(module).__name__ for module in model.modules()}
    kinds |= {type(parameter).__name__ for parameter in model.parameters()}
    zero = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # DeepSpeed's mark
    if zero or kinds & {"FullyShardedDataParallel", "FlatParameter", "DTensor"}:
        what = "the model's weights are shared out among processes (FSDP, tensor parallel or ZeRO-3)"
        raise UsageError("attach", what, "Attach LoRAs to a whole model, such as one in DistributedDataParallel.")
    return model


def adaptable_matrices(model: nn.Module) -> dict[str, Shape]:
    """The adaptable matrices of a language model or pipeline: name -> shape."""
    return layout_of(model).matrices()
