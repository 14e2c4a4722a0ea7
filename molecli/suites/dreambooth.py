"""The `dreambooth` suite: DreamBooth's subjects, alone or in the compositions of a recipe (Ruiz et al., CVPR 2023).

    subjects    each subject that has a LoRA, in DreamBooth's 25 prompts for its kind
    A + B + C   one composition in the recipe's `eval.data.scenes`, in five prompts (a row of MoLE's Table 1)

`data_dir` has a folder of pictures for each subject and prompts_and_classes.txt, as in google/dreambooth. LoRAs must
have the names of the subjects. Prompts name a subject by the trigger of its LoRA ("sks dog").
Departs: MoLE used five prompts for each composition, which are not published; these are DreamBooth's first five places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from molecli.catalog.suites import SUITES
from molecli.errors import MismatchError, UsageError, suggestion
from molecli.files.concepts import Concept
from molecli.protocols import Scene
from molecli.suites.pictures import elements_of

PROMPTS_FILE = "prompts_and_classes.txt"
SUBJECTS = "subjects"
PLACES = 5
LIVE = ("cat", "dog")
_TEMPLATE = re.compile(r"'([^']*\{0\} \{1\}[^']*)'\.format")
_CALL = "{0} {1}"


class GivenScene(Protocol):
    """One entry of a recipe's scenes, such as a `config.SceneConfig`."""

    @property
    def loras(self) -> tuple[str, ...]: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def task(self) -> str | None: ...


@dataclass(frozen=True)
class Listing:
    """The content of prompts_and_classes.txt: subject -> class, and the templates of things and of animals."""

    classes: Mapping[str, str]
    things: tuple[str, ...]
    animals: tuple[str, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """The texts after the subject in the first templates for all subjects: "in the jungle"."""
        start = f"a {_CALL} "
        shared = [text for text in self.things if text in self.animals and text.startswith(start)]
        return tuple(text.removeprefix(start) for text in shared[:PLACES])


class DreamboothSuite:
    """Subjects from `data_dir`, and the compositions that the recipe lists."""

    name = "dreambooth"
    version = "1"

    def __init__(self, scenes: Sequence[GivenScene] = ()) -> None:
        self.compositions = tuple(scenes)

    def tasks(self, concepts: Mapping[str, Concept | None], data_dir: str | None) -> list[str]:
        """The compositions in the recipe by task, else the single subjects. Raises: UsageError if there is none."""
        listing = read_listing(data_dir)
        if self.compositions:
            return list(dict.fromkeys(map(_task, self.compositions)))
        if not any(name in listing.classes for name in concepts):
            given = ", ".join(concepts) or "none"
            what = f"no LoRA has the name of a subject; the given LoRAs are: {given}"
            raise UsageError(
                "suite dreambooth", what, "Write --loras dog6=PATH,... as the folders of pictures are named."
            )
        return [SUBJECTS]

    def scenes(self, task: str, concepts: Mapping[str, Concept | None], data_dir: str | None) -> list[Scene]:
        """The scenes of one task. Raises: UsageError for a LoRA without known trigger words."""
        listing = read_listing(data_dir)
        if self.compositions:
            chosen = [composition for composition in self.compositions if _task(composition) == task]
            return [scene for composition in chosen for scene in _composed(task, composition, concepts, listing)]
        return [
            _scene(task, f"{name} {number:02d}", text.replace(_CALL, _called(name, concepts)), (name,), concepts)
            for name in concepts
            if name in listing.classes
            for number, text in enumerate(listing.animals if listing.classes[name] in LIVE else listing.things)
        ]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Both alignments."""
        return SUITES[self.name].metrics

    def pictures(self, lora: str, data_dir: str | None) -> str | None:
        """The folder of the subject. Raises: UsageError if it is missing."""
        folder = Path(_given(data_dir), lora)
        if lora in read_listing(data_dir).classes and not folder.is_dir():
            raise UsageError(
                str(folder), f"there is no such folder, and {lora!r} is a subject", "Put its pictures there."
            )
        return str(folder) if folder.is_dir() else None


def read_listing(data_dir: str | None) -> Listing:
    """The subjects and prompts in `data_dir`. Raises: UsageError without them; MismatchError for a damaged file."""
    file = Path(_given(data_dir), PROMPTS_FILE)
    if not file.is_file():
        what = f"it has no {PROMPTS_FILE}" if file.parent.is_dir() else "no such folder"
        raise UsageError(str(file.parent), what, "Give --data-dir a copy of google/dreambooth's dataset folder.")
    head, _, rest = file.read_text("utf-8", errors="replace").partition("Object Prompts")
    things, _, animals = rest.partition("Live Subject Prompts")
    rows = [line.split(",") for line in head.splitlines() if line.count(",") == 1]
    classes = {name.strip(): kind.strip() for name, kind in rows if name.strip() != "subject_name"}
    listing = Listing(classes, tuple(_TEMPLATE.findall(things)), tuple(_TEMPLATE.findall(animals)))
    if not (listing.classes and listing.places):
        raise MismatchError(str(file), "it has no subjects or no prompts", "Download it again.")
    return listing


def _given(data_dir: str | None) -> str:
    if data_dir is None:
        what = "it reads its pictures and prompts from a folder, and none is given"
        raise UsageError("suite dreambooth", what, "Write --data-dir DIR with a copy of google/dreambooth.")
    return data_dir


def _composed(
    task: str, composition: GivenScene, concepts: Mapping[str, Concept | None], listing: Listing
) -> list[Scene]:
    loras, label = composition.loras, " + ".join(composition.loras)
    for name in loras:
        if name not in concepts:
            what = f"the scene {label} needs the LoRA {name!r}, which is not given"
            raise UsageError("eval.data.scenes", what, suggestion(name, list(concepts)))
    if composition.prompt is not None:
        return [_scene(task, f"{label}: {composition.prompt}", composition.prompt, loras, concepts)]
    called = [f"a {_called(name, concepts)}" for name in loras]
    listed = called[0] if len(called) == 1 else f"{', '.join(called[:-1])} and {called[-1]}"
    return [_scene(task, f"{label}: {place}", f"{listed} {place}", loras, concepts) for place in listing.places]


def _scene(task: str, name: str, prompt: str, loras: tuple[str, ...], concepts: Mapping[str, Concept | None]) -> Scene:
    return Scene(task, name, prompt, loras, elements_of(loras, concepts))


def _called(name: str, concepts: Mapping[str, Concept | None]) -> str:
    concept = concepts.get(name)
    if concept is None:
        what = "the trigger words of this LoRA are not known"
        raise UsageError(f"concepts.{name}", what, 'Write concepts: {NAME: {prompt: "a photo of sks dog"}}.')
    return concept.trigger


def _task(composition: GivenScene) -> str:
    return composition.task or " + ".join(composition.loras)
