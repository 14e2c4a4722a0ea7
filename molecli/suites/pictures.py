"""The `pictures` suite: your own scenes, one JSONL file per task.

    {"prompt": "sks dog and zwx cat on the beach", "loras": ["dog", "cat"]}

Optional: `name`, unique among the scenes (by default their number), and `classes` that the embedded recogniser should
find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.protocols import Element, Scene
from molecli.suites._rows import Row, read_rows
from molecli.suites.jsonl import by_task

FIELDS = ("prompt", "loras", "name", "classes")


class PicturesSuite:
    """The given files; each is a task named by its stem."""

    name = "pictures"
    version = "1"

    def __init__(self, files: Mapping[str, str] | Sequence[str] | None = None) -> None:
        self.files = by_task(files or {})
        self._read: dict[str, list[Row]] = {}  # stdin can be read only once

    def tasks(self, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[str]:
        """The tasks of the files. Raises: UsageError if no file was given."""
        if not self.files:
            what = "no file of scenes was given"
            remedy = 'Write --files FILE.jsonl with lines {"prompt": ..., "loras": [...]}.'
            raise UsageError("suite pictures", what, remedy)
        return list(self.files)

    def scenes(self, task: str, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[Scene]:
        """The scenes of one file. Raises: UsageError that names the unusable file and line."""
        path = self.files[task]
        if path not in self._read:
            self._read[path] = read_rows(path)
        return [_scene(task, number, row, concepts) for number, row in enumerate(self._read[path])]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Both alignments, and first `recognised` if all scenes have classes."""
        rows = self._read.get(self.files[task], [])
        named = bool(rows) and all(row.fields.get("classes") for row in rows)
        return SUITES[self.name].metrics_of["named"] if named else SUITES[self.name].metrics

    def pictures(self, lora: str, data_dir: str | None = None) -> str | None:
        """None: the concept of a LoRA names its pictures."""
        return None


def _scene(task: str, number: int, row: Row, concepts: Mapping[str, Concept | None]) -> Scene:
    for field in row.fields:
        if field not in FIELDS:
            raise UsageError(row.where, f"unknown field {field!r}", f"There are: {', '.join(FIELDS)}.")
    loras = row.texts("loras")
    if not row.text("prompt").strip():
        raise UsageError(row.where, "the prompt is empty", "Write what to draw.")
    if len(set(loras)) < len(loras):
        raise UsageError(row.where, "a LoRA is named twice", "Name each one once.")
    name = row.text("name") if "name" in row.fields else f"{number:03d}"
    return Scene(task, name, row.text("prompt"), loras, elements_of(loras, concepts), row.texts("classes"))


def elements_of(loras: Sequence[str], concepts: Mapping[str, Concept | None]) -> tuple[Element, ...]:
    """The elements for a judge, one per LoRA: kind and trigger of its concept, else only its name."""
    found = [(name, concepts.get(name)) for name in loras]
    return tuple(
        Element("object", name) if concept is None else Element(concept.kind, name, (concept.trigger,))
        for name, concept in found
    )
