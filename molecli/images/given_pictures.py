"""The pictures that `mole sample` begins with: files or folders, with or without masks.

Contents: GivenPicture, given_pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from molecli.bases.starts import Start, check_strength, fitted
from molecli.catalog.builtin import DEFAULT_STRENGTH
from molecli.config import SampleRecipe
from molecli.errors import UsageError
from molecli.files.pictures import pictures_in, read_picture
from molecli.files.unique_names import slugs
from molecli.protocols import Note


@dataclass(frozen=True)
class GivenPicture:
    """A picture to begin with: its name in file names ("" if it is the only one), its file, the mask's, the start."""

    name: str = ""
    file: str = ""
    mask: str = ""
    start: Start | None = None


# Drawing from noise alone
FROM_NOISE = GivenPicture()


def given_pictures(recipe: SampleRecipe, *, note: Note = lambda text: None) -> Sequence[GivenPicture]:
    """The pictures that `recipe` names, in the size to draw; from noise alone if it names none.

    Each prompt is drawn from each picture. `note` receives a line for each picture that is resized.
    Raises: UsageError for a mask without a picture, masks that do not belong to the pictures, or an empty mask.
    """
    if recipe.init_image is None:
        if recipe.mask_image is not None:
            what, remedy = "a mask needs a picture to draw in", "Write --init-image FILE too."
            raise UsageError("--mask-image", what, remedy)
        if recipe.strength != DEFAULT_STRENGTH:
            raise UsageError("--strength", "it has an effect only with --init-image", "Leave it out.")
        return [FROM_NOISE]
    check_strength(recipe.strength, recipe.image.steps)
    files = _files(recipe.init_image)
    masks = _masks(recipe.mask_image, files)
    names = slugs([file.name for file in files]) if len(files) > 1 else {}
    found = []
    for file in files:
        mask = masks.get(file)
        start, said = fitted(
            read_picture(file, smallest=1),
            None if mask is None else _mask(mask),
            width=recipe.image.width,
            height=recipe.image.height,
            strength=recipe.strength,
        )
        for line in said:
            note(f"{file.name}: {line}")
        name = names.get(file.name, "")
        found.append(GivenPicture(name, str(file), "" if mask is None else str(mask), start))
    return found


def _files(path: str) -> list[Path]:
    """The picture at `path`, or those in that folder."""
    place = Path(path).expanduser()
    if place.is_dir():
        return pictures_in(place)
    if not place.exists():
        raise UsageError(str(place), "no such picture or folder of pictures", "Check the path.")
    return [place]


def _masks(path: str | None, files: Sequence[Path]) -> dict[Path, Path]:
    """picture -> its mask: the one of the same name in a folder, or the one file for all."""
    if path is None:
        return {}
    found = _files(path)
    if not Path(path).expanduser().is_dir():
        return dict.fromkeys(files, found[0])
    named = {mask.stem: mask for mask in found}
    for file in files:
        if file.stem not in named:
            what = f"it has no mask for {file.name}"
            raise UsageError(str(path), what, f"Put one there under the same name, such as {file.stem}.png.")
    return {file: named[file.stem] for file in files}


def _mask(path: Path) -> Image.Image:
    """The mask in grey. Raises: UsageError if it is black everywhere."""
    mask = read_picture(path, smallest=1).convert("L")
    if np.asarray(mask).max() < 128:
        what = "it is black everywhere, so nothing would be drawn"
        raise UsageError(str(path), what, "Make white what is to be drawn anew.")
    return mask
