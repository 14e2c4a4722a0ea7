"""What the gates of a diffusion base learn from: the pictures of the LoRAs' concepts.

concept_pictures   every picture with its prompt
concept_rows       the rows that training goes through, as many of each concept
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from molecli.engine.images.pictures import Lesson, instance_pictures, lessons
from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.files.pictures import read_picture
from molecli.files.recipe import PicturesConfig
from molecli.protocols import Picture


def concept_pictures(names: Sequence[str], concepts: Mapping[str, Concept]) -> list[Picture]:
    """The pictures of the LoRAs `names`, each under prompts.json's prompt or the concept's; task is the LoRA's name.

    Raises: UsageError for a LoRA without pictures, and for pictures that cannot be trained on.
    """
    found = []
    for name in names:
        concept = concepts.get(name)
        if concept is None or concept.pictures is None:
            what = "gates learn from pictures of what each LoRA adds, and there are none of this one"
            remedy = f'Write concepts.{name}: {{pictures: DIR, prompt: "a photo of ..."}} in the recipe.'
            raise UsageError(name, what, remedy)
        found += instance_pictures(PicturesConfig(instance_dir=concept.pictures, instance_prompt=concept.prompt), name)
    for picture in found:
        read_picture(picture.target)  # a broken one shows now, and not when the base has been loaded
    return found


def concept_rows(pictures: Sequence[Picture]) -> list[Lesson]:
    """A row for each picture, those of concepts with fewer pictures again: no LoRA is asked for more often."""
    rows = lessons(pictures)
    by_concept: dict[str, list[Lesson]] = {}
    for row in rows:
        by_concept.setdefault(row.task, []).append(row)
    most = max(len(own) for own in by_concept.values())
    turns = ([own[i % len(own)] for own in by_concept.values()] for i in range(most))
    return list(chain.from_iterable(turns))
