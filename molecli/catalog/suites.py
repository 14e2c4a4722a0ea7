"""The suites: one row each, naming the class that reads it, in the order that messages list them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from molecli.catalog.table import Table, load
from molecli.errors import UsageError, suggestion

# What a suite's class may be given, each a keyword: `files` of one's own, the `scenes` of a recipe, another `split`.
Given = Literal["files", "scenes", "split"]


@dataclass(frozen=True)
class SuiteRow:
    """target: module:attribute of the class. holds: examples for language models, or scenes to draw.

    given: what its class takes from the recipe; what is written and it does not take is refused.
    """

    name: str
    holds: Literal["texts", "scenes"]
    target: str
    given: tuple[Given, ...] = ()

    def load(self, **given: Any) -> Any:
        """The suite, its class given what it takes of `given`."""
        return load(self.target)(**{key: given[key] for key in self.given if key in given})


SUITES: Table[SuiteRow] = Table(
    "molecli.suites",
    SuiteRow,
    (
        SuiteRow("builtin", "texts", "molecli.suites.builtin:BuiltinSuite"),
        SuiteRow("bbh", "texts", "molecli.suites.bbh:BbhSuite"),
        SuiteRow("nli", "texts", "molecli.suites.nli:NliSuite"),
        SuiteRow("instruction_induction", "texts", "molecli.suites.instruction_induction:InstructionInductionSuite"),
        SuiteRow("translation", "texts", "molecli.suites.translation:TranslationSuite"),
        SuiteRow("struct2text", "texts", "molecli.suites.struct2text:Struct2TextSuite"),
        SuiteRow("cbqa", "texts", "molecli.suites.cbqa:CbqaSuite"),
        SuiteRow("jsonl", "texts", "molecli.suites.jsonl:JsonlSuite", given=("files",)),
        SuiteRow("emoji", "scenes", "molecli.suites.emoji:EmojiSuite", given=("split",)),
        SuiteRow("dreambooth", "scenes", "molecli.suites.dreambooth:DreamboothSuite", given=("scenes",)),
        SuiteRow("composlora", "scenes", "molecli.suites.composlora:ComposLoraSuite"),
        SuiteRow("pictures", "scenes", "molecli.suites.pictures:PicturesSuite", given=("files",)),
    ),
)
# What is meant where nothing is said: on a language model and on a diffusion base; and of files of one's own.
DEFAULT, DEFAULT_SCENES = "builtin", "emoji"
OWN_TEXTS, OWN_SCENES = "jsonl", "pictures"


def suite_names(holds: Literal["texts", "scenes"]) -> tuple[str, ...]:
    """The suites of examples, or those of scenes."""
    return tuple(name for name, row in SUITES.items() if row.holds == holds)


def suite_row(name: str, holds: Literal["texts", "scenes"]) -> SuiteRow:
    """The row of a suite of that kind. Raises: UsageError for an unknown one, and for one of the other kind."""
    if name not in SUITES:
        raise UsageError("--suite", f"no suite is called {name!r}", suggestion(name, suite_names(holds)))
    if SUITES[name].holds != holds:
        theirs = "scenes to draw" if holds == "texts" else "texts"
        base = "is a language model" if holds == "texts" else "draws pictures"
        what = f"the suite {name!r} has {theirs}, and the base {base}"
        raise UsageError("--suite", what, f"Write one of: {', '.join(suite_names(holds))}.")
    return SUITES[name]


def takers(given: Given, holds: Literal["texts", "scenes"]) -> str:
    """The first suite of that kind that takes it."""
    return next(name for name in suite_names(holds) if given in SUITES[name].given)
