"""The parts of a diffusion pipeline that LoRAs adapt, as one module, and their matrices in the order of their calls.

It uses only names of modules. Contents: Guest, PipelineModules, pipeline_matrices, idle_matrices, in_call_order.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from molecli.functional.layers import kernel_shape, linear_shape
from molecli.functional.wrapped import layers_of, own_layer
from molecli.protocols import Shape

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", *TEXT_ENCODERS)
# The linear layers of a CLIP layer. Its text_projection is left out: no LoRA format adapts it.
_CLIP_LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# A layer that diffusers fuses from others in an attention -> those, in the order of its output's features.
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


class Guest(Protocol):
    """A mixture that is attached to a pipeline's parts, as needed by the code that replays recorded UNet calls."""

    def foreseen(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[tuple[Hashable, ...] | None]:
        """A context for a UNet call with these arguments, or for the replay of a recorded one; `done` is called in it.

        Yields everything that the call depends on, except the numbers in the arguments. The first value is an object
        that is replaced when the guest changes. None if calls cannot be compared.
        """
        ...

    def left(self) -> Any:
        """The tensors that the call has stored in the guest."""
        ...

    def done(self, output: Any, left: Any = None) -> Any:
        """The output for the caller of the UNet. `left`: the tensors that a replayed call stored, for the guest."""
        ...


class PipelineModules(nn.Module):
    """The existing ones of unet, text_encoder and text_encoder_2; `pipe` is the pipeline they belong to, if any.

    guests: the mixtures that are attached now, in the order of attachment.
    """

    def __init__(self, pipe: Any = None, **parts: nn.Module) -> None:
        super().__init__()
        self.pipe = pipe
        self.guests: OrderedDict[int, Guest] = OrderedDict()
        for name in PARTS:
            part = parts.get(name, getattr(pipe, name, None))
            if isinstance(part, nn.Module):
                self.add_module(name, uncompiled(part))

    def register_guest(self, guest: Guest) -> RemovableHandle:
        """A handle: the guest counts as attached until the handle is removed."""
        handle = RemovableHandle(self.guests)
        self.guests[handle.id] = guest
        return handle

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The existing text encoders, by name."""
        return {name: part for name, part in self.named_children() if name in TEXT_ENCODERS}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, for one that `torch.compile` wrapped: both are one model, with the same hooks."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def pipeline_matrices(model: PipelineModules) -> dict[str, Shape]:
    """Matrix name -> shape, in the order of calls, also on the meta device: every linear layer and convolution of the
    UNet, and the linear layers in the text encoders' CLIP layers; quantised or not."""
    found: dict[str, Shape] = {}
    for name, module in layers_of(model):
        if name.rpartition(".")[2] not in _FUSED and (name.startswith("unet.") or _in_clip_layer(name)):
            layer = own_layer(module)
            shape = linear_shape(layer) or kernel_shape(layer)
            if shape is not None:
                found[name] = shape
    return {name: found[name] for name in in_call_order(found)}


def fused_with(matrix: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, slice]]:
    """The layers of diffusers' `fuse_qkv_projections` that compute `matrix` together with its siblings, and the
    features of their output that are its own. The separate layers stay in the model; only one of both is called."""
    attention, _, leaf = matrix.rpartition(".")
    for name, leaves in _FUSED.items():
        fused = modules.get(f"{attention}.{name}")
        if fused is not None and leaf in leaves:
            widths = [int(modules[f"{attention}.{other}"].out_features) for other in leaves]  # type: ignore[arg-type]
            start = sum(widths[: leaves.index(leaf)])
            yield fused, slice(start, start + widths[leaves.index(leaf)])


def idle_matrices(model: PipelineModules) -> frozenset[str]:
    """Matrices whose output is not used: SDXL reads the second to last layer of its first encoder.

    A LoRA can have factors there, but a gate could not learn anything.
    """
    if set(model.text_encoders) != set(TEXT_ENCODERS):
        return frozenset()
    layers = [
        (int(found.group(1)), name)
        for name in pipeline_matrices(model)
        if name.startswith("text_encoder.") and (found := re.search(r"\.layers\.(\d+)\.", name))
    ]
    last = max((layer for layer, _ in layers), default=-1)
    return frozenset(name for layer, name in layers if layer == last)


def in_call_order(matrices: Iterable[str]) -> list[str]:
    """The matrices in the order of a pipeline's calls: the gate of a site with several blocks reads the first one.

    Modules are registered in another order: attention before the residual blocks, the middle of the UNet last.
    """
    return sorted(matrices, key=_place)  # stable: the given order is kept within a sub-block


def _in_clip_layer(name: str) -> bool:
    return bool(re.search(r"\.layers\.\d+\.", name)) and name.rpartition(".")[2] in _CLIP_LEAVES


def _place(matrix: str) -> tuple[int, int, int, int]:
    """(part, stage of the UNet, block of the stage, sub-block): text encoders first."""
    part, _, rest = matrix.partition(".")
    if part != "unet":
        return (TEXT_ENCODERS.index(part) if part in TEXT_ENCODERS else len(TEXT_ENCODERS), 0, 0, 0)
    names = rest.split(".")
    stages = ("time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
    stage = stages.index(names[0]) if names[0] in stages else -1
    blocks, names = (int(names[1]), names[2:]) if names[0] in ("down_blocks", "up_blocks") else (0, names[1:])
    # Residual block 0, attention 0, motion 0, residual block 1, ...; then the layers that change the resolution.
    order = {"resnets": 0, "attentions": 1, "motion_modules": 2}
    within = 3 * int(names[1]) + order[names[0]] if names and names[0] in order else 10**6
    if names == ["cond_proj"]:  # LCM's: the time embedding begins with the guidance scale
        within = -1
    return (len(TEXT_ENCODERS), stage, blocks, within)
