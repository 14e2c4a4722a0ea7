"""The `builtin` suite: generated tasks on short sentences of real words, for the embedded base and its LoRAs.

A prompt names one skill, or two (the right one acts first), and a sentence of three to five words:

    french: old fox runs              vieux renard court      translate word by word
    reverse: old fox runs             runs fox old            last word first
    opposite: old fox runs            young fox runs          every adjective becomes its opposite
    plural: old fox runs              old foxes run           nouns and verbs in the plural
    double: old fox runs              old old fox fox runs runs
    reverse french: old fox runs      court renard vieux      two skills at once: a joint task

The embedded base knows other operations (copying, rotating, swapping, German, Spanish, reading French and plurals) but
none of these skills. Each built-in LoRA adds one of them and has its name. A joint task needs two LoRAs.

Sentences are drawn by seed. The split of a sentence follows from its words, so that no test sentence is in the training
data of any task, or of the base and the LoRAs (`tools/text_builtin.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256

from molecli.catalog.suites import SUITES
from molecli.protocols import Example, Split
from molecli.suites._builtin_words import ADJECTIVES, NOUNS, VERBS, rows

Words = tuple[str, ...]
Operation = Callable[[Words], Words]

_NOUNS, _VERBS, _ADJECTIVES = rows(NOUNS), rows(VERBS), rows(ADJECTIVES)
PLURAL = {row[0]: row[1] for row in _NOUNS + _VERBS}
FRENCH, GERMAN, SPANISH = (
    {row[0]: row[column] for row in _NOUNS + _VERBS} | {row[0]: row[column - 1] for row in _ADJECTIVES}
    for column in (2, 3, 4)
)
OPPOSITE = {one[0]: _ADJECTIVES[i ^ 1][0] for i, one in enumerate(_ADJECTIVES)}

_ROLES = {"n": [row[0] for row in _NOUNS], "v": [row[0] for row in _VERBS], "a": [row[0] for row in _ADJECTIVES]}
# Each pattern has an adjective, so that `opposite` changes something, and at least three words, so that order matters.
_PATTERNS = ("anv", "anvn", "nvan", "aanv", "anvan")
_TEST_SHARE = 8  # one sentence in eight


def translated(dictionary: dict[str, str]) -> Operation:
    """The word-by-word translation of a dictionary; other words stay."""
    return lambda words: tuple(dictionary.get(word, word) for word in words)


# In the order of the built-in LoRAs, which have these names: `--loras a,b,c` are the first three.
SKILLS: dict[str, Operation] = {
    "french": translated(FRENCH),
    "reverse": lambda words: words[::-1],
    "opposite": translated(OPPOSITE),
    "plural": translated(PLURAL),
    "double": lambda words: tuple(word for word in words for _ in range(2)),
}
JOINT_TASKS = ("reverse french", "reverse opposite", "reverse plural", "double french")
TRAIN_ROWS, TEST_ROWS = 512, 64


def sentence(rng: random.Random) -> Words:
    """One sentence of three to five different words, of either split."""
    # Only random() gives the same sequence in every Python version.
    words: list[str] = []
    for role in _PATTERNS[int(rng.random() * len(_PATTERNS))]:
        choices = [word for word in _ROLES[role] if word not in words]
        words.append(choices[int(rng.random() * len(choices))])
    return tuple(words)


def split_of(words: Words) -> Split:
    """The split of a sentence, in all tasks."""
    return "test" if sha256(" ".join(words).encode()).digest()[0] % _TEST_SHARE == 0 else "train"


def skills_of(task: str) -> tuple[str, ...]:
    """The skills (and built-in LoRAs) that a task needs."""
    return tuple(task.split())


def answer(task: str, words: Words) -> Words:
    """The right answer: the named skills applied from right to left."""
    for skill in reversed(skills_of(task)):
        words = SKILLS[skill](words)
    return words


@cache
def _generated(task: str, split: Split) -> tuple[Example, ...]:
    rng = random.Random(f"mole builtin 1/{task}/{split}")
    wanted = TRAIN_ROWS if split == "train" else TEST_ROWS
    found: dict[Words, None] = {}
    while len(found) < wanted:
        words = sentence(rng)
        if split_of(words) == split:
            found[words] = None
    return tuple(Example(task, f"{task}: {' '.join(words)}", " ".join(answer(task, words))) for words in found)


class BuiltinSuite:
    """The generated tasks; needs no data folder."""

    name = "builtin"
    version = "1"

    def tasks(self, data_dir: str | None = None) -> list[str]:
        """The single skills, then the joint tasks."""
        return [*SKILLS, *JOINT_TASKS]

    def tasks_for(self, loras: Sequence[str]) -> list[str]:
        """The tasks whose skills are all in `loras`; all tasks if there is none."""
        return [task for task in self.tasks() if set(skills_of(task)) <= set(loras)] or self.tasks()

    def known(self, data_dir: str | None = None) -> list[str]:
        """All tasks: they are generated."""
        return self.tasks()

    def source(self, task: str, split: Split, data_dir: str | None = None) -> None:
        """None: nothing is read."""

    def load(self, task: str, split: Split, data_dir: str | None = None) -> list[Example]:
        """The examples of one task. Raises: KeyError for a task that `tasks` does not list."""
        if task not in self.tasks():
            raise KeyError(task)
        return list(_generated(task, split))

    def metrics(self, task: str) -> tuple[str, ...]:
        """Metric names, the main one first."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for ten words and the end of the sentence."""
        return 11
