"""BIG-Bench Hard (Suzgun et al., 2022): 27 tasks, zero-shot, answered directly.

Split: the first five rows of a task are `train` (LoRAHub learns from five examples), the rest is `test`.
"""

from __future__ import annotations

from molecli.catalog.suites import SUITES
from molecli.protocols import Example, Source, Split
from molecli.suites._hub import HubSet
from molecli.suites._rows import in_order, read_rows, task_files

TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)
TRAIN_ROWS = 5
HUB = "lukaemon/bbh"
_ROOM = {"word_sorting": 128, "dyck_languages": 32}


def prompt(question: str) -> str:
    """The zero-shot prompt in FLAN's form, as in LoRAHub's experiments."""
    return f"Q: {question}\nA:"


class BbhSuite:
    """BIG-Bench Hard from `data_dir` (<task>.jsonl with input, target) or the hub."""

    name = "bbh"
    version = "1"

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks whose files are in `data_dir`; all 27 on the hub."""
        return list(TASKS) if data_dir is None else in_order(TASKS, task_files(data_dir))

    def known(self, data_dir: str | None = None) -> tuple[str, ...]:
        """All 27."""
        return TASKS

    def source(self, task: str, split: Split, data_dir: str | None = None) -> Source:
        """The file or hub table with both splits."""
        return HubSet(HUB, task).source("test") if data_dir is None else Source(f"{data_dir}/{task}.jsonl")

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError for bad files, RunError if the hub is not reached."""
        rows = HubSet(HUB, task).rows("test") if data_dir is None else read_rows(f"{data_dir}/{task}.jsonl")
        part = rows[:TRAIN_ROWS] if split == "train" else rows[TRAIN_ROWS:]
        return [Example(task, prompt(row.text("input")), row.text("target")) for row in part]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Exact match; also as in LoRAHub and lm-eval, because published scores use all of them."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for an option or a number; more for lists."""
        return _ROOM.get(task, 16)
