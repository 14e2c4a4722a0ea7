"""Structured data to text: CommonGen, DART, E2E NLG and WebNLG; ROUGE-1, -2 and -L against all references.

Split: GEM's `train`, and as test its `validation`: the references of CommonGen's test are not public, and FLAN also
uses `validation`. A row of `train` has one text. For the test, rows with the same input become one example with all
their texts. A single local file is halved by its input.

The input is formatted as in FLAN (flan/tasks.py):

    common_gen   concepts joined by ", "                       field, look, stand
    dart         a triple's parts joined by " ", triples       Mars Hill College JOINED 1973; Mars Hill College LOCATION
                 by "; ", cells in brackets left out           Mars Hill, North Carolina
    e2e_nlg      each attribute as "name = value"              name = The Eagle, eatType = pub
    web_nlg      a triple's " | " as ", ", triples by "; ",    Aarhus Airport, cityServed, Aarhus
                 underscores as spaces

The prompt has the form of FLAN's (an instruction, the data, what to write), in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.protocols import Example, Split
from molecli.suites._hub import HubSet
from molecli.suites._rows import Row
from molecli.suites._table_suite import TabledSuite

MAX_NEW_TOKENS = 128
_CELL = re.compile(r"\[[^\]]*\]")


def _concepts(row: Row) -> str:
    return ", ".join(row.texts("concepts"))


def _triples(row: Row) -> str:
    """DART's triples. Raises: UsageError if they are not lists of texts."""
    triples = row.fields["tripleset"]
    for triple in triples if isinstance(triples, list) else (None,):
        if not isinstance(triple, list) or not all(isinstance(part, str) for part in triple):
            what = "the field 'tripleset' is not a list of triples"
            raise UsageError(row.where, what, 'Write [["subject", "relation", "object"], ...].')
    text = "; ".join(" ".join(triple) for triple in triples)
    return " ".join(_CELL.sub("", text).split())


def _meaning(row: Row) -> str:
    return row.text("meaning_representation").replace("[", " = ").replace("]", "")


def _statements(row: Row) -> str:
    return "; ".join(row.texts("input")).replace("_", " ").replace(" | ", ", ")


@dataclass(frozen=True)
class StructTask:
    """One task: the field with the data, how it is formatted, and the words of the prompt."""

    field: str
    write: Callable[[Row], str]
    instruction: str
    names: tuple[str, str]
    hub: HubSet


def _gem(config: str) -> HubSet:
    return HubSet("GEM/gem", config, test="validation", parquet=True)


TASKS: dict[str, StructTask] = {
    "common_gen": StructTask(
        "concepts",
        _concepts,
        "Write one sentence about everyday life that uses all of these words.",
        ("Words", "Sentence"),
        _gem("common_gen"),
    ),
    "dart": StructTask("tripleset", _triples, "Put these facts into words.", ("Facts", "Text"), _gem("dart")),
    "e2e_nlg": StructTask(
        "meaning_representation",
        _meaning,
        "Describe the restaurant that has these properties.",
        ("Properties", "Description"),
        _gem("e2e_nlg"),
    ),
    "web_nlg": StructTask("input", _statements, "Put these facts into words.", ("Facts", "Text"), _gem("web_nlg_en")),
}


def prompt(task: str, data: str) -> str:
    """The instruction, then the data."""
    row = TASKS[task]
    return f"{row.instruction}\n{row.names[0]}: {data}\n{row.names[1]}:"


class Struct2TextSuite(TabledSuite):
    """The tasks from `data_dir` or the hub, with GEM's fields; {"input", "target"} lines of plain text are read too."""

    name = "struct2text"
    version = "1"

    hubs: ClassVar[Mapping[str, HubSet]] = {task: row.hub for task, row in TASKS.items()}

    def question(self, task: str, row: Row) -> str:
        """The formatted data."""
        return data_of(task, row)

    def example(self, task: str, row: Row) -> Example:
        """The data and one description."""
        return _example(task, row)

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task; in the test one per input, with all its descriptions."""
        examples = super().load(task, split, data_dir)
        return examples if split == "train" else merged(examples)

    def metrics(self, task: str) -> tuple[str, ...]:
        """ROUGE-1, ROUGE-2 and ROUGE-L."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for the longest description."""
        return MAX_NEW_TOKENS


def data_of(task: str, row: Row) -> str:
    """The formatted data of a row. Raises: UsageError if they are missing or empty."""
    field = TASKS[task].field
    if isinstance(row.fields.get("input"), str):
        text = row.text("input")
    elif field in row.fields:
        text = TASKS[task].write(row)
    else:
        raise UsageError(row.where, f"the field {field!r} is missing", "Every line needs it.")
    if not text.strip():
        raise UsageError(row.where, f"the field {field!r} is empty", "Leave that line out.")
    return text.strip()


def _example(task: str, row: Row) -> Example:
    target, references = row.text("target"), row.texts("references")
    return Example(task, prompt(task, data_of(task, row)), target, tuple(dict.fromkeys((target, *references))))


def merged(examples: Iterable[Example]) -> list[Example]:
    """The examples with equal prompts merged at the place of the first, with all their texts as references."""
    found: dict[str, Example] = {}
    for example in examples:
        first = found.get(example.prompt, example)
        found[example.prompt] = replace(first, references=tuple(dict.fromkeys((*first.answers, *example.answers))))
    return list(found.values())
