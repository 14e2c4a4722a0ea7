"""The suites: one row each, which names the class, in the order of messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from molecli.catalog.table import Table, load
from molecli.errors import UsageError, suggestion

# Keywords that a suite's class may accept: the user's `files`, the `scenes` of a recipe, a `split`.
Given = Literal["files", "scenes", "split"]


@dataclass(frozen=True)
class SuiteRow:
    """target: module:attribute of the class. holds: examples for language models, or scenes to draw.

    given: the keywords that its class accepts; other settings of the recipe are refused. metrics: of its tasks, the
    main one first; metrics_of: of special kinds of task.
    """

    name: str
    holds: Literal["texts", "scenes"]
    target: str
    given: tuple[Given, ...] = ()
    metrics: tuple[str, ...] = ()
    metrics_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def load(self, **given: Any) -> Any:
        """The suite, made with those of `given` that its class accepts."""
        return load(self.target)(**{key: given[key] for key in self.given if key in given})


_EXACT = ("exact_match", "exact_match_lorahub", "exact_match_lm_eval")
_ALIGNED = ("text_alignment", "image_alignment")

SUITES: Table[SuiteRow] = Table(
    "molecli.suites",
    SuiteRow,
    (
        SuiteRow("builtin", "texts", "molecli.suites.builtin:BuiltinSuite", metrics=("exact_match",)),
        SuiteRow("bbh", "texts", "molecli.suites.bbh:BbhSuite", metrics=_EXACT),
        SuiteRow("nli", "texts", "molecli.suites.nli:NliSuite", metrics=("exact_match", "accuracy", *_EXACT[1:])),
        SuiteRow(
            "instruction_induction",
            "texts",
            "molecli.suites.instruction_induction:InstructionInductionSuite",
            metrics=("exact_match", "exact_match_lm_eval", "exact_match_lorahub"),
            metrics_of={
                "label": ("exact_match", "accuracy", "exact_match_lm_eval", "exact_match_lorahub"),
                "set": ("set_match", "exact_match"),
                "free": ("f1", "exact_match", "rougeL"),
            },
        ),
        SuiteRow("translation", "texts", "molecli.suites.translation:TranslationSuite", metrics=("bleu",)),
        SuiteRow(
            "struct2text",
            "texts",
            "molecli.suites.struct2text:Struct2TextSuite",
            metrics=("rouge1", "rouge2", "rougeL"),
        ),
        SuiteRow(
            "cbqa",
            "texts",
            "molecli.suites.cbqa:CbqaSuite",
            metrics=("exact_match", "exact_match_lm_eval", "exact_match_lorahub"),
        ),
        SuiteRow("jsonl", "texts", "molecli.suites.jsonl:JsonlSuite", given=("files",), metrics=("exact_match",)),
        SuiteRow(
            "emoji",
            "scenes",
            "molecli.suites.emoji:EmojiSuite",
            given=("split",),
            metrics=("recognised", *_ALIGNED),
        ),
        SuiteRow(
            "dreambooth", "scenes", "molecli.suites.dreambooth:DreamboothSuite", given=("scenes",), metrics=_ALIGNED
        ),
        SuiteRow("composlora", "scenes", "molecli.suites.composlora:ComposLoraSuite", metrics=("text_alignment",)),
        SuiteRow(
            "pictures",
            "scenes",
            "molecli.suites.pictures:PicturesSuite",
            given=("files",),
            metrics=_ALIGNED,
            metrics_of={"named": ("recognised", *_ALIGNED)},
        ),
    ),
)
# The default suites on a language model and on a diffusion base, and the suites of the user's own files.
DEFAULT, DEFAULT_SCENES = "builtin", "emoji"
OWN_TEXTS, OWN_SCENES = "jsonl", "pictures"


def suite_names(holds: Literal["texts", "scenes"]) -> tuple[str, ...]:
    """The names of the suites of examples, or of scenes."""
    return tuple(name for name, row in SUITES.items() if row.holds == holds)


def suite_row(name: str, holds: Literal["texts", "scenes"]) -> SuiteRow:
    """The row of a suite of that kind. Raises: UsageError for an unknown name or the other kind."""
    if name not in SUITES:
        raise UsageError("--suite", f"no suite is called {name!r}", suggestion(name, suite_names(holds)))
    if SUITES[name].holds != holds:
        theirs = "scenes to draw" if holds == "texts" else "texts"
        base = "is a language model" if holds == "texts" else "draws pictures"
        what = f"the suite {name!r} has {theirs}, and the base {base}"
        raise UsageError("--suite", what, f"Write one of: {', '.join(suite_names(holds))}.")
    return SUITES[name]


def takers(given: Given, holds: Literal["texts", "scenes"]) -> str:
    """The first suite of that kind that accepts the keyword `given`."""
    return next(name for name in suite_names(holds) if given in SUITES[name].given)
