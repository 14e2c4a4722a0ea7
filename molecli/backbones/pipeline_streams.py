"""The passes of a diffusion pipeline, told by hooks on its parts, and what gates see there.

Every position sees every other, padding included (CLIP is trained to look at it): nothing is left out of a mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from molecli.backbones.pipeline import PipelineModules
from molecli.backbones.streams import Pass, outside
from molecli.protocols import Reading, Site


class PipelineStreams:
    """The current pass of the UNet and of each text encoder."""

    def __init__(self, model: PipelineModules) -> None:
        self.model = model
        self.passes = {name: Pass() for name, _ in model.named_children()}

    def attach(self, on_pass: Callable[[], None]) -> list[RemovableHandle]:
        """Hooks that count the passes of every part; `on_pass` is called at the start of each."""
        self.passes = {name: Pass() for name in self.passes}
        handles = []
        for name, part in self.model.named_children():
            handles.append(part.register_forward_pre_hook(self._begin(name, on_pass)))
            handles.append(part.register_forward_hook(self._end(name)))
        return handles

    def of(self, site: Site) -> Pass:
        """The pass of the part that the site's matrices are in, with whose name its own begins."""
        return self.passes[site.name.partition(".")[0]]

    def reading(self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None) -> Reading:
        """x and u as [B, positions, .]; all positions count."""
        current = self.of(site)
        if current.step == 0:
            raise outside()
        if x.dim() == 4 and x.shape[-2:] != u.shape[-2:]:
            # A convolution with a stride: the gates belong to its output's positions, and see what lies under each.
            x = F.adaptive_avg_pool2d(x, (u.shape[-2], u.shape[-1]))
        return Reading(positions(x), positions(u), None, None, shared=current.shared)

    def _begin(self, name: str, on_pass: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            on_pass()
            self.passes[name] = Pass(self.passes[name].step + 1)

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.passes[name].over = True

        return hook


def positions(x: Tensor) -> Tensor:
    """[B, T, C] of a map [B, C, H, W], of tokens [B, T, C], or of one vector a row [B, C]."""
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x.unsqueeze(1) if x.dim() == 2 else x
