"""Training pictures: their files and prompts, and their pixels as one training step sees them.

instance_pictures   the pictures of the subject, with prompts    lessons        the rows of DreamBooth training
concept_pictures    the pictures of several LoRAs' concepts      concept_rows   the rows that gates learn from
Album               pictures in memory, cropped and mirrored with the step's own random numbers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from molecli.config import PicturesConfig
from molecli.errors import MismatchError, UsageError, suggestion
from molecli.files.concepts import Concept
from molecli.files.pictures import pictures_in, read_picture
from molecli.protocols import Picture

if TYPE_CHECKING:
    from molecli.config import PicturesConfig

PROMPTS_FILE = "prompts.json"
CLASS_TASK = "class"


@dataclass(frozen=True)
class Lesson:
    """One row of training: the index in the album of a picture, and of a picture of the class that is learned with it.

    `task`, `prompt` and `target` (a hash) identify the pictures, so that a resumed run is known to see the same ones.
    """

    task: str
    prompt: str
    target: str
    picture: int
    prior: int | None = None


def instance_pictures(config: PicturesConfig, name: str) -> list[Picture]:
    """The pictures of the subject `name`, each with its prompt from prompts.json, otherwise the instance prompt.

    Raises: UsageError for a folder without pictures, a picture without a prompt, or a name in prompts.json without a
    picture; MismatchError for a prompts.json that cannot be read.
    """
    folder = Path(config.instance_dir).expanduser()
    files = pictures_in(folder)
    prompts = _prompts(folder / PROMPTS_FILE, [file.name for file in files])
    found = []
    for file in files:
        prompt = prompts.get(file.name, config.instance_prompt)
        if prompt is None:
            remedy = f'Write --instance-prompt "a photo of sks ...", or a {PROMPTS_FILE} beside the pictures.'
            raise UsageError(str(file), "there is no prompt for this picture", remedy)
        found.append(Picture(name, prompt, str(file)))
    return found


def lessons(instances: Sequence[Picture], priors: Sequence[Picture] = ()) -> list[Lesson]:
    """A row for every instance, with a picture of the class if there are any. The album holds the instances first.

    There are as many rows as pictures of the larger kind. Pictures of the other kind are repeated, as in diffusers.
    """
    hashes = [_hash(picture) for picture in (*instances, *priors)]
    rows = []
    for i in range(max(len(instances), len(priors))):
        first = i % len(instances)
        second = len(instances) + i % len(priors) if priors else None
        held = hashes[first] if second is None else f"{hashes[first]} {hashes[second]}"
        rows.append(Lesson(instances[first].task, instances[first].prompt, held, first, second))
    return rows


class Album:
    """Pictures as bytes, each scaled so that its shorter side has `resolution` pixels.

    `pixels` cuts a square from each: the middle one, or with crop="random" any. `flip` mirrors half of them. Random
    numbers come from torch's global generator, which the training loop seeds for every step.
    """

    def __init__(self, pictures: Sequence[Picture], resolution: int, *, crop: str = "center", flip: bool = False):
        self.pictures, self.resolution = list(pictures), resolution
        self.random_crop, self.flip = crop == "random", flip
        self._bytes = [_read(picture.target, resolution) for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def fixed(self) -> bool:
        """Whether a picture is the same at every step, so that its latents can be kept."""
        square = all(image.shape[1] == image.shape[2] for image in self._bytes)
        return not self.flip and (square or not self.random_crop)

    def pixels(self, places: Sequence[int]) -> Tensor:
        """[B, 3, resolution, resolution] in [-1, 1], of the pictures with these indices."""
        cut = torch.stack([self._cut(self._bytes[place]) for place in places])
        return cut.float() / 127.5 - 1.0

    def _cut(self, image: Tensor) -> Tensor:
        room = torch.tensor(image.shape[1:]) - self.resolution
        if self.random_crop:
            # One random number for both sides: the shorter side has no room anyway.
            top, left = (torch.rand(()) * (room + 1)).long().tolist()
        else:
            top, left = (room // 2).tolist()
        square = image[:, top : top + self.resolution, left : left + self.resolution]
        mirrored = self.flip and bool(torch.rand(()) < 0.5)
        return square.flip(2) if mirrored else square


def _read(file: str, resolution: int) -> Tensor:
    """The scaled picture. Raises: UsageError for one that would be enlarged more than four times."""
    image = read_picture(file)
    if min(image.size) * 4 < resolution:
        what = f"{image.width}x{image.height} pixels are too few to train at {resolution}"
        remedy = f"Give a picture with at least {-(-resolution // 4)} pixels on each side, or lower --resolution."
        raise UsageError(file, what, remedy)
    return _scaled(image, resolution)


def _scaled(image: Image.Image, resolution: int) -> Tensor:
    """[3, H, W] bytes of an RGB picture, scaled so that its shorter side has `resolution` pixels."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _hash(picture: Picture) -> str:
    digest = hashlib.sha256(Path(picture.target).read_bytes())
    digest.update(picture.prompt.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _prompts(file: Path, names: Sequence[str]) -> dict[str, str]:
    """{name of a picture: its prompt} from prompts.json; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise MismatchError(str(file), "not valid JSON", 'Write {"picture.jpg": "its prompt", ...}.') from None
    valid = isinstance(tree, dict) and all(isinstance(prompt, str) and prompt for prompt in tree.values())
    if not valid:
        what = "it does not map pictures to prompts"
        raise MismatchError(str(file), what, 'Write {"picture.jpg": "its prompt", ...}.')
    for name in tree:
        if name not in names:
            raise UsageError(str(file), f"there is no picture {name!r} in its folder", suggestion(name, names))
    return tree


def concept_pictures(names: Sequence[str], concepts: Mapping[str, Concept]) -> list[Picture]:
    """The pictures of the LoRAs `names`, each with its prompt from prompts.json or the concept; `task` is the LoRA.

    Raises: UsageError for a LoRA without pictures, and for pictures that cannot be trained on.
    """
    found = []
    for name in names:
        concept = concepts.get(name)
        if concept is None or concept.pictures is None:
            what = "gates learn from pictures of what each LoRA adds, and this LoRA has none"
            remedy = f'Write concepts.{name}: {{pictures: DIR, prompt: "a photo of ..."}} in the recipe.'
            raise UsageError(name, what, remedy)
        found += instance_pictures(PicturesConfig(instance_dir=concept.pictures, instance_prompt=concept.prompt), name)
    for picture in found:
        read_picture(picture.target)  # report a broken picture before the base is loaded
    return found


def concept_rows(pictures: Sequence[Picture]) -> list[Lesson]:
    """A row for each picture. Pictures of concepts with fewer pictures are repeated, so that all LoRAs count alike."""
    rows = lessons(pictures)
    by_concept: dict[str, list[Lesson]] = {}
    for row in rows:
        by_concept.setdefault(row.task, []).append(row)
    most = max(len(own) for own in by_concept.values())
    turns = ([own[i % len(own)] for own in by_concept.values()] for i in range(most))
    return list(chain.from_iterable(turns))
