"""The rows of a UNet call: which are guidance's halves, how they are repeated for branches, whether they stay whole.

A row is a picture (or a film) under one condition. Pipelines stack them in different orders: two halves for guidance,
three parts for PAG or InstructPix2Pix. Nothing in the call says so; where it cannot be known, nothing is guessed.

Contents: guided, repeated, copied, RowModules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from molecli.errors import RunError

# diffusers' pipelines whose rows under guidance are the unconditional half, then the conditional one.
_HALVES = re.compile(
    r"(StableDiffusion(XL)?(ControlNet(Union)?|PAG|ControlNetPAG|Adapter)?(Img2Img|Inpaint|Depth2Img)?"
    r"|LatentConsistencyModel(Img2Img)?|AnimateDiff\w*)Pipeline"
)
# Inputs that all rows share.
_SHARED = ("ip_adapter_masks",)


def guided(pipe: Any, rows: int) -> bool | None:
    """Whether the UNet's rows are the two halves of guidance; None if that is not known of such a pipeline.

    A pipeline that was never called has no guidance.
    """
    drawing = next((kind for kind in type(pipe).__mro__ if "__call__" in vars(kind)), object)
    if not _HALVES.fullmatch(drawing.__name__) or getattr(pipe, "do_perturbed_attention_guidance", False):
        return None
    return rows % 2 == 0 and bool(getattr(pipe, "do_classifier_free_guidance", False))


def repeated(value: Any, branches: int, rows: int, frames: int | None = None) -> Any:
    """`value`, a UNet's inputs, with the rows of every tensor in it repeated: [branches * rows, ...].

    frames: of a film, whose frames can be rows in the inputs that come from other networks.
    Raises: RunError for a tensor whose entries are not the call's rows.
    """

    def repeat(tensor: Tensor, name: str) -> Tensor:
        if name in _SHARED or tensor.dim() == 0:
            return tensor
        entries = len(tensor)
        if entries == rows or (frames is not None and entries == rows * frames):
            return tensor.repeat(branches, *(1,) * (tensor.dim() - 1))
        if entries == 1:
            return tensor  # the UNet gives it to every row
        what = f"its input {name or 'without a name'} has {entries} entries, and the call has {rows} rows"
        raise RunError("UNet", what, "Set branches_at_once = 1 on the mixture, which repeats nothing.")

    return _rebuilt(value, repeat, "")


def copied(value: Any) -> Any:
    """`value` with the same tensors in new lists and dictionaries: a UNet empties the lists of residuals."""
    return _rebuilt(value, lambda tensor, _: tensor, "")


def _rebuilt(value: Any, change: Callable[[Tensor, str], Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, Mapping):
        return {key: _rebuilt(entry, change, str(key)) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rebuilt(entry, change, name) for entry in value)
    return value


class RowModules:
    """The modules of a UNet that can treat rows differently: attention, by its processor, and chunked feed-forwards."""

    def __init__(self, unet: nn.Module) -> None:
        self._attention = [m for m in unet.modules() if hasattr(m, "processor")]
        self._chunked = [m for m in unet.modules() if hasattr(m, "_chunk_size")]

    def divider(self) -> str | None:
        """What in the UNet now splits the rows or mixes them, in words; None if every row is computed alike.

        A pipeline changes the processors for its own call (perturbed attention), so this is asked in each.
        """
        for module in self._attention:
            kind = type(module.processor)
            if kind.__module__ != "diffusers.models.attention_processor" or "PAG" in kind.__name__:
                return f"the attention processor {kind.__name__}"
        if any(module._chunk_size is not None and module._chunk_dim == 0 for module in self._chunked):
            return "forward chunking along dimension 0"
        return None
