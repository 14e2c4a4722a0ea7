"""Instruction induction (Honovich et al., 2022): 22 small text tasks.

Several tasks share their inputs (letters_list, first_word_letter, the translations). To distinguish them, every prompt
begins with an instruction, in our own words. All answers in the files are right: every possible translation, every
common concept; the members of a set in any order (`set_match`).
Metrics follow the paper, section 4: exact set for the two set tasks, F1 for the two free ones, else exact match.
Departs: the paper scores after lower-casing and removing punctuation; that is `exact_match_lm_eval` here, and plain
`exact_match` comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

from molecli.catalog.suites import SUITES
from molecli.protocols import Example, Source, Split
from molecli.suites._hub import web_json
from molecli.suites._rows import Row, in_order, read_rows, rows_of, task_files

# The authors' repository at a fixed commit; `induce` is for training, `execute` is held out.
WEB = "https://raw.githubusercontent.com/orhonovich/instruction-induction/f470bba158ac0f6afc382354cb224416b0c06049"


@dataclass(frozen=True)
class InductionTask:
    """One task. `scored_as`: its kind in `metrics_of` of the suite's row. `max_new_tokens` leaves room for the longest
    answer, letter by letter if necessary."""

    instruction: str
    scored_as: str = ""
    max_new_tokens: int = 16


TASKS: dict[str, InductionTask] = {
    "active_to_passive": InductionTask("Rewrite the sentence in the passive voice.", max_new_tokens=32),
    "antonyms": InductionTask("Write a word that means the opposite."),
    "cause_and_effect": InductionTask(
        "One sentence is the cause of the other. Write the sentence that is the cause.", max_new_tokens=48
    ),
    "common_concept": InductionTask("Write what these things have in common.", "free"),
    "diff": InductionTask("Subtract the second number from the first."),
    "first_word_letter": InductionTask("Write the first letter of the word.", max_new_tokens=4),
    "informal_to_formal": InductionTask("Rewrite the sentence in formal language.", "free", 32),
    "larger_animal": InductionTask("Write the larger of the two animals."),
    "letters_list": InductionTask("Spell the word: write its letters with spaces between them.", max_new_tokens=40),
    "negation": InductionTask("Rewrite the sentence so that it says the opposite, using not.", max_new_tokens=64),
    "num_to_verbal": InductionTask("Write the number in English words.", max_new_tokens=32),
    "orthography_starts_with": InductionTask(
        "Write all words of the sentence that start with the letter in brackets.", "set", 24
    ),
    "second_word_letter": InductionTask("Write the second letter of the word.", max_new_tokens=4),
    "sentence_similarity": InductionTask(
        "How similar in meaning are the two sentences? Answer 0 - definitely not, 1 - probably not, 2 - possibly, "
        "3 - probably, 4 - almost perfectly or 5 - perfectly.",
        "label",
    ),
    "sentiment": InductionTask("Is the opinion of the film positive or negative?", "label", max_new_tokens=8),
    "singular_to_plural": InductionTask("Write the plural of the noun."),
    "sum": InductionTask("Add the two numbers."),
    "synonyms": InductionTask("Write a word that means the same."),
    "taxonomy_animal": InductionTask("Write only the animals of the list.", "set", 40),
    "translation_en-de": InductionTask("Translate the English word into German.", max_new_tokens=24),
    "translation_en-es": InductionTask("Translate the English word into Spanish.", max_new_tokens=24),
    "translation_en-fr": InductionTask("Translate the English word into French.", max_new_tokens=24),
}


def prompt(task: str, text: str) -> str:
    """The task's instruction, then the input."""
    return f"{TASKS[task].instruction}\nInput: {text}\nOutput:"


class InstructionInductionSuite:
    """The tasks from `data_dir` (train/<task>.jsonl, test/<task>.jsonl) or the authors' repository."""

    name = "instruction_induction"
    version = "1"

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks whose test files are in `data_dir`; all 22 online."""
        return list(TASKS) if data_dir is None else in_order(list(TASKS), task_files(f"{data_dir}/test"))

    def known(self, data_dir: str | None = None) -> list[str]:
        """All 22."""
        return list(TASKS)

    def source(self, task: str, split: Split, data_dir: str | None = None) -> Source:
        """The split's file, here or in the authors' repository."""
        return Source(_address(task, split), online=True) if data_dir is None else Source(_file(task, split, data_dir))

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError for bad files, RunError if the web is not reached."""
        rows = _web_rows(task, split) if data_dir is None else read_rows(_file(task, split, data_dir))
        read = _READERS.get(task, _plain)
        return [read(task, row) for row in rows]

    def metrics(self, task: str) -> tuple[str, ...]:
        """The task's metrics, the main one first."""
        row = SUITES[self.name]
        return row.metrics_of.get(TASKS[task].scored_as, row.metrics)

    def max_new_tokens(self, task: str) -> int:
        """Room for the task's longest answer."""
        return TASKS[task].max_new_tokens


def _plain(task: str, row: Row) -> Example:
    # The authors' files use the names "informal" and "formal", and have a blank after some sentences.
    text, target = row.text("input", "informal").strip(), row.text("output", "formal").strip()
    others = tuple(other.strip() for other in row.texts("possible_translations"))
    return Example(task, prompt(task, text), target, tuple(dict.fromkeys((target, *others))) if others else ())


def _cause(task: str, row: Row) -> Example:
    cause, effect = row.text("cause"), row.text("effect")
    # In either order, decided by the pair itself: if the cause were always first, copying would be enough.
    swap = sha256(f"{cause}/{effect}".encode()).digest()[0] % 2
    first, second = (effect, cause) if swap else (cause, effect)
    return Example(task, prompt(task, f"Sentence 1: {first} Sentence 2: {second}"), cause)


def _concept(task: str, row: Row) -> Example:
    target, accepted = row.text("concept"), row.texts("all_common_concepts")
    references = tuple(dict.fromkeys((target, *accepted)))
    return Example(task, prompt(task, ", ".join(row.texts("items"))), target, references)


_READERS: dict[str, Callable[[str, Row], Example]] = {"cause_and_effect": _cause, "common_concept": _concept}


@cache
def _web_rows(task: str, split: Split) -> list[Row]:
    address = _address(task, split)
    return rows_of(address, web_json(address)["examples"].values())


def _address(task: str, split: Split) -> str:
    return f"{WEB}/data/raw/{'induce' if split == 'train' else 'execute'}/{task}.json"


def _file(task: str, split: Split, data_dir: str) -> str:
    return f"{data_dir}/{split}/{task}.jsonl"
