"""The `emoji` suite: compositions of the embedded LoRAs in scenes of the embedded image base.

    concepts            each LoRA alone, in two scenes
    2 LoRAs ... 5 LoRAs  ten scenes of so many different LoRAs: "a violin, an octopus and a teapot on sand by the sea"

Scenes are made of the LoRAs that are given; a task that needs more of them is left out. Every LoRA occurs equally
often in a task, up to one. A style is no object: it changes how the scene's objects are drawn. The split `train` has
other scenes of the same tasks, to choose settings on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

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
        """The tasks that the LoRAs suffice for. Raises: UsageError where none of them is an embedded one."""
        names = known(concepts)
        if not names:
            given = ", ".join(concepts) or "none"
            remedy = f"Write --loras with some of: {', '.join(_all())}."
            raise UsageError("suite emoji", f"it is made of embedded LoRAs, and those given are: {given}", remedy)
        return [CONCEPTS, *(task for task, size in _SIZE.items() if size <= len(names))]

    def scenes(self, task: str, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[Scene]:
        """The scenes of one task; they follow from the task, the split and the set of LoRAs alone."""
        names = known(concepts)
        part = "" if self.split == "test" else f"/{self.split}"
        rng = random.Random(f"mole emoji 1{part}/{task}/{','.join(names)}")
        if task == CONCEPTS:
            return [_scene(task, number, (name,), rng) for name in names for number in range(ALONE)]
        return [_scene(task, number, loras, rng) for number, loras in enumerate(_dealt(names, _SIZE[task], rng))]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Metric names, the main one first."""
        return ("recognised", "text_alignment", "image_alignment")

    def pictures(self, lora: str, data_dir: str | None = None) -> str | None:
        """The folder in the package that the LoRA was trained on."""
        return str(EMOJI / lora) if lora in _all() else None


def known(loras: Mapping[str, Concept | None] | Sequence[str]) -> tuple[str, ...]:
    """Those of `loras` that the suite knows, in its own order."""
    return tuple(name for name in _all() if name in loras)


def _all() -> tuple[str, ...]:
    words = read_words()
    return (*words.concepts, words.style)


def _dealt(names: Sequence[str], size: int, rng: random.Random) -> list[tuple[str, ...]]:
    """SCENES sets of `size` names: each time those that were dealt least often, ties broken by chance."""
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
    # A style alone has nothing to show: an object of the base wears it.
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
    # Only random() is promised to give the same sequence on every Python version.
    return [item for _, item in sorted((rng.random(), item) for item in items)]
