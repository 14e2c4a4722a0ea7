"""The `pictures` suite: scenes of one's own, a JSONL file a task.

    {"prompt": "sks dog and zwx cat on the beach", "loras": ["dog", "cat"]}

Optional: `name`, which tells scenes apart (their number when missing), and `classes`, which the embedded recogniser
should find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.protocols import Element, Scene
from molecli.suites._rows import Row, read_rows
from molecli.suites.jsonl import by_task

FIELDS = ("prompt", "loras", "name", "classes")


class PicturesSuite:
    """The given files, each a task called after its stem."""

    name = "pictures"
    version = "1"

    def __init__(self, files: Mapping[str, str] | Sequence[str] | None = None) -> None:
        self.files = by_task(files or {})
        self._read: dict[str, list[Row]] = {}  # stdin can be read only once

    def tasks(self, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[str]:
        """The files' task names. Raises: UsageError where no file was given."""
        if not self.files:
            what = "no file of scenes was given"
            remedy = 'Write --files FILE.jsonl with lines {"prompt": ..., "loras": [...]}.'
            raise UsageError("suite pictures", what, remedy)
        return list(self.files)

    def scenes(self, task: str, concepts: Mapping[str, Concept | None], data_dir: str | None = None) -> list[Scene]:
        """The scenes of one file. Raises: UsageError naming the file and line that cannot be used."""
        path = self.files[task]
        if path not in self._read:
            self._read[path] = read_rows(path)
        return [_scene(task, number, row, concepts) for number, row in enumerate(self._read[path])]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Both alignments; before them what is recognised, where every scene says what that should be."""
        rows = self._read.get(self.files[task], [])
        named = bool(rows) and all(row.fields.get("classes") for row in rows)
        return (*(("recognised",) if named else ()), "text_alignment", "image_alignment")

    def pictures(self, lora: str, data_dir: str | None = None) -> str | None:
        """None: a LoRA's own concept says where its pictures are."""
        return None


def _scene(task: str, number: int, row: Row, concepts: Mapping[str, Concept | None]) -> Scene:
    for field in row.fields:
        if field not in FIELDS:
            raise UsageError(row.where, f"unknown field {field!r}", f"There are: {', '.join(FIELDS)}.")
    loras = row.texts("loras")
    if not row.text("prompt").strip():
        raise UsageError(row.where, "the prompt is empty", "Write what is to be drawn.")
    if len(set(loras)) < len(loras):
        raise UsageError(row.where, "a LoRA is named twice", "Name each one once.")
    name = row.text("name") if "name" in row.fields else f"{number:03d}"
    return Scene(task, name, row.text("prompt"), loras, elements_of(loras, concepts), row.texts("classes"))


def elements_of(loras: Sequence[str], concepts: Mapping[str, Concept | None]) -> tuple[Element, ...]:
    """What a judge is told of each LoRA: the kind and the words of its concept, else its name alone."""
    found = [(name, concepts.get(name)) for name in loras]
    return tuple(
        Element("object", name) if concept is None else Element(concept.kind, name, (concept.trigger,))
        for name, concept in found
    )
