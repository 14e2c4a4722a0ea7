"""Degrades real pictures before a scoring network sees them, and makes pictures that show no object fully."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from .data import SIZE
from .vae import reconstructed


@torch.no_grad()
def worn(vae: AutoencoderKL | None, images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, 64, 64]: a quarter through the autoencoder with noisy latents, some blurred, noisy, recoloured."""
    device, batch = images.device, len(images)
    if vae is not None:
        part = batch // 4
        blur = 0.25 * float(torch.rand((), generator=generator, device=device))
        images = torch.cat([reconstructed(vae, images[:part], generator, blur), images[part:]])
    pick = torch.rand(batch, 4, generator=generator, device=device)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weight = torch.where(pick[:, 0] < 0.3, pick[:, 0] / 0.3, 0.0)[:, None, None, None]
    images = images + weight * (soft - images)
    level = torch.where(pick[:, 1] < 0.5, pick[:, 1] * 0.1, 0.0)[:, None, None, None]
    images = images + level * torch.randn(images.shape, generator=generator, device=device)
    contrast = (0.9 + 0.2 * pick[:, 2])[:, None, None, None]
    brightness = (pick[:, 3] - 0.5)[:, None, None, None] * 0.1
    return ((images - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def decoys(sprites: Tensor, generator: torch.Generator, number: int) -> Tensor:
    """Pictures [number, 4, 64, 64] that show no object: blends of two, less than half of one, shuffled, or a blur."""
    device = sprites.device

    def any_sprite(rows: int) -> Tensor:
        return sprites[torch.randint(len(sprites), (rows,), generator=generator, device=device)]

    quarter = number // 4
    weight = 0.35 + 0.3 * torch.rand(quarter, 1, 1, 1, generator=generator, device=device)
    blends = weight * any_sprite(quarter) + (1 - weight) * any_sprite(quarter)
    angle = 2 * math.pi * torch.rand(quarter, 1, 1, generator=generator, device=device)
    line = torch.linspace(-1, 1, SIZE, device=device)
    beyond = angle.cos() * line[None, None, :] + angle.sin() * line[None, :, None]
    parts = any_sprite(quarter) * (beyond > 0.12).unsqueeze(1)
    blocks = any_sprite(quarter).reshape(quarter, 4, 4, 16, 4, 16).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(quarter, 16, generator=generator, device=device).argsort(1)
    blocks = blocks.gather(1, order[:, :, None, None, None].expand_as(blocks)).unflatten(1, (4, 4))
    shuffled = blocks.permute(0, 3, 1, 4, 2, 5).reshape(quarter, 4, SIZE, SIZE)
    rest = any_sprite(number - 3 * quarter)
    blurred = F.interpolate(F.avg_pool2d(rest, 16), (SIZE, SIZE), mode="bilinear")
    return torch.cat([blends, parts, shuffled, blurred])
