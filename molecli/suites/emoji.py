"""The `emoji` suite: compositions of the embedded LoRAs in scenes of the embedded image base.

    concepts            each LoRA alone, in two scenes
    2 LoRAs ... 5 LoRAs  ten scenes of that many different LoRAs: "a violin, an octopus and a teapot on sand by the sea"

Scenes use the given LoRAs; tasks that need more LoRAs are left out. In a task, all LoRAs occur equally often (up to one
scene). A style is not an object: it changes how the objects of the scene are drawn. The split `train`
has other scenes of the same tasks, for choosing settings.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.protocols import Element, Scene, Split
from molecli.suites._captions import EMOJI, caption, read_words

SIZES = (2, 3, 4, 5)
SCENES, ALONE = 10, 2  # scenes of a task of several LoRAs, and of each LoRA alone
CONCEPTS = "concepts"
_SIZE = {f"{size} LoRAs": size for size in SIZES}


class EmojiSuite:
    """Scenes of the embedded LoRAs; needs no data folder."""

    name = "emoji"
    version = "1"

    def __init__(self, split: Split = "test") -> None:
        self.split = split

    def tasks(self, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[str]:
        """The tasks for which there are enough LoRAs. Raises: UsageError if none of them is an embedded LoRA."""
        names = known(concepts)
        if not names:
            given = ", ".join(concepts) or "none"
            remedy = f"Write --loras with some of: {', '.join(_all())}."
            raise UsageError("suite emoji", f"it is for the embedded LoRAs, and the given ones are: {given}", remedy)
        return [CONCEPTS, *(task for task, size in _SIZE.items() if size <= len(names))]

    def scenes(self, task: str, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[Scene]:
        """The scenes of one task; they depend only on the task, the split and the set of LoRAs."""
        names = known(concepts)
        part = "" if self.split == "test" else f"/{self.split}"
        rng = random.Random(f"mole emoji 1{part}/{task}/{','.join(names)}")
        if task == CONCEPTS:
            return [_scene(task, number, (name,), rng) for name in names for number in range(ALONE)]
        return [_scene(task, number, loras, rng) for number, loras in enumerate(_dealt(names, _SIZE[task], rng))]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Metric names, the main one first."""
        return SUITES[self.name].metrics

    def pictures(self, lora: str, data_dir: str | None = None) -> str | None:
        """The folder in the package with the training pictures of the LoRA."""
        return str(EMOJI / lora) if lora in _all() else None


def known(loras: Mapping[str, Concept | None] | Sequence[str]) -> tuple[str, ...]:
    """The `loras` that the suite knows, in the order of the suite."""
    return tuple(name for name in _all() if name in loras)


def _all() -> tuple[str, ...]:
    words = read_words()
    return (*words.concepts, words.style)


def _dealt(names: Sequence[str], size: int, rng: random.Random) -> list[tuple[str, ...]]:
    """SCENES sets of `size` names: each time those used least often so far, ties broken at random."""
    dealt: Counter[str] = Counter()
    sets = []
    for _ in range(SCENES):
        shuffled = _shuffled(names, rng)
        chosen = sorted(shuffled, key=lambda name: dealt[name])[:size]
        dealt.update(chosen)
        sets.append(tuple(_shuffled(chosen, rng)))
    return sets


def _scene(task: str, number: int, loras: tuple[str, ...], rng: random.Random) -> Scene:
    words = read_words()
    objects = [name for name in loras if name != words.style]
    styled = words.style if words.style in loras else ""
    # A style alone shows nothing: it is drawn on an object of the base.
    shown = objects or [_shuffled(words.objects, rng)[0]]
    phrase = _shuffled(words.phrases, rng)[0]
    elements = [Element("style", f"{name} style") if name == words.style else Element("object", name) for name in loras]
    return Scene(
        task,
        f"{number:02d} {' '.join(loras)}",
        caption(shown, phrase, styled),
        loras,
        tuple(elements),
        tuple(element.name for element in elements),
    )


def _shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    # Only random() gives the same sequence in every Python version.
    return [item for _, item in sorted((rng.random(), item) for item in items)]
