"""Matrices of a language model that no linear layer holds: routed experts as fused 3-D parameters, and routers.

Their names: see `adapters.fused`.

Contents: FusedPlace, fused_places, fused_matrices, fused_parameters, taken_for_experts, is_layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molecli.adapters.fused import EXPERT_LAYERS, matrix_name
from molecli.bases.pipeline import PipelineModules
from molecli.functional.layers import linear_shape
from molecli.protocols import Shape

_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, Conv1D)
# Linear layers with a forward of their own which still return x Wᵀ + b.
_PLAIN = ("FalconLinear",)
_IN_BLOCK = re.compile(r"\.\d+(\.|$)")


@dataclass(frozen=True)
class FusedPlace:
    """Where such a matrix is: `parameter` of `module`, at `expert` on its first axis (None: it has only two axes).

    shape: (d_out, d_in). transposed: the parameter stores [d_in, d_out].
    """

    module: str
    parameter: str
    expert: int | None
    shape: Shape
    transposed: bool

    def weight(self, model: nn.Module) -> Tensor:
        """[d_out, d_in], a view of the parameter."""
        parameter: Tensor = getattr(model.get_submodule(self.module), self.parameter)
        own = parameter if self.expert is None else parameter[self.expert]
        return (own.T if self.transposed else own).detach()


def fused_places(model: nn.Module) -> dict[str, FusedPlace]:
    """name -> place of every such matrix in the model's blocks, in the model's order; also on the
    meta device; none in a diffusion pipeline.

    Which axis is d_out is decided as in PEFT, whose factors depend on it: by the module's `is_transposed`.
    """
    found: dict[str, FusedPlace] = {}
    if isinstance(model, PipelineModules):
        return found
    for name, module in model.named_modules():
        if is_layer(module) or not _IN_BLOCK.search(name):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() not in (2, 3) or not parameter.is_floating_point() or key.endswith("bias"):
                continue
            shape = tuple(parameter.shape[-2:])
            if parameter.dim() == 2:
                found[matrix_name(name, key)] = FusedPlace(name, key, None, shape, False)
                continue
            transposed = bool(getattr(module, "is_transposed", False))
            shape = shape[::-1] if transposed else shape
            for expert in range(parameter.shape[0]):
                found[matrix_name(name, key, expert)] = FusedPlace(name, key, expert, shape, transposed)
    return found


def fused_parameters(model: nn.Module) -> dict[tuple[str, str], list[str]]:
    """(module, parameter) -> its matrices, in the order of its first axis."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, place in fused_places(model).items():
        found.setdefault((place.module, place.parameter), []).append(name)
    return found


def taken_for_experts(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those linear layers of a base with fused experts that PEFT takes for layers of these: shared and dense ones.

    PEFT goes by the ends of names, and adapts the fused parameters instead (`_convert_peft_config_moe`). It leaves a
    layer alone whose weight is named as a parameter: target_parameters "<layer>.weight", with the same update.
    """
    places = fused_places(model)
    if all(place.expert is None for place in places.values()):
        return []
    return [name for name in layers if name not in places and name.rpartition(".")[2] in EXPERT_LAYERS]


def is_layer(module: nn.Module) -> bool:
    """Whether an update of the module's weight can be added to its output, or the module has no matrices."""
    kind = type(module)
    if isinstance(module, nn.Linear) and kind.__module__.startswith("transformers.models."):
        # Some routers are linear layers that return a choice of experts.
        return kind.forward is nn.Linear.forward or kind.__name__ in _PLAIN
    plain = isinstance(module, _LAYERS) or kind.__module__.startswith("torch.")
    return plain or linear_shape(module) is not None


def fused_matrices(model: nn.Module) -> dict[str, Shape]:
    """name -> (d_out, d_in) of every such matrix."""
    return {name: place.shape for name, place in fused_places(model).items()}
