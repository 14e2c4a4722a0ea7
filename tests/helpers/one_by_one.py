"""A naive reference for methods on the UNet's outputs: one UNet call for each LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.experts import Expert
from molecli.mixture.build import build_mixture


class OneByOne:
    """Inside, the UNet's prediction is made by `combine` of predictions with each LoRA alone, one call each."""

    def __init__(self, backbone: Diffusion, experts: list[Expert], combine: Callable[[list[Tensor], int], Tensor]):
        self.pipe, self.combine, self.step = backbone.pipe, combine, -1
        self.alone = [build_mixture(backbone.model, [e], mode="linear") for e in experts]
        self.forward = self.pipe.unet.forward

    def __enter__(self) -> OneByOne:
        self.pipe.unet.forward = self
        return self

    def __exit__(self, *_: object) -> None:
        del self.pipe.unet.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        outputs = []
        for mixture in self.alone:
            self.pipe.unet.forward = self.forward
            with mixture:
                outputs.append(self.pipe.unet(*args, **{**kwargs, "return_dict": False})[0])
            self.pipe.unet.forward = self
        return (self.combine(outputs, self.step),)
