"""Translation: WMT'14 English-French, WMT'16 English-German and English-Romanian, each in both directions; BLEU.

Split: WMT's `test` (newstest2014, newstest2016), and the first 30,000 pairs of its `train`, as in FLAN.
A single local file is halved by its English side, so that both directions have the same split.
The prompt has the form of FLAN's (source and target language, the sentence), in our own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from molecli.catalog.suites import SUITES
from molecli.errors import UsageError
from molecli.protocols import Example
from molecli.suites._hub import HubSet
from molecli.suites._rows import Row
from molecli.suites._table_suite import TabledSuite

LANGUAGES = {"en": "English", "fr": "French", "de": "German", "ro": "Romanian"}
TRAIN_ROWS = 30_000
MAX_NEW_TOKENS = 256


def _wmt(year: int, pair: str) -> HubSet:
    # Up to 40 million pairs come with a test set of a few thousand: only rows that are read are fetched.
    return HubSet(f"wmt/wmt{year}", pair, stream=True, train_rows=TRAIN_ROWS)


@dataclass(frozen=True)
class TranslationTask:
    """One task: the codes of the source and target language, and the public copy of both directions."""

    source: str
    target: str
    hub: HubSet


TASKS: dict[str, TranslationTask] = {
    "wmt14_en-fr": TranslationTask("en", "fr", _wmt(14, "fr-en")),
    "wmt14_fr-en": TranslationTask("fr", "en", _wmt(14, "fr-en")),
    "wmt16_en-de": TranslationTask("en", "de", _wmt(16, "de-en")),
    "wmt16_de-en": TranslationTask("de", "en", _wmt(16, "de-en")),
    "wmt16_en-ro": TranslationTask("en", "ro", _wmt(16, "ro-en")),
    "wmt16_ro-en": TranslationTask("ro", "en", _wmt(16, "ro-en")),
}


def prompt(task: str, text: str) -> str:
    """The instruction with both languages, then the sentence."""
    source, target = LANGUAGES[TASKS[task].source], LANGUAGES[TASKS[task].target]
    return f"Translate {source} to {target}.\n{source}: {text}\n{target}:"


class TranslationSuite(TabledSuite):
    """The pairs from `data_dir` or the hub; a line is {"translation": {"en": ..., "fr": ...}}, or that object itself.

    {"input", "target"} lines are read too; `references` adds further right translations.
    """

    name = "translation"
    version = "1"

    hubs: ClassVar[Mapping[str, HubSet]] = {task: row.hub for task, row in TASKS.items()}

    def question(self, task: str, row: Row) -> str:
        """The English side, so that both directions have the same split."""
        return _english(task, row)

    def example(self, task: str, row: Row) -> Example:
        """The sentence and its translations."""
        return _example(task, row)

    def metrics(self, task: str) -> tuple[str, ...]:
        """BLEU of the whole set."""
        return SUITES[self.name].metrics

    def max_new_tokens(self, task: str) -> int:
        """Room for the longest sentence of the test sets, accented letters included."""
        return MAX_NEW_TOKENS


def _example(task: str, row: Row) -> Example:
    text, target = _texts(task, row)
    references = row.texts("references")
    return Example(task, prompt(task, text), target, tuple(dict.fromkeys((target, *references))) if references else ())


def _texts(task: str, row: Row) -> tuple[str, str]:
    """(the sentence, its translation) of a line in any supported form."""
    if "input" in row.fields:
        text, target = row.text("input"), row.text("target", "output")
    else:
        pair = row.inside("translation") if "translation" in row.fields else row
        text, target = pair.text(TASKS[task].source), pair.text(TASKS[task].target)
    if not text.strip() or not target.strip():
        raise UsageError(row.where, "one side of the translation is empty", "Leave that line out.")
    return text.strip(), target.strip()


def _english(task: str, row: Row) -> str:
    text, target = _texts(task, row)
    return text if TASKS[task].source == "en" else target
