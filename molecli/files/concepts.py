"""concept.json next to a LoRA: what the LoRA adds, the prompt of its pictures, and its trigger words.

Concept          one LoRA's entry
read_concept     from the folder or file of the LoRA; None without a concept.json
write_concept    to the folder of the LoRA
trigger_of       the trigger words, found in the prompts
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from molecli.errors import MismatchError, suggestion
from molecli.files.atomic import write_text
from molecli.protocols import ElementKind

CONCEPT_FILE = "concept.json"
KINDS: tuple[str, ...] = get_args(ElementKind)
_NEEDED = ("name", "prompt")
_KEYS = ("name", "kind", "prompt", "trigger", "pictures")
# The opening of a prompt before its subject: "a photo of a ", "an image in the style of ".
_OPENING = re.compile(
    r"^(?:an?\s+|the\s+)?(?:\w+\s+)?(?:photo(?:graph)?|picture|image|drawing|painting|illustration|rendering)\s+"
    r"(?:of\s+|in\s+(?:the\s+style\s+of\s+)?)",
    re.IGNORECASE,
)
# Words to drop at the end of shared words, where the prompts begin to differ: "an octopus on a" white, "... on" grass.
_LOOSE_END = re.compile(r"(?:\s+(?:an?|the|and|on|in|at|by|of|with|under|near|over|beside))+$", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the|one)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Concept:
    """What a LoRA adds. `pictures` is the folder of its pictures, absolute once read, or None."""

    name: str
    prompt: str
    trigger: str
    kind: str = "object"
    pictures: str | None = None


def read_concept(source: str | Path) -> Concept | None:
    """The concept next to the LoRA at `source` (its folder, or a file in it); None without a concept.json.

    Raises: MismatchError for a file that is damaged or lacks a key.
    """
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / CONCEPT_FILE
    if not file.is_file():
        return None
    tree = _checked(file, _mapping(file))
    pictures = tree.get("pictures")
    return Concept(
        name=tree["name"],
        prompt=tree["prompt"],
        trigger=tree.get("trigger") or trigger_of([tree["prompt"]]),
        kind=tree.get("kind") or "object",
        pictures=None if pictures is None else str((file.parent / pictures).resolve()),
    )


def write_concept(folder: str | Path, concept: Concept) -> Path:
    """Writes `concept` and returns the file. The path of the pictures is relative if they are in the same folder."""
    folder = Path(folder)
    tree = asdict(concept)
    if concept.pictures is not None:
        pictures, here = Path(concept.pictures).expanduser().resolve(), folder.resolve()
        inside = pictures.is_relative_to(here)
        tree["pictures"] = (pictures.relative_to(here) if inside else pictures).as_posix()
    ordered = {key: tree[key] for key in _KEYS}
    return write_text(folder / CONCEPT_FILE, json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")


def trigger_of(prompts: Sequence[str]) -> str:
    """The words that all prompts share, without the opening: "a photo of sks dog" -> "sks dog".

    If the prompts share no word: the subject of the first one.
    """
    words = [prompt.split() for prompt in prompts]
    shared = " ".join(_longest_common(words)) if len(set(prompts)) > 1 else prompts[0].strip()
    return _subject(shared) or _subject(prompts[0].strip()) or prompts[0].strip()


def _subject(text: str) -> str:
    return _ARTICLE.sub("", _LOOSE_END.sub("", _OPENING.sub("", text))).strip(" .,;:")


def _longest_common(rows: Sequence[Sequence[str]]) -> list[str]:
    """The longest sequence of words that is in every row; of equally long ones the first."""
    first = list(rows[0])
    for length in range(len(first), 0, -1):
        for start in range(len(first) - length + 1):
            run = first[start : start + length]
            if all(_holds(row, run) for row in rows[1:]) and _subject(" ".join(run)):
                return run
    return []


def _holds(row: Sequence[str], run: Sequence[str]) -> bool:
    return any(list(row[i : i + len(run)]) == list(run) for i in range(len(row) - len(run) + 1))


def _mapping(file: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not valid JSON"
        raise MismatchError(str(file), f"it cannot be read ({reason})", "Correct or remove it.") from None
    if not isinstance(tree, dict):
        raise MismatchError(str(file), "it is not a JSON object", "Correct or remove it.")
    return tree


def _checked(file: Path, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in tree:
        if key not in _KEYS:
            raise MismatchError(str(file), f"unknown key {key!r}", suggestion(key, _KEYS))
    for key in _NEEDED:
        if not tree.get(key):
            raise MismatchError(str(file), f"the key {key!r} is missing or empty", "Write it.")
    for key, value in tree.items():
        if value is not None and not isinstance(value, str):
            raise MismatchError(str(file), f"{key} is {value!r}, not text", "Write it in quotes.")
    if tree.get("kind") not in (None, *KINDS):
        raise MismatchError(str(file), f"there is no kind {tree['kind']!r}", suggestion(tree["kind"], KINDS))
    return tree
