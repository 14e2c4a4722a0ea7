"""The cost of a training step of gates compared with the base's forward and backward pass, for `image_cost.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from image_hosts import PROMPT, Host
from torch import Tensor

from molecli.bases.diffusion import Diffusion

# Work that can be timed, by (host, checkpointed).
Steps = dict[tuple[str, bool], Callable[[], Any]]


def training_steps(hosts: Sequence[Host], *, batch: int, pixels: int, seed: int) -> Steps:
    """One step of every host (the base, and gated ones), with gradient checkpointing and without."""
    made: Steps = {}
    for host in hosts:
        backbone = Diffusion(host.pipe)
        side = pixels // host.pipe.vae_scale_factor
        rows = make_rows(backbone, batch, side, seed)
        for checkpointed in (False, True):
            made[host.name, checkpointed] = partial(training_step, host, backbone, rows, checkpointed)
    return made


def make_rows(backbone: Diffusion, batch: int, side: int, seed: int) -> dict[str, Any]:
    """A batch of `denoise_loss`, its pictures encoded already."""
    generator = torch.Generator().manual_seed(seed)
    unet = backbone.pipe.unet
    size = (batch, unet.config.in_channels, side, side)
    latents, noise = (torch.randn(size, generator=generator).to(unet.device, unet.dtype) for _ in range(2))
    timesteps = torch.randint(1000, (batch,), generator=generator).to(unet.device)
    return {"latents": latents, "noise": noise, "timesteps": timesteps, "prompts": [PROMPT] * batch}


def training_step(host: Host, backbone: Diffusion, rows: dict[str, Any], checkpointed: bool) -> None:
    """Forward and backward to the gates, or for the base to its input, without the optimiser."""
    unet = host.pipe.unet
    if checkpointed:
        unet.enable_gradient_checkpointing()
    noise = rows["noise"].detach().requires_grad_(host.mixture is None)
    try:
        total, count = backbone.denoise_loss({**rows, "noise": noise})
        (total / count).backward()
    finally:
        unet.disable_gradient_checkpointing()
    trained: list[Tensor] = [noise] if host.mixture is None else list(host.mixture.named_parameters().values())
    for tensor in trained:
        assert tensor.grad is not None, "a gate without a gradient would make the step look cheap"
        tensor.grad = None
