"""Gates by denoising step: what a mixture on a pipeline did while pictures were drawn.

with mixture, GateRecorder(mixture) as recorder:
    backbone.generate(prompts, seeds=seeds, steps=25, on_step=recorder)
recorder.trace()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.backbones.hosting import Mixture
from molecli.backbones.pipeline import TEXT_ENCODERS, PipelineModules
from molecli.engine.images.gates import CONDITIONAL, UNCONDITIONAL, Trace
from molecli.errors import RunError
from molecli.protocols import Moment


class GateRecorder:
    """Told of every step that is done; keeps each picture's gates there, on the CPU.

    Rows of the unconditional half of guidance are kept apart from the conditional ones. Several generations of the
    same number of steps may follow one another.
    """

    def __init__(self, mixture: Mixture) -> None:
        assert isinstance(mixture.model, PipelineModules)
        self.mixture, self.model = mixture, mixture.model
        part = {site.name: site.matrices[0].partition(".")[0] for site in mixture.sites}
        self.sites = tuple(name for name in part if part[name] == "unet")
        self._of_encoder = {e: [s for s in part if part[s] == e] for e in TEXT_ENCODERS if e in part.values()}
        self.text_sites = tuple(site for sites in self._of_encoder.values() for site in sites)
        self._handles: list[RemovableHandle] = []
        self._rows = 0  # of the UNet's last pass
        self._encoded: dict[str, list[Tensor]] = {}
        self._text: list[Tensor] = []
        self._timesteps: list[float] = []
        # {rows: one list a generation of [M, B, N], one a step}
        self._steps: dict[str, list[list[Tensor]]] = {}

    def __enter__(self) -> GateRecorder:
        def note_rows(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._rows = len(args[0])

        self._handles = [self.model.get_submodule("unet").register_forward_pre_hook(note_rows)]
        for encoder in self._of_encoder:
            module = self.model.text_encoders[encoder]
            self._handles.append(module.register_forward_hook(self._hook(encoder)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, moment: Moment) -> None:
        """Keeps the gates of the step that has just been done."""
        if moment.index == 0:
            self._timesteps = []
            self._keep_text(self._rows // 2 if moment.guided else self._rows)
        self._timesteps.append(moment.timestep)
        gates = self._stacked(self.sites, self._rows)
        halves = gates.chunk(2, dim=1) if moment.guided else (gates,)
        for rows, half in zip((UNCONDITIONAL, CONDITIONAL) if moment.guided else (CONDITIONAL,), halves, strict=True):
            generations = self._steps.setdefault(rows, [])
            if moment.index == 0:
                generations.append([])
            generations[-1].append(half)

    def trace(self) -> Trace:
        """What was kept, of all pictures so far. Raises: RunError when nothing was drawn."""
        if not self._timesteps:
            raise RunError("gates", "no picture was drawn while they were recorded", "Call the pipeline first.")
        steps = {
            rows: torch.cat([torch.stack(generation).permute(2, 0, 1, 3) for generation in generations])
            for rows, generations in self._steps.items()
        }
        text = torch.cat([part.transpose(0, 1) for part in self._text])
        return Trace(self.sites, self.text_sites, tuple(self._timesteps), steps, text)

    def _stacked(self, sites: Sequence[str], rows: int) -> Tensor:
        """[sites, rows, N] of the last pass; a gate that is the same for every input stands in each row."""
        gates = self.mixture.gates()
        empty = torch.zeros(0, rows, len(self.mixture.names))
        return torch.stack([gates[site].float().expand(rows, -1) for site in sites]).cpu() if sites else empty

    def _hook(self, encoder: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            self._encoded.setdefault(encoder, []).append(self._stacked(self._of_encoder[encoder], len(args[0])))

        return hook

    def _keep_text(self, pictures: int) -> None:
        """The text encoders' gates on the prompts: a pipeline encodes these first, then the negative ones."""
        parts = [passes[0] for passes in self._encoded.values()]
        self._text.append(torch.cat(parts) if parts else torch.zeros(0, pictures, len(self.mixture.names)))
        self._encoded = {}
