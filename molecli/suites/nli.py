"""Natural language inference: nine datasets and the three rounds of ANLI with one prompt; the answer is the label.

Split: if `data_dir` has both files, train = <task>_train.jsonl and test = <task>_dev.jsonl. A task with only a dev file
is halved by a hash of the premise, so that all hypotheses of a premise are in the same half.
"""

from __future__ import annotations

from dataclasses import dataclass

from molecli.catalog.suites import SUITES
from molecli.protocols import Example, Source, Split
from molecli.suites._hub import HubSet, not_online
from molecli.suites._rows import Row, half_of, in_order, read_rows, task_files

THREE_WAY = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
_OURS = ("premise", "hypothesis")
_SENTENCES = ("sentence1", "sentence2")
_GLUE, _ANLI = "nyu-mll/glue", "facebook/anli"


@dataclass(frozen=True)
class NliTask:
    """One task: its labels, its public copy with the names of its two text fields, and their names in the prompt."""

    labels: tuple[str, ...]
    hub: HubSet | None = None
    texts: tuple[str, str] = _OURS
    question: str = "Does the premise entail the hypothesis?"
    names: tuple[str, str] = ("Premise", "Hypothesis")


TASKS: dict[str, NliTask] = {
    "rte": NliTask(TWO_WAY, HubSet(_GLUE, "rte", test="validation"), _SENTENCES),
    "wnli": NliTask(TWO_WAY, HubSet(_GLUE, "wnli", test="validation"), _SENTENCES),
    "sick": NliTask(THREE_WAY),
    "commitment_bank": NliTask(THREE_WAY, HubSet("aps/super_glue", "cb", test="validation")),
    "snli": NliTask(THREE_WAY, HubSet("stanfordnlp/snli")),
    "mnli": NliTask(THREE_WAY, HubSet(_GLUE, "mnli", test="validation_matched")),
    "mnli_mismatched": NliTask(THREE_WAY, HubSet(_GLUE, "mnli", test="validation_mismatched")),
    "qnli": NliTask(
        TWO_WAY,
        HubSet(_GLUE, "qnli", test="validation"),
        ("question", "sentence"),
        question="Does the sentence hold the answer to the question?",
        names=("Question", "Sentence"),
    ),
    "scitail": NliTask(TWO_WAY),
    "anli_r1": NliTask(THREE_WAY, HubSet(_ANLI, train="train_r1", test="test_r1")),
    "anli_r2": NliTask(THREE_WAY, HubSet(_ANLI, train="train_r2", test="test_r2")),
    "anli_r3": NliTask(THREE_WAY, HubSet(_ANLI, train="train_r3", test="test_r3")),
}


def prompt(task: str, premise: str, hypothesis: str) -> str:
    """The instruction with the labels to choose from, then the two texts."""
    row = TASKS[task]
    choices = f"{', '.join(row.labels[:-1])} or {row.labels[-1]}"
    first, second = row.names
    return f"{row.question} Answer {choices}.\n{first}: {premise}\n{second}: {hypothesis}\nAnswer:"


class NliSuite:
    """The NLI datasets from `data_dir` (premise, hypothesis, label) or the hub."""

    name = "nli"
    version = "1"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks with a dev file in `data_dir`; on the hub those with a public copy."""
        if data_dir is None:
            return [task for task, row in TASKS.items() if row.hub]
        return in_order(list(TASKS), (stem.removesuffix("_dev") for stem in task_files(data_dir, "*_dev.jsonl")))

    def known(self, data_dir: str | None = None) -> list[str]:
        """All tasks of the table."""
        return list(TASKS)

    def source(self, task: str, split: Split, data_dir: str | None = None) -> Source:
        """The file of the split, or the dev file for both; else the table on the hub."""
        if data_dir is None:
            return _hub(task).source(split)
        part = "train" if split == "train" and f"{task}_train" in task_files(data_dir) else "dev"
        return Source(f"{data_dir}/{task}_{part}.jsonl")

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError for bad files, RunError if the hub is not reached."""
        if data_dir is None:
            rows = _hub(task).rows(split, labels="label")
            return [_example(task, row, TASKS[task].texts) for row in rows]
        rows = read_rows(self.source(task, split, data_dir).place)
        if f"{task}_train" not in task_files(data_dir):
            rows = [row for row in rows if half_of(row.text("premise"), self.seed) == split]
        return [_example(task, row, _OURS) for row in rows]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Exact match of the label under each normaliser; accuracy ignores text after it."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for the longest label."""
        return 12


def _hub(task: str) -> HubSet:
    """The public copy of a task. Raises: UsageError if there is none."""
    found = TASKS[task].hub
    if found is None:
        raise not_online(NliSuite.name, task)
    return found


def _example(task: str, row: Row, texts: tuple[str, str]) -> Example:
    premise, hypothesis = (row.text(name) for name in texts)
    return Example(task, prompt(task, premise, hypothesis), row.text("label"))
