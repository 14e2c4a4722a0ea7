"""Natural language inference: eight data sets (and ANLI from the hub) under one prompt; the answer is the label.

Split: where `data_dir` has both files, train = <task>_train.jsonl and test = <task>_dev.jsonl. A task with a dev file
alone is halved by a hash of the premise, so that one premise's hypotheses never stand on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from molecli.protocols import Example, Split
from molecli.suites.lines import Row, in_order, read_rows, task_files
from molecli.suites.online import hub_rows, not_online

THREE_WAY = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")


@dataclass(frozen=True)
class Hub:
    """A task's public copy: dataset, config, the splits to read as train and test, the names of its two texts."""

    dataset: str
    config: str | None
    train: str = "train"
    test: str = "validation"
    texts: tuple[str, str] = ("premise", "hypothesis")


@dataclass(frozen=True)
class NliTask:
    """One row of the table: its labels, what its two texts are called, and where its public copy is."""

    labels: tuple[str, ...]
    hub: Hub | None = None
    question: str = "Does the premise entail the hypothesis?"
    names: tuple[str, str] = ("Premise", "Hypothesis")


TASKS: dict[str, NliTask] = {
    "rte": NliTask(TWO_WAY, Hub("nyu-mll/glue", "rte", texts=_SENTENCES)),
    "wnli": NliTask(TWO_WAY, Hub("nyu-mll/glue", "wnli", texts=_SENTENCES)),
    "sick": NliTask(THREE_WAY),
    "commitment_bank": NliTask(THREE_WAY, Hub("aps/super_glue", "cb")),
    "snli": NliTask(THREE_WAY, Hub("stanfordnlp/snli", None, test="test")),
    "mnli": NliTask(THREE_WAY, Hub("nyu-mll/glue", "mnli", test="validation_matched")),
    "qnli": NliTask(
        TWO_WAY,
        Hub("nyu-mll/glue", "qnli", texts=("question", "sentence")),
        question="Does the sentence hold the answer to the question?",
        names=("Question", "Sentence"),
    ),
    "scitail": NliTask(TWO_WAY),
    "anli_r1": NliTask(THREE_WAY, Hub("facebook/anli", None, train="train_r1", test="test_r1")),
    "anli_r2": NliTask(THREE_WAY, Hub("facebook/anli", None, train="train_r2", test="test_r2")),
    "anli_r3": NliTask(THREE_WAY, Hub("facebook/anli", None, train="train_r3", test="test_r3")),
}


def prompt(task: str, premise: str, hypothesis: str) -> str:
    """The instruction with the labels to choose from, then the two texts."""
    row = TASKS[task]
    choices = f"{', '.join(row.labels[:-1])} or {row.labels[-1]}"
    first, second = row.names
    return f"{row.question} Answer {choices}.\n{first}: {premise}\n{second}: {hypothesis}\nAnswer:"


def half_of(premise: str, seed: int = 0) -> Split:
    """The side of the split that a premise falls on; the same on every machine."""
    return "train" if sha256(f"{seed}/{premise}".encode()).digest()[0] % 2 == 0 else "test"


class NliSuite:
    """The NLI data sets from `data_dir` (premise, hypothesis, label) or the hub."""

    name = "nli"
    version = "1"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The tasks with a dev file in `data_dir`; on the hub those with a public copy."""
        if data_dir is None:
            return [task for task, row in TASKS.items() if row.hub]
        return in_order(list(TASKS), (stem.removesuffix("_dev") for stem in task_files(data_dir, "*_dev.jsonl")))

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: UsageError for bad files, RunError where the hub is out of reach."""
        if data_dir is None:
            return self._from_hub(task, split)
        texts = ("premise", "hypothesis")
        if f"{task}_train" in task_files(data_dir):
            file = f"{data_dir}/{task}_{'train' if split == 'train' else 'dev'}.jsonl"
            return [_example(task, row, texts) for row in read_rows(file)]
        rows = read_rows(f"{data_dir}/{task}_dev.jsonl")
        return [_example(task, row, texts) for row in rows if half_of(row.text("premise"), self.seed) == split]

    def metrics(self, task: str) -> tuple[str, ...]:
        """Exact match of the label; accuracy forgives what follows it."""
        return ("exact_match", "accuracy")

    def max_new_tokens(self, task: str) -> int:
        """Room for the longest label."""
        return 12

    def _from_hub(self, task: str, split: Split) -> list[Example]:
        hub = TASKS[task].hub
        if hub is None:
            raise not_online(self.name, task)
        rows = hub_rows(hub.dataset, hub.config, hub.train if split == "train" else hub.test, labels="label")
        return [_example(task, row, hub.texts) for row in rows]


def _example(task: str, row: Row, texts: tuple[str, str]) -> Example:
    premise, hypothesis = (row.text(name) for name in texts)
    return Example(task, prompt(task, premise, hypothesis), row.text("label"))
