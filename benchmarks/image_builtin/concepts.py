"""Stage `concepts`: the handful of pictures from which a LoRA learns each concept and the drawing style."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import scenes
from .batches import Batch, World
from .captions import caption

PICTURES = 6  # a concept: half of them alone, half beside an object of the base, as photographs of a thing would be
STYLED = 8  # the style
ATTRIBUTION = """\
# Where these pictures come from

The pictures in this folder show emoji of two sets on drawn backgrounds:

- `octopus` and the other objects: Noto Emoji, Copyright Google, [Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0).
- `flat`: Twemoji, Copyright Twitter, Inc and other contributors, [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/).
  The graphics were scaled, turned a little and placed on backgrounds.

The networks in `tiny-sd`, `tiny-clip` and `recogniser` were trained on pictures of both sets. Names and file ids:
Unicode data as packaged in emoji-datasource 16.0.0 (MIT).
"""


def write_concepts(world: World, folder: Path) -> None:
    """Write `<concept>/N.png`, `<style>/N.png`, a prompts.json beside each set, and where the pictures come from."""
    objects = world.objects
    for row, concept in enumerate(objects.concepts):
        generator = scenes.seeded(200 + row, world.device)
        which = torch.full((PICTURES, 2), len(objects.base) + row, device=world.device)
        which[: PICTURES // 2, 1] = -1
        beside = torch.randperm(len(objects.base), generator=generator, device=world.device)[: PICTURES // 2]
        for place, other in enumerate(beside.tolist()):  # first or second, in turn
            which[PICTURES // 2 + place, place % 2] = other
        batch = distinct(world, which, styled=False, seed=100 + row)
        write_set(batch, world, "", folder / concept)
    generator = scenes.seeded(99, world.device)
    which = torch.randperm(len(objects.base), generator=generator, device=world.device)[:STYLED].unsqueeze(1)
    batch = distinct(world, which, styled=True, seed=98)
    write_set(batch, world, objects.style, folder / objects.style)
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, "utf-8")


def distinct(world: World, which: Tensor, *, styled: bool, seed: int) -> Batch:
    """Scenes of these objects [n, k], no two of them on the same background."""
    flags = torch.full((len(which),), styled, device=world.device)
    while True:
        batch = world.scene(scenes.seeded(seed, world.device), which, flags)
        if len(batch.background.unique()) == len(which):
            return batch
        seed += 1000


def write_set(batch: Batch, world: World, style: str, folder: Path) -> None:
    """Write pictures 0.png, 1.png, … and prompts.json ({file: caption})."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    prompts: dict[str, str] = {}
    for row, which in enumerate(batch.which.tolist()):
        pixels = (batch.images[row] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"{row}.png", optimize=True)
        words = [world.objects.words[place] for place in which if place >= 0]
        prompts[f"{row}.png"] = caption(words, world.objects.phrases[int(batch.background[row])], style)
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", "utf-8")
