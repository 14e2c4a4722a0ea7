"""Judges many pairs with a small pool of threads; verdicts are in the order of the pairs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from molecli.errors import RunError
from molecli.metrics.judge.client import Client, read_key
from molecli.metrics.judge.pair import Failure, Judgement, Pair, Verdict, judge_pair

if TYPE_CHECKING:
    from molecli.config.judge import JudgeConfig

# After this many pairs in a row without an answer, each after all tries, the endpoint counts as down: otherwise
# hundreds of pairs would be tried for hours.
DOWN_AFTER = 5


class _Stopped(Exception):
    """The run has ended; this pair is no longer needed."""


def judge_pairs(
    pairs: Sequence[Pair],
    config: JudgeConfig,
    *,
    earlier: Mapping[tuple[str, str, str, str], Judgement] | None = None,
    finished: Callable[[Verdict], object] = lambda verdict: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Verdict]:
    """The verdicts, in the order of `pairs`.

    A pair that fails becomes a `Failure`, and the others continue. `finished` is called with each verdict at once, in
    this thread, so that none is lost if the run ends early; `earlier` verdicts are reused if nothing has changed.
    An interrupt waits for the running requests, at most `timeout_s`.
    Raises: UsageError without the key; RunError if the endpoint is down or no pair could be judged.
    """
    key, stop = read_key(config), threading.Event()

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Stopped

    def judge(pair: Pair) -> Verdict:
        pause(0.0)
        try:
            return judge_pair(pair, client, config, pause=pause, earlier=(earlier or {}).get(pair.key))
        except RunError:
            stop.set()  # here, so that no thread starts another pair
            raise

    verdicts: dict[int, Verdict] = {}
    in_a_row = 0
    with Client(config, key) as client, ThreadPoolExecutor(config.concurrency) as pool:
        waiting = {pool.submit(judge, pair): i for i, pair in enumerate(pairs)}
        try:
            for future in as_completed(waiting):
                if isinstance(future.exception(), _Stopped):
                    continue  # the error that stopped it follows
                verdict = verdicts[waiting[future]] = future.result()
                finished(verdict)
                progress(len(verdicts), len(pairs))
                in_a_row = _unanswered(verdict, in_a_row)
                if in_a_row == DOWN_AFTER:
                    assert isinstance(verdict, Failure)
                    what = f"{in_a_row} pairs in a row got no answer from {config.endpoint} ({verdict.reason})"
                    raise RunError("judge", what, "Check judge.endpoint, judge.model and the account behind the key.")
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            for verdict in _late(waiting, verdicts):
                finished(verdict)
            raise
    return _some(config, [verdicts[i] for i in range(len(pairs))])


def _unanswered(verdict: Verdict, before: int) -> int:
    """The number of verdicts in a row without an answer; missing pictures do not count."""
    if isinstance(verdict, Judgement):
        return 0
    return {"endpoint": before + 1, "answer": 0, "picture": before}[verdict.cause]


def _late(waiting: Mapping[Future[Verdict], int], seen: Mapping[int, Verdict]) -> list[Verdict]:
    """The verdicts that arrived while the run was ending."""
    done = [future for future, i in waiting.items() if i not in seen and not future.cancelled()]
    return [future.result() for future in done if future.exception() is None]


def _some(config: JudgeConfig, verdicts: list[Verdict]) -> list[Verdict]:
    failures = [verdict for verdict in verdicts if isinstance(verdict, Failure)]
    if failures and len(failures) == len(verdicts):
        reason, count = Counter(failure.reason for failure in failures).most_common(1)[0]
        what = f"none of the {len(verdicts)} pairs could be judged by {config.model!r} ({count} times: {reason})"
        raise RunError("judge", what, "Check that judge.model sees pictures, and the pictures themselves.")
    return verdicts
