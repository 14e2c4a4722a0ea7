"""The judge's part of `mole evaluate`: every method's pictures against the baseline's, pair by pair.

    Case          a scene and number that every method drew    check_judge   finds mistakes before a picture is drawn
    pair_up       cases and pictures -> pairs                  run_judge     pairs -> JudgeReport: the whole step

Each verdict is appended to judgements.jsonl when it arrives, with the raw answers. A run that finds such a file reuses
the verdicts about the same pictures, question, model and options, and asks only for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.errors import RunError, UsageError, suggestion
from molecli.files.atomic import append_jsonl, write_text
from molecli.metrics.judge.client import read_key
from molecli.metrics.judge.pair import Failure, Judgement, Pair, Reply, Verdict
from molecli.metrics.judge.parse import DIMENSIONS, Scores
from molecli.metrics.judge.prompt import VERSION
from molecli.metrics.judge.run import judge_pairs
from molecli.metrics.judge.summary import Matchup, matchups
from molecli.protocols import Element, Progress

if TYPE_CHECKING:
    from molecli.config.judge import JudgeConfig

JUDGEMENTS_FILE = "judgements.jsonl"
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Case:
    """A picture that every method drew. `task` is its row in the results; `name` is unique within the task."""

    task: str
    name: str
    elements: tuple[Element, ...]


@dataclass(frozen=True)
class JudgeReport:
    """All verdicts, in the order of the pairs, and the matchups that they add up to."""

    config: JudgeConfig
    verdicts: tuple[Verdict, ...]
    matchups: tuple[Matchup, ...]

    def document(self) -> dict[str, Any]:
        """The judge's entry in results.json."""
        failures = [verdict for verdict in self.verdicts if isinstance(verdict, Failure)]
        return {
            "endpoint": self.config.endpoint,
            "model": self.config.model,
            "options": self.config.options,
            "baseline": self.config.baseline,
            "prompt_version": VERSION,
            "pairs": len(self.verdicts),
            "contests": [asdict(matchup) for matchup in self.matchups],
            "failed": [{**_names(f.pair), "cause": f.cause, "reason": f.reason} for f in failures],
        }

    def lines(self) -> list[str]:
        """The matchups, one per line, for a terminal."""
        return [str(matchup) for matchup in self.matchups]


def check_judge(config: JudgeConfig, methods: Sequence[str]) -> None:
    """Raises: UsageError if the key is missing, or if the baseline is not among the methods or is the only one."""
    read_key(config)
    if config.baseline not in methods:
        what = f"the baseline {config.baseline!r} is not among the methods"
        raise UsageError("judge.baseline", what, suggestion(config.baseline, methods))
    if len(set(methods)) < 2:
        raise UsageError("judge.baseline", f"{config.baseline} has nothing to be compared with", "Add --modes.")


def pair_up(cases: Sequence[Case], drawn: Mapping[str, Sequence[Path | None]], baseline: str) -> list[Pair]:
    """Every other method's picture of each case, with the baseline's. `drawn` has a picture, or None, for each case.

    Raises: ValueError if a method does not have one entry per case, or if two cases of a task have the same name.
    """
    if len({(case.task, case.name) for case in cases}) < len(cases):
        raise ValueError("two cases of a task have the same name")
    return [
        Pair(case.task, case.name, method, baseline, case.elements, picture, other)
        for method, pictures in drawn.items()
        if method != baseline
        for case, picture, other in zip(cases, pictures, drawn[baseline], strict=True)
    ]


def run_judge(
    config: JudgeConfig,
    pairs: Sequence[Pair],
    folder: str | Path,
    *,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> JudgeReport:
    """The report on `pairs`. judgements.jsonl in `folder` holds every verdict, and is put in order at the end.

    Raises: RunError if the endpoint is down or no pair could be judged; finished verdicts stay in the file.
    """
    path = Path(folder) / JUDGEMENTS_FILE
    earlier = read_judgements(path)
    if earlier:  # drops a line that was cut off when a run was killed: the next one would be joined to it
        _write(path, list(earlier.values()))

    def finished(verdict: Verdict) -> None:
        # A verdict that is reused is in the file already.
        if not (isinstance(verdict, Judgement) and _same(earlier.get(verdict.pair.key), verdict)):
            append_jsonl(path, _row(verdict))

    def shown(done: int, total: int) -> None:
        if progress is not None:
            progress("judge", done, total)

    try:
        verdicts = judge_pairs(pairs, config, earlier=earlier, finished=finished, progress=shown)
    except RunError as error:
        if not read_judgements(path):
            raise
        remedy = f"{error.remedy} The finished verdicts are kept in {path}; --resume asks for the rest."
        raise RunError(error.where, error.what, remedy.strip()) from None
    _write(path, verdicts)
    return JudgeReport(config, tuple(verdicts), tuple(matchups(verdicts, samples=samples, seed=seed)))


def read_judgements(path: Path) -> dict[Key, Judgement]:
    """The judgements in a file, by pair; incomplete and invalid lines are skipped."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            judgement = _judgement(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        found[judgement.pair.key] = judgement
    return found


def _write(path: Path, verdicts: Sequence[Verdict]) -> None:
    write_text(path, "".join(json.dumps(_row(verdict), ensure_ascii=False) + "\n" for verdict in verdicts))


def _same(one: Judgement | None, other: Judgement) -> bool:
    return one is not None and (one.fingerprint, one.replies) == (other.fingerprint, other.replies)


def _names(pair: Pair) -> dict[str, str]:
    return {"task": pair.task, "case": pair.case, "method": pair.method, "baseline": pair.baseline}


def _row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON. A reply's `scores` are in the order of its images: the second reply has the baseline first."""
    pair = verdict.pair
    row: dict[str, Any] = {
        **_names(pair),
        "pictures": [None if p is None else str(p) for p in (pair.picture, pair.other)],
    }
    if isinstance(verdict, Failure):
        return {**row, "failed": verdict.cause, "reason": verdict.reason, "answers": list(verdict.answers)}
    return {
        **row,
        "scores": {"method": asdict(verdict.picture), "baseline": asdict(verdict.other)},
        "outcome": {dimension: verdict.outcome(dimension) for dimension in DIMENSIONS},
        "replies": [asdict(reply) for reply in verdict.replies],
        "fingerprint": verdict.fingerprint,
    }


def _judgement(row: Mapping[str, Any]) -> Judgement:
    pair = Pair(row["task"], row["case"], row["method"], row["baseline"], (), None, None)
    first, second = (_reply(reply) for reply in row["replies"])
    return Judgement(pair, row["fingerprint"], (first, second))


def _reply(row: Mapping[str, Any]) -> Reply:
    first, second = (Scores(**scores) for scores in row["scores"])
    return Reply(row["text"], (first, second), row["tries"])
