"""The named pictures, from the data folder or from a pack of it, and the words that name them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BUILTIN = Path(__file__).resolve().parents[2] / "molecli" / "builtin"
OBJECTS_FILE = BUILTIN / "emoji" / "objects.json"
STYLES = ("noto", "twemoji")  # the base's drawing style, the one kept out of its training
SIZE = 64


@dataclass(frozen=True)
class Objects:
    """The words of the caption language that name things, each with the file id of its picture."""

    base: dict[str, str]
    concepts: dict[str, str]
    style: str
    backgrounds: dict[str, tuple[str, str]]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every object's word: the base's objects first, then the held-out concepts."""
        return (*self.base, *self.concepts)

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """Every background's phrase."""
        return tuple(self.backgrounds)


def load_objects(path: Path = OBJECTS_FILE) -> Objects:
    """The objects' file in the package."""
    raw = json.loads(path.read_text("utf-8"))
    return Objects(raw["base"], raw["concepts"], raw["style"], {k: (a, b) for k, (a, b) in raw["backgrounds"].items()})


@dataclass(frozen=True)
class Sprites:
    """Pictures with their alpha, premultiplied: [pictures, 4, 64, 64] in [0, 1], and the file id of each."""

    pixels: dict[str, Tensor]
    ids: tuple[str, ...]

    def rows(self, wanted: list[str], style: str) -> Tensor:
        """Pictures [len(wanted), 4, 64, 64] of these file ids in one style."""
        position = {name: row for row, name in enumerate(self.ids)}
        return self.pixels[style][[position[name] for name in wanted]]

    def named(self, objects: Objects, style: str) -> Tensor:
        """Pictures of every object, in the order of `Objects.words`."""
        return self.rows([*objects.base.values(), *objects.concepts.values()], style)

    def without(self, objects: Objects, *, named: bool = False) -> Tensor:
        """Pictures in the base's style without the held-out concepts and, with `named`, without any named object.

        `named` also leaves out pictures that show nearly the same thing as a named one (a second dog, another clock).
        """
        held_out = set(objects.concepts.values())
        if named:
            held_out |= set(objects.base.values()) | _LOOKALIKES
        return self.rows([name for name in self.ids if name not in held_out], STYLES[0])


# Other pictures of the named things, by file id: they are neither the named object nor clearly something else.
_LOOKALIKES = frozenset(Path(__file__).with_name("lookalikes.txt").read_text("utf-8").split())


def pack(data_dir: Path, target: Path) -> None:
    """Writes all pictures of both styles as one compressed .npz (uint8 RGBA), which replaces the folder elsewhere."""
    ids = sorted(path.stem for path in (data_dir / STYLES[0] / "64").glob("*.png"))
    arrays = {style: np.stack([_rgba(data_dir / style / "64" / f"{name}.png") for name in ids]) for style in STYLES}
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, ids=np.array(ids), **arrays)


def load_sprites(source: Path, device: torch.device | str = "cpu", *, only: set[str] | None = None) -> Sprites:
    """Pictures from a data folder (noto/64, twemoji/64) or from a pack of it; `only`: read only these file ids."""
    if source.is_dir():
        ids = sorted(path.stem for path in (source / STYLES[0] / "64").glob("*.png"))
        ids = [name for name in ids if only is None or name in only]
        raw = {style: np.stack([_rgba(source / style / "64" / f"{name}.png") for name in ids]) for style in STYLES}
    else:
        with np.load(source) as packed:
            ids = [str(name) for name in packed["ids"]]
            keep = [row for row, name in enumerate(ids) if only is None or name in only]
            ids = [ids[row] for row in keep]
            raw = {style: packed[style][keep] for style in STYLES}
    return Sprites({style: premultiplied(array).to(device) for style, array in raw.items()}, tuple(ids))


def premultiplied(rgba: np.ndarray) -> Tensor:
    """uint8 RGBA [n, 64, 64, 4] as premultiplied floats [n, 4, 64, 64]: no fringe when a picture is scaled."""
    pixels = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255
    return torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], dim=1)


def _rgba(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGBA"))
