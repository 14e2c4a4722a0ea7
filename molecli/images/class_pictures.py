"""Prior preservation: pictures of the class. The base draws those that their folder lacks.

Source: Ruiz et al., DreamBooth, arXiv 2208.12242, section 3.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from molecli.catalog.methods import BASE
from molecli.config import ImageConfig
from molecli.errors import UsageError
from molecli.files.pictures import pictures_in, read_picture
from molecli.images.columns import Column
from molecli.images.drawing import PictureJob, check_drawn, draw
from molecli.images.pictures import CLASS_TASK
from molecli.images.png_metadata import write_png
from molecli.images.sample import facts_of
from molecli.protocols import Picture, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from molecli.config import TrainLoraRecipe

DEFAULT_FOLDER = "class_pictures"


def class_folder(recipe: TrainLoraRecipe) -> Path | None:
    """The folder with the pictures of the class; None without prior preservation."""
    config = recipe.pictures
    if config is None or config.class_prompt is None:
        return None
    return Path(config.class_dir).expanduser() if config.class_dir else Path(recipe.output) / DEFAULT_FOLDER


def class_pictures(recipe: TrainLoraRecipe) -> list[Picture]:
    """The existing pictures of the class, at most as many as the recipe asks for; none without prior preservation.

    Raises: UsageError for a picture that was drawn for another prompt or with another base.
    """
    folder, config = class_folder(recipe), recipe.pictures
    if folder is None or config is None or not folder.is_dir() or not any(folder.iterdir()):
        return []
    files = pictures_in(folder)[: config.class_pictures]
    for file in files:
        _check_drawn_alike(file, {"prompt": str(config.class_prompt), "base": recipe.base.id})
    return [Picture(CLASS_TASK, str(config.class_prompt), str(file)) for file in files]


def draw_missing(
    recipe: TrainLoraRecipe, backbone: Any, accelerator: Accelerator, progress: Progress | None = None
) -> None:
    """Draws the missing pictures of the class; each process draws its share. Picture i has seed `recipe.seed` + i.

    Each is written as soon as it is drawn, so that a resumed run does not draw it again. Collective.
    """
    folder, config = class_folder(recipe), recipe.pictures
    if folder is None or config is None:
        return
    missing = _free_places(folder, config.class_pictures - len(class_pictures(recipe)))
    accelerator.wait_for_everyone()  # every process must count the pictures before one of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    side = config.resolution or backbone.resolution
    image = ImageConfig(width=side, height=side)
    jobs = [PictureJob(str(config.class_prompt), recipe.seed + place, _name(place)) for place in mine]
    done = 0

    def keep(job: PictureJob, picture: Image.Image) -> None:
        nonlocal done
        write_png(folder / job.name, picture, facts_of(job.prompt, job.seed, Column(BASE), image, backbone))
        done += 1
        if progress is not None:
            progress("class pictures", done, len(jobs))

    at_once = recipe.train.micro_batch_size or max(1, recipe.train.batch_size // accelerator.num_processes)
    check_drawn(draw(backbone, jobs, image, batch_size=at_once, keep=keep), len(jobs))
    accelerator.wait_for_everyone()


def _free_places(folder: Path, count: int) -> list[int]:
    """The lowest `count` numbers without a picture in the folder."""
    places: list[int] = []
    place = 0
    while len(places) < count:
        if not (folder / _name(place)).exists():
            places.append(place)
        place += 1
    return places


def _name(place: int) -> str:
    return f"{place:05d}.png"


def _check_drawn_alike(file: Path, wanted: dict[str, str]) -> None:
    """Raises: UsageError for a picture of mole's that has other facts. Other pictures state none and are accepted."""
    read_picture(file)  # reports a broken picture in the usual words
    with Image.open(file) as image:
        found = getattr(image, "text", {})
    for key, value in wanted.items():
        if "mole_version" in found and found.get(key) != value:
            what = f"it was drawn for the {key} {found.get(key)!r}, and this run's {key} is {value!r}"
            raise UsageError(str(file), what, "Name another --class-dir.")
