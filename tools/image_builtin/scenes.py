"""Scenes of pictures on backgrounds, laid out and drawn in batches with tensor operations, deterministic by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import SIZE, Objects

BASE_COUNTS = (0.4, 0.3, 0.3)  # shares of scenes with one, two and three objects
SIZES = {1: (26.0, 52.0), 2: (24.0, 38.0), 3: (22.0, 31.0), 4: (20.0, 27.0), 5: (18.0, 24.0)}  # pixels, by count
STARTS, TRIES = 6, 16  # arrangements tried for a scene, and positions tried for each picture in an arrangement
TILT = math.radians(12)


@dataclass(frozen=True)
class Layout:
    """Which picture is where: at most K pictures per scene, later ones on top."""

    which: Tensor  # [B, K] long, -1 for none
    size: Tensor  # [B, K] pixels
    angle: Tensor  # [B, K] radians
    centre: Tensor  # [B, K, 2] pixels, x and y


def counts(generator: torch.Generator, batch: int, shares: Sequence[float]) -> Tensor:
    """Numbers of objects [batch]: i + 1 with probability shares[i]."""
    weights = torch.tensor(shares, device=generator.device)
    return torch.multinomial(weights, batch, replacement=True, generator=generator) + 1


def choose(generator: torch.Generator, count: Tensor, slots: int, allowed: Tensor) -> Tensor:
    """Different objects for every scene: [B, slots] entries of `allowed` [A], -1 beyond the scene's count [B]."""
    scores = torch.rand(len(count), len(allowed), generator=generator, device=generator.device)
    picked = allowed[scores.topk(slots, dim=1).indices]
    return torch.where(torch.arange(slots, device=picked.device) < count.unsqueeze(1), picked, -1)


def arrange(generator: torch.Generator, which: Tensor, sizes: Mapping[int, tuple[float, float]] = SIZES) -> Layout:
    """A layout of these pictures [B, K]: sizes depend on their number, positions avoid overlap."""
    device = generator.device
    batch, slots = which.shape
    count = (which >= 0).sum(1).clamp(1, 5)
    bounds = torch.tensor([sizes[number] for number in sorted(sizes)], device=device)[count - 1]
    draw = torch.rand(batch, slots, generator=generator, device=device)
    size = bounds[:, :1] + draw * (bounds[:, 1:] - bounds[:, :1])
    angle = (torch.rand(batch, slots, generator=generator, device=device) * 2 - 1) * TILT
    places = torch.rand(batch, STARTS, slots, TRIES, 2, generator=generator, device=device)
    half = size[:, None, :, None, None] / 2
    places = half + places * (SIZE - 2 * half)
    present = (which >= 0).float()
    centre = places[:, :, :, 0].clone()
    total = torch.zeros(batch, STARTS, device=device)
    for slot in range(1, slots):
        covered = torch.zeros(batch, STARTS, TRIES, device=device)
        for other in range(slot):
            reach = ((size[:, slot] + size[:, other]) / 2)[:, None, None, None]
            gap = (places[:, :, slot] - centre[:, :, other].unsqueeze(2)).abs()
            both = (present[:, slot] * present[:, other])[:, None, None]
            covered = covered + (reach - gap).clamp_min(0).prod(-1) * both
        least = covered.min(2)
        total = total + least.values
        centre[:, :, slot] = places[:, :, slot].gather(2, least.indices[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    return Layout(which, size, angle, centre[torch.arange(batch, device=device), total.argmin(1)])


def draw_backgrounds(generator: torch.Generator, background: Tensor, objects: Objects) -> Tensor:
    """Backgrounds [B, 3, 64, 64] of these kinds [B]: two colours at a horizon, jittered, with a mild gradient."""
    device = generator.device
    table = torch.tensor([[_rgb(colour) for colour in pair] for pair in objects.backgrounds.values()], device=device)
    batch = len(background)

    def noise(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device) * 2 - 1

    colours = table[background]  # [B, 2, 3]
    plain = (colours[:, 0] == colours[:, 1]).all(-1)
    jitter = noise(2, 3) * 0.05
    jitter[:, 1] = torch.where(plain.unsqueeze(1), jitter[:, 0], jitter[:, 1])
    colours = (colours + jitter).clamp(0, 1)
    line = torch.linspace(-1, 1, SIZE, device=device)
    horizon = 0.15 + 0.25 * noise(1)  # in [-0.1, 0.4], from the top
    lower = torch.sigmoid((line.unsqueeze(0) - horizon) * SIZE)[:, None, :, None]
    picture = colours[:, 0, :, None, None] * (1 - lower) + colours[:, 1, :, None, None] * lower
    slope = noise(2) * 0.05
    ramp = slope[:, 0, None, None] * line[None, :, None] + slope[:, 1, None, None] * line[None, None, :]
    return (picture + ramp.unsqueeze(1)).clamp(0, 1).expand(batch, 3, SIZE, SIZE).contiguous()


def render(sprites: Tensor, layout: Layout, canvas: Tensor, oversample: int = 2) -> Tensor:
    """Pictures [n, 4, 64, 64] (premultiplied) drawn on `canvas` [B, 3, 64, 64] as laid out; values in [0, 1]."""
    image = canvas.clone()
    for slot in range(layout.which.shape[1]):
        rows = (layout.which[:, slot] >= 0).nonzero(as_tuple=True)[0]
        if not len(rows):
            continue
        scale = SIZE / layout.size[rows, slot]
        cosine, sine = layout.angle[rows, slot].cos() * scale, layout.angle[rows, slot].sin() * scale
        turn = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], 1)
        shift = -turn @ (layout.centre[rows, slot] * 2 / SIZE - 1).unsqueeze(-1)
        side = SIZE * oversample
        grid = F.affine_grid(torch.cat([turn, shift], -1), [len(rows), 4, side, side], align_corners=False)
        drawn = F.grid_sample(sprites[layout.which[rows, slot]], grid, align_corners=False)
        drawn = F.avg_pool2d(drawn, oversample)
        image[rows] = drawn[:, :3] + (1 - drawn[:, 3:]) * image[rows]
    return image.clamp(0, 1)


def seeded(seed: int, device: torch.device | str) -> torch.Generator:
    """A generator on this device."""
    return torch.Generator(device).manual_seed(seed)


def _rgb(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
