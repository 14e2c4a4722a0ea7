"""Stage `concepts`: the few pictures from which a LoRA learns each concept and the drawing style."""

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
# Concepts for which six pictures are too few. A thing with many fine parts, or with the colour of a background, is
# shown larger and on every background, alone and beside an object. The style is shown on every object of the base.
EVERYWHERE = frozenset({"teapot", "helicopter", "violin"})
LARGE = {**scenes.SIZES, 1: (32.0, 52.0), 2: (28.0, 38.0)}
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
    """Writes `<concept>/N.png`, `<style>/N.png`, a prompts.json for each set, and the sources of the pictures."""
    objects = world.objects
    for row, concept in enumerate(objects.concepts):
        batch = everywhere(world, row) if concept in EVERYWHERE else distinct(world, row)
        write_set(batch, world, "", folder / concept)
    generator = scenes.seeded(99, world.device)
    which = torch.randperm(len(objects.base), generator=generator, device=world.device).unsqueeze(1)
    batch = world.scene(scenes.seeded(98, world.device), which, _all(which, True), sizes=LARGE)
    write_set(batch, world, objects.style, folder / objects.style)
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, "utf-8")


def distinct(world: World, row: int) -> Batch:
    """Scenes of a concept, half of them with an object of the base, no two of them on the same background."""
    which = _shown(world, row, PICTURES // 2, scenes.seeded(200 + row, world.device))
    seed = 100 + row
    while True:
        batch = world.scene(scenes.seeded(seed, world.device), which, _all(which, False))
        if len(batch.background.unique()) == len(which):
            return batch
        seed += 1000


def everywhere(world: World, row: int) -> Batch:
    """Scenes of a concept on every background, once alone and once with an object of the base."""
    generator, kinds = scenes.seeded(300 + row, world.device), len(world.objects.phrases)
    which = _shown(world, row, kinds, generator)
    order = torch.randperm(kinds, generator=generator, device=world.device)
    background = torch.cat([torch.arange(kinds, device=world.device), order])
    return world.scene(generator, which, _all(which, False), sizes=LARGE, background=background)


def _shown(world: World, row: int, half: int, generator: torch.Generator) -> Tensor:
    """[2 * half, 2]: the concept alone, then first or second, in turn, beside different objects of the base."""
    objects = len(world.objects.base)
    which = torch.full((2 * half, 2), objects + row, device=world.device)
    which[:half, 1] = -1
    beside = torch.randperm(objects, generator=generator, device=world.device)[:half]
    for place, other in enumerate(beside.tolist()):
        which[half + place, place % 2] = other
    return which


def _all(which: Tensor, styled: bool) -> Tensor:
    return torch.full((len(which),), styled, device=which.device)


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
