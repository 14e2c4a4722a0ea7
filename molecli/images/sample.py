"""`mole sample` on a diffusion base: every method draws every prompt from the same seeds, onto one contact sheet.

sample            recipe -> DrawnPictures: the whole command
DrawnPictures     the pictures that were drawn, and those that could not be drawn
Drawn             one picture: prompt, method, seed, path
sample_pictures   the pictures of given columns             sample_columns   the columns of a recipe
facts_of          the facts about a picture that its PNG file stores
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from molecli.bases.diffusion import Diffusion
from molecli.bases.loading import load_backbone
from molecli.catalog.builtin import BUILTIN_IMAGE_BASE, builtin_loras
from molecli.catalog.methods import ALONE, BASE, SUM
from molecli.config import ImageConfig, SampleRecipe
from molecli.config.unread import check_fields, check_options, composing
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.files.composition import Composition
from molecli.files.lora_spec import LoraLike, LoraSpec
from molecli.files.output_folder import SAMPLES_FILE
from molecli.files.unique_names import numbered, slugs
from molecli.images.clip_skip import use_clip_skip
from molecli.images.columns import Column, ColumnBuilder, masked, read_concepts
from molecli.images.drawing import Failure, PictureJob, check_drawn, draw, guidance_of, warnings_as_notes
from molecli.images.given_pictures import FROM_NOISE, GivenPicture, given_pictures
from molecli.images.png_metadata import PictureFacts, write_png
from molecli.images.sheet import SheetRow, write_sheets
from molecli.mixture.attach import base_of, read_experts
from molecli.protocols import Note, Progress

# Pictures are files, so a folder is always written, even if none is named.
IN_FOLDER = True
TEXT_FIELDS = ("max_new_tokens", "temperature", "top_p")


@dataclass(frozen=True)
class Drawn:
    """One picture that was drawn."""

    prompt: str
    method: str
    seed: int
    path: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DrawnPictures:
    """The pictures in the order prompt, seed, method, and those that could not be drawn."""

    pictures: tuple[Drawn, ...]
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def document(self) -> list[dict[str, Any]]:
        """The pictures as JSON stores them."""
        return [picture.document() for picture in self.pictures]

    def lines(self) -> list[str]:
        """The pictures' paths."""
        return [picture.path for picture in self.pictures]

    def check(self) -> None:
        """Raises: RunError if a picture could not be drawn."""
        check_drawn(self.failures, len(self.pictures) + len(self.failures))


@dataclass(frozen=True)
class _Place:
    """Which picture it is: the index of its prompt, the name of its column, its seed, what it begins with."""

    prompt: int
    column: str
    seed: int
    given: int = 0


def sample(
    recipe: SampleRecipe,
    composition: Composition | None,
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> DrawnPictures:
    """The pictures of `recipe.prompts` by every method, in `recipe.output`, and those that could not be drawn.

    Image k of a prompt has seed `recipe.seed` + k with every method. A picture is written as soon as it is drawn.
    sheet.png shows all of them, samples.jsonl lists them. `note` receives a line when words of a prompt are cut.
    Raises: UsageError if it is not clear which experts to use; MismatchError if they do not fit the base.
    """
    check_fields(recipe, TEXT_FIELDS, "texts")
    check_options(recipe.method, composing(recipe.modes))
    given = given_pictures(recipe, note=note)
    backbone: Any = load_backbone(base_of(recipe.base, composition), recipe.device)
    use_clip_skip(backbone, recipe.image.clip_skip, [composition] if composition is not None else [])
    columns = sample_columns(recipe, composition, backbone)
    with warnings_as_notes(note):
        return sample_pictures(recipe, columns, backbone, given=given, progress=progress, note=note)


def sample_pictures(
    recipe: SampleRecipe,
    columns: Sequence[Column],
    backbone: Diffusion,
    *,
    given: Sequence[GivenPicture] = (FROM_NOISE,),
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> DrawnPictures:
    """The pictures of every column, in `recipe.output`; each prompt is drawn from each picture of `given`."""
    assert recipe.output is not None
    folder = Path(recipe.output)
    paths = picture_paths(folder, recipe, [column.name for column in columns], given)
    drawn: dict[_Place, Drawn] = {}
    failures: list[Failure] = []
    for column in columns:
        places = [place for place in paths if place.column == column.name]
        mine = {place: paths[place] for place in places}
        failures += _draw_column(recipe, backbone, column, mine, given, drawn, progress, note)
    found = [drawn[place] for place in paths if place in drawn]
    if found:
        write_text(folder / SAMPLES_FILE, "".join(json.dumps(d.document(), ensure_ascii=False) + "\n" for d in found))
        write_sheets(folder, [column.name for column in columns], _rows(recipe, columns, given, drawn))
    return DrawnPictures(tuple(found), tuple(failures))


def sample_columns(recipe: SampleRecipe, composition: Composition | None, backbone: Diffusion) -> list[Column]:
    """The columns: the modes in their order, each with its LoRAs, then the composition.

    Raises: UsageError if it is not clear which experts to use; MismatchError if they do not fit the base.
    """
    loras = _loras(recipe, composition)
    wanted = recipe.modes
    if composition is None and not wanted:
        wanted = _one_mode(recipe, loras)
    needed = set(wanted) - {BASE}
    if needed and not loras:
        mode = next(mode for mode in wanted if mode in needed)
        raise UsageError("--modes", f"{mode!r} needs LoRAs, but none are named", "Write --loras a=PATH,b=PATH.")
    # A LoRA that a composition records may match the base only in part: that was accepted when it was composed.
    experts = read_experts(backbone.model, loras if needed else [], allow_partial=not recipe.loras)
    builder = ColumnBuilder(
        backbone.model,
        {expert.name: expert for expert in experts},
        {lora.name: getattr(lora, "weight", 1.0) for lora in loras},
        read_concepts(loras, recipe.concepts) if needed else {},
        recipe.method,
        recipe.image.branches_at_once,
    )
    names = [lora.name for lora in loras]
    columns: list[Column] = []
    for mode in dict.fromkeys(wanted):
        if mode == ALONE:
            chosen = [n for n in names if n not in recipe.mask and n in (recipe.only or names)]
            columns += [builder.alone(name) for name in chosen]
        else:
            columns.append(masked(builder.fixed(mode, names), mask=recipe.mask, only=recipe.only))
    if composition is not None:
        own = builder.composed(composition.mode, composition, recipe.loras)
        columns.append(masked(own, mask=recipe.mask, only=recipe.only))
    names = numbered(column.name for column in columns)
    return [replace(column, name=name) for column, name in zip(columns, names, strict=True)]


def picture_paths(
    folder: Path, recipe: SampleRecipe, columns: Sequence[str], given: Sequence[GivenPicture] = (FROM_NOISE,)
) -> dict[_Place, Path]:
    """The file of every picture, in the order prompt, given picture, seed, method: `<prompt>-<method>-<seed>.png`, with
    the name of the given picture after the prompt if there are several."""
    width = len(str(len(recipe.prompts) - 1))
    short = slugs(columns)
    seeds = range(recipe.seed, recipe.seed + recipe.images)
    return {
        _Place(i, name, seed, j): folder / f"{i:0{width}d}-{f'{one.name}-' if one.name else ''}{short[name]}-{seed}.png"
        for i in range(len(recipe.prompts))
        for j, one in enumerate(given)
        for seed in seeds
        for name in columns
    }


def facts_of(
    prompt: str,
    seed: int,
    column: Column,
    image: ImageConfig,
    backbone: Diffusion,
    given: GivenPicture = FROM_NOISE,
) -> PictureFacts:
    """The facts about a picture that its PNG file stores."""
    skip = backbone.clip_skip if image.clip_skip is None else image.clip_skip
    more = {
        "init_image": given.file,
        "mask_image": given.mask,
        "strength": None if given.start is None else given.start.strength,
        "clip_skip": skip,
        "eta": image.eta,
        "guidance_rescale": image.guidance_rescale,
        "scheduler_options": image.scheduler_options,
    }
    return PictureFacts(
        prompt=prompt,
        negative_prompt=image.negative_prompt,
        seed=seed,
        method=column.name,
        loras=column.loras,
        settings=column.settings,
        dtype=str(backbone.pipe.unet.dtype)[6:],
        steps=image.steps,
        guidance=guidance_of(image, backbone),
        scheduler=image.scheduler or type(backbone.pipe.scheduler).__name__,
        base=backbone.name,
        more={name: value for name, value in more.items() if value},
    )


def _draw_column(
    recipe: SampleRecipe,
    backbone: Diffusion,
    column: Column,
    paths: Mapping[_Place, Path],
    given: Sequence[GivenPicture],
    drawn: dict[_Place, Drawn],
    progress: Progress | None,
    note: Note,
) -> list[Failure]:
    """Draws one column and adds its pictures to `drawn`; returns the pictures that could not be drawn."""
    places = {path.name: place for place, path in paths.items()}
    jobs = [
        PictureJob(recipe.prompts[place.prompt], place.seed, path.name, given[place.given].start)
        for place, path in paths.items()
    ]
    done = 0

    def keep(job: PictureJob, picture: Image.Image) -> None:
        nonlocal done
        place = places[job.name]
        facts = facts_of(job.prompt, job.seed, column, recipe.image, backbone, given[place.given])
        path = write_png(paths[place], picture, facts)
        drawn[place] = Drawn(job.prompt, column.name, job.seed, str(path))
        done += 1
        if progress is not None:
            progress(column.name, done, len(jobs))

    with column.context:
        return draw(
            backbone,
            jobs,
            recipe.image,
            batch_size=recipe.batch_size,
            keep=keep,
            prepare=column.prepare,
            ease=column.ease,
            note=note,
        )


def _rows(
    recipe: SampleRecipe, columns: Sequence[Column], given: Sequence[GivenPicture], drawn: Mapping[_Place, Drawn]
) -> list[SheetRow]:
    def path(place: _Place) -> Path | None:
        return Path(drawn[place].path) if place in drawn else None

    return [
        SheetRow(
            prompt,
            f"{one.name}, seed {seed}" if one.name else f"seed {seed}",
            tuple(path(_Place(i, column.name, seed, j)) for column in columns),
        )
        for i, prompt in enumerate(recipe.prompts)
        for j, one in enumerate(given)
        for seed in range(recipe.seed, recipe.seed + recipe.images)
    ]


def _loras(recipe: SampleRecipe, composition: Composition | None) -> list[LoraLike]:
    """The LoRAs that are named, otherwise the composition's, otherwise (with modes) those built in for the base."""
    if recipe.loras:
        return list(recipe.loras)
    if composition is not None:
        return [LoraSpec(record.name, record.source) for record in composition.experts]
    builtin = recipe.base is not None and recipe.base.id == BUILTIN_IMAGE_BASE
    if builtin and set(recipe.modes) - {BASE}:
        return [LoraSpec(name, str(path)) for name, path in builtin_loras(BUILTIN_IMAGE_BASE).items()]
    return []


def _one_mode(recipe: SampleRecipe, loras: Sequence[LoraLike]) -> tuple[Any, ...]:
    """The one column that is drawn if no mode is named: the bare base, or one LoRA alone. Raises: UsageError."""
    if not loras:
        if recipe.mask or recipe.only:
            raise UsageError("--mask", "there is no LoRA to switch off", "Name a composition, or --loras.")
        return (BASE,)
    if len(loras) > 1 and len(recipe.only) != 1:
        what = f"there are {len(loras)} LoRAs, and nothing says how to combine them"
        remedy = f"Write for example --modes {SUM}, name a composition, or choose one LoRA with --only."
        raise UsageError("--loras", what, remedy)
    return (ALONE,)
