"""One pair of pictures, judged in both orders.

Judges favour a position (Multi-LoRA Composition, limitations). Therefore each pair is shown in both orders, and the
scores of a picture are the means of the two: both pictures get the same bonus. A picture wins on a dimension if its
mean is strictly higher. Swapping the pictures of a pair swaps the result and changes no number.
Contents: Pair, Reply, Judgement, Failure, judge_pair, fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from molecli.errors import RunError
from molecli.metrics.judge.client import Client, NoAnswer
from molecli.metrics.judge.parse import Dimension, Scores, UnreadableAnswer, parse_scores
from molecli.metrics.judge.pictures import UnreadablePicture, data_url
from molecli.metrics.judge.prompt import once_more, question
from molecli.protocols import Element

if TYPE_CHECKING:
    from molecli.config.judge import JudgeConfig

Outcome = Literal["win", "tie", "loss"]
Cause = Literal["picture", "answer", "endpoint"]


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same elements: `picture` by `method`, `other` by `baseline`; None if none was drawn.

    `task` is the row of the results, `case` distinguishes the pairs of a task.
    """

    task: str
    case: str
    method: str
    baseline: str
    elements: tuple[Element, ...]
    picture: Path | None
    other: Path | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """A unique key of this pair in a run."""
        return self.task, self.case, self.method, self.baseline


@dataclass(frozen=True)
class Reply:
    """A readable answer, its scores by image in the shown order, and the number of requests."""

    text: str
    scores: tuple[Scores, Scores]
    tries: int


@dataclass(frozen=True)
class Judgement:
    """The two replies for a pair: to (picture, other) and to (other, picture). `fingerprint` covers the requests."""

    pair: Pair
    fingerprint: str
    replies: tuple[Reply, Reply]

    @property
    def picture(self) -> Scores:
        """The scores of the picture, means over the two orders."""
        return _mean(self.replies[0].scores[0], self.replies[1].scores[1])

    @property
    def other(self) -> Scores:
        """The scores of the other picture, means over the two orders."""
        return _mean(self.replies[0].scores[1], self.replies[1].scores[0])

    def outcome(self, dimension: Dimension) -> Outcome:
        """Whether the picture wins over the other."""
        # Scores are multiples of 0.5, their means of 0.25: both are exact in floating point.
        mine, theirs = self.picture.on(dimension), self.other.on(dimension)
        return "win" if mine > theirs else "loss" if mine < theirs else "tie"


@dataclass(frozen=True)
class Failure:
    """A pair without scores: the reason, its cause, and the answers of the judge."""

    pair: Pair
    cause: Cause
    reason: str
    answers: tuple[str, ...] = ()


Verdict = Judgement | Failure


class _Unjudged(Exception):
    """One order of a pair for which all tries failed."""

    def __init__(self, cause: Cause, reason: str, answers: list[str]) -> None:
        super().__init__(reason)
        self.cause, self.reason, self.answers = cause, reason, tuple(answers)


def judge_pair(
    pair: Pair,
    client: Client,
    config: JudgeConfig,
    *,
    pause: Callable[[float], None],
    earlier: Judgement | None = None,
) -> Verdict:
    """The verdict on one pair; `earlier` is reused if it is about the same pictures and question.

    `pause(seconds)` waits between tries.
    Raises: RunError if all pairs would fail: no connection, a refused key, an unknown model.
    """
    if pair.picture is None or pair.other is None:
        missing = pair.method if pair.picture is None else pair.baseline
        return Failure(pair, "picture", f"{missing} drew no picture")
    try:
        shown = data_url(pair.picture), data_url(pair.other)
    except UnreadablePicture as error:
        return Failure(pair, "picture", str(error))
    text = question(pair.elements)
    mark = fingerprint(config, text, shown)
    if earlier is not None and earlier.fingerprint == mark:
        return replace(earlier, pair=pair)
    answers: list[str] = []
    try:
        first = _ask(client, config, text, shown, pause)
        answers.append(first.text)
        second = _ask(client, config, text, (shown[1], shown[0]), pause)
    except _Unjudged as error:
        return Failure(pair, error.cause, error.reason, (*answers, *error.answers))
    return Judgement(pair, mark, (first, second))


def fingerprint(config: JudgeConfig, text: str, shown: tuple[str, str]) -> str:
    """A hash of everything that an answer depends on: endpoint, model, options, question, pixels and their order."""
    options = json.dumps(config.options, sort_keys=True, default=str)
    whole = hashlib.sha256()
    for part in (config.endpoint, config.model, options, text, *shown):
        whole.update(hashlib.sha256(part.encode("utf-8")).digest())
    return whole.hexdigest()


def _ask(
    client: Client, config: JudgeConfig, text: str, shown: tuple[str, str], pause: Callable[[float], None]
) -> Reply:
    """The first readable reply in 1 + retries requests, with a growing pause before each further one."""
    answers: list[str] = []
    asked, wait_s = text, 0.0
    for number in range(1, config.retries + 2):
        if number > 1:
            pause(max(wait_s, min(config.pause_s * 2 ** (number - 2), config.max_pause_s)))
        try:
            completion = client.answer(asked, shown)
            return Reply(completion.text, parse_scores(completion.text), number)
        except UnreadableAnswer as error:
            reason = f"{error}; it was cut off at its length limit" if completion.cut_off else str(error)
            cause: Cause = "answer"
            answers.append(completion.text)
            asked, wait_s = once_more(text, reason), 0.0
        except NoAnswer as error:
            reason, cause, wait_s = error.reason, "endpoint", error.after_s
            too_long = wait_s > config.max_pause_s
            if error.again and not too_long and number <= config.retries:
                continue
            if error.stops:
                raise RunError("judge", reason, error.remedy) from None
            if too_long:
                reason += f" (it asks to wait {wait_s:.0f} s, more than judge.max_pause_s)"
            break
    raise _Unjudged(cause, f"{reason} (try {number} of {config.retries + 1})", answers)


def _mean(first: Scores, second: Scores) -> Scores:
    return Scores((first.composition + second.composition) / 2, (first.image + second.image) / 2)
