"""The `composlora` suite: the testbed of Multi-LoRA Composition (Zhong et al., arXiv 2402.16843), 480 sets of LoRAs.

A set has one character and at most one LoRA of each other kind. Tasks are a style and a size: "anime 2" to "anime 5",
"reality 2" to "reality 5". `data_dir` has the authors' anime_lora_info.json and reality_lora_info.json; the LoRAs must
have the ids in these files ("character_1"). The prompt is the opening of the style and all triggers of the set, that of
the character first, as in the authors' code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from molecli.catalog.suites import SUITES
from molecli.errors import MismatchError, UsageError
from molecli.protocols import Element, Scene

# The quality words that the authors' code puts before the triggers.
OPENINGS = {
    "anime": "masterpiece, best quality",
    "reality": "RAW photo, subject, 8k uhd, dslr, high quality, Fujifilm XT3, half-length portrait from knees up",
}
SIZES = (2, 3, 4, 5)
CHARACTER = "character"


@dataclass(frozen=True)
class Entry:
    """One LoRA of the testbed."""

    id: str
    kind: str
    name: str
    triggers: tuple[str, ...]


class ComposLoraSuite:
    """The sets of both styles. A base usually draws only one style, so name its tasks."""

    name = "composlora"
    version = "1"

    def tasks(self, concepts: Mapping[str, Any], data_dir: str | None) -> list[str]:
        """The styles and sizes of all existing files. Raises: UsageError without a folder or file."""
        if data_dir is None:
            what = "it reads its lists of LoRAs from a folder, and none is given"
            raise UsageError("suite composlora", what, "Write --data-dir DIR with the testbed's *_lora_info.json.")
        if not Path(data_dir).is_dir():
            raise UsageError(str(data_dir), "no such folder", "Check --data-dir.")
        found = [style for style in OPENINGS if _file(style, data_dir).is_file()]
        if not found:
            names = " or ".join(_file(style, data_dir).name for style in OPENINGS)
            raise UsageError(str(data_dir), f"it has no {names}", "Give --data-dir the folder of the testbed.")
        return [f"{style} {size}" for style in found for size in SIZES]

    def scenes(self, task: str, concepts: Mapping[str, Any], data_dir: str | None) -> list[Scene]:
        """The sets of one style and size. Raises: MismatchError for a list that cannot be read."""
        style, size = task.split()
        entries = read_entries(_file(style, str(data_dir)))
        return [_scene(task, OPENINGS[style], chosen) for chosen in sets(entries, int(size))]

    def metrics(self, task: str) -> tuple[str, ...]:
        """The text alignment: the testbed has no pictures of what its LoRAs add."""
        return SUITES[self.name].metrics

    def pictures(self, lora: str, data_dir: str | None) -> str | None:
        """None: the testbed has no pictures."""
        return None


def sets(entries: Mapping[str, list[Entry]], size: int) -> list[tuple[Entry, ...]]:
    """All sets of `size` LoRAs of different kinds, one of them a character, in the order of the authors' code."""
    others = [kind for kind in entries if kind != CHARACTER]
    kinds = [(CHARACTER, *chosen) for chosen in combinations(others, size - 1)]
    return [chosen for some in kinds for chosen in product(*(entries[kind] for kind in some))]


def read_entries(file: Path) -> dict[str, list[Entry]]:
    """Kind -> its LoRAs, in the order of the file. Raises: MismatchError for a file that is damaged."""
    try:
        tree = json.loads(file.read_text("utf-8"))
        found = {
            kind: [Entry(row["id"], kind, row["name"], tuple(row["trigger"])) for row in rows]
            for kind, rows in tree.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it is not a list of LoRAs in the testbed's format ({type(error).__name__}: {error})"
        raise MismatchError(str(file), what, "Download it again.") from None
    if not found.get(CHARACTER):
        raise MismatchError(str(file), "it has no character, and every set needs one", "Download it again.")
    return found


def _file(style: str, data_dir: str) -> Path:
    return Path(data_dir) / f"{style}_lora_info.json"


def _scene(task: str, opening: str, chosen: tuple[Entry, ...]) -> Scene:
    triggers = [trigger for entry in chosen for trigger in entry.triggers]
    loras = tuple(entry.id for entry in chosen)
    elements = tuple(Element(entry.kind, entry.name, entry.triggers) for entry in chosen)
    return Scene(task, " ".join(loras), ", ".join([opening, *triggers]), loras, elements)
