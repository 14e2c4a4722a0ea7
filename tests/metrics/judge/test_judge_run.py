"""Many pairs: so many at once, verdicts in order, a failure loses nothing, an endpoint that is down ends the run."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from standin import KEY, Answer, Asked, fair, says, serve

from molecli.config import JudgeConfig
from molecli.errors import RunError, UsageError
from molecli.metrics.judge import Failure, Judgement, Pair, Verdict, judge_pairs
from molecli.metrics.judge.run import DOWN_AFTER

Settings = Callable[..., JudgeConfig]
MakePairs = Callable[..., list[Pair]]
BUSY = Answer({"error": {"message": "overloaded"}}, 503)


def many(make_pairs: MakePairs, count: int) -> list[Pair]:
    """Pair i is worth (i/2, 1) against (2, 1)."""
    return make_pairs(*(((i / 2, 1), (2, 1)) for i in range(count)))


def index(asked: Asked) -> float:
    """Which of the pairs of `many` is asked about, times a half."""
    return next((worth[0] for worth in asked.worth if worth[0] != 2), 2)


def test_verdicts_come_in_the_order_of_the_pairs(settings: Settings, make_pairs: MakePairs) -> None:
    def hurrying(asked: Asked) -> Answer:
        time.sleep(0.05 if index(asked) == 0 else 0)  # the first pair is the last to be ready
        return fair(asked)

    pairs, finished, progress = many(make_pairs, 6), list[Verdict](), list[tuple[int, int]]()
    with serve(hurrying) as standin:
        config = settings(standin.url, concurrency=3)
        verdicts = judge_pairs(
            pairs, config, finished=finished.append, progress=lambda done, total: progress.append((done, total))
        )
    assert [verdict.pair for verdict in verdicts] == pairs
    assert [v.picture.composition for v in verdicts if isinstance(v, Judgement)] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert finished[0].pair != pairs[0]
    assert sorted(v.pair.case for v in finished) == list("012345")
    assert progress == [(i, 6) for i in range(1, 7)]


def test_no_more_requests_at_once_than_asked_for(settings: Settings, make_pairs: MakePairs) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def counting(asked: Asked) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return fair(asked)

    for concurrency in (1, 3):
        most[0] = 0
        with serve(counting) as standin:
            judge_pairs(many(make_pairs, 8), settings(standin.url, concurrency=concurrency))
        assert most[0] == concurrency


def test_a_failed_pair_is_recorded_and_the_others_go_on(settings: Settings, make_pairs: MakePairs) -> None:
    def script(asked: Asked) -> Answer:
        if index(asked) == 0:
            return says("I can't help with that.")
        return BUSY if index(asked) == 0.5 else fair(asked)

    pairs = many(make_pairs, 5)
    pairs[2] = replace(pairs[2], picture=None)
    with serve(script) as standin:
        verdicts = judge_pairs(pairs, settings(standin.url))
    assert [v.cause if isinstance(v, Failure) else "judged" for v in verdicts] == [
        "answer",
        "endpoint",
        "picture",
        "judged",
        "judged",
    ]
    failures = [v.reason for v in verdicts if isinstance(v, Failure)]
    assert failures[1:] == ["HTTP 503: overloaded (try 3 of 3)", "switch drew no picture"]


def test_a_timeout_fails_its_pair_alone(settings: Settings, make_pairs: MakePairs) -> None:
    def script(asked: Asked) -> Answer:
        time.sleep(0.6 if index(asked) == 0 else 0)
        return fair(asked)

    with serve(script) as standin:
        first, second = judge_pairs(many(make_pairs, 2), settings(standin.url, timeout_s=0.25, retries=1))
    assert isinstance(first, Failure)
    assert (first.cause, first.reason) == ("endpoint", "no answer within 0.25 s (try 2 of 2)")
    assert isinstance(second, Judgement)


def test_an_endpoint_that_is_down_ends_the_run(settings: Settings, make_pairs: MakePairs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with pytest.raises(RunError) as caught:
        judge_pairs(many(make_pairs, 4), settings(url))
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"judge: no connection to {url} (")
    assert str(caught.value).endswith("). Check judge.endpoint and that its server runs.")


def test_an_endpoint_that_only_fails_counts_as_down(settings: Settings, make_pairs: MakePairs) -> None:
    finished: list[Verdict] = []
    with serve(lambda asked: BUSY) as standin, pytest.raises(RunError) as caught:
        judge_pairs(many(make_pairs, 12), settings(standin.url, concurrency=1), finished=finished.append)
    what = f"5 pairs in a row got no answer from {standin.url} (HTTP 503: overloaded (try 3 of 3))"
    remedy = "Check judge.endpoint, judge.model and the account behind the key."
    assert str(caught.value) == f"judge: {what}. {remedy}"
    assert len(finished) in (DOWN_AFTER, DOWN_AFTER + 1)  # one more was under way


def test_answers_in_between_show_that_it_is_not_down(settings: Settings, make_pairs: MakePairs) -> None:
    def script(asked: Asked) -> Answer:
        return fair(asked) if index(asked) % 2 == 0 else BUSY

    pairs = many(make_pairs, 17)
    with serve(script) as standin:
        verdicts = judge_pairs(pairs, settings(standin.url, concurrency=1, retries=0))
    assert sum(isinstance(v, Failure) for v in verdicts) == 12


def test_missing_pictures_say_nothing_about_the_endpoint(settings: Settings, make_pairs: MakePairs) -> None:
    pairs = [replace(pair, picture=None) for pair in many(make_pairs, 8)]
    pairs += make_pairs(((3, 3), (2, 2)))
    with serve(fair) as standin:
        verdicts = judge_pairs(pairs, settings(standin.url, concurrency=1))
    assert isinstance(verdicts[-1], Judgement)


def test_a_judge_that_only_declines_fails_the_run_at_its_end(settings: Settings, make_pairs: MakePairs) -> None:
    finished: list[Verdict] = []
    refusal = says("I can't help with that.")
    with serve(lambda asked: refusal) as standin, pytest.raises(RunError) as caught:
        judge_pairs(many(make_pairs, 7), settings(standin.url, model="shy", retries=0), finished=finished.append)
    assert len(finished) == 7
    reason = 'the judge declines ("I can\'t help with that.") (try 1 of 1)'
    what = f"none of the 7 pairs could be judged by 'shy' (7 times: {reason})"
    remedy = "Check that judge.model sees pictures, and the pictures themselves."
    assert str(caught.value) == f"judge: {what}. {remedy}"


def test_what_ends_the_run_loses_no_finished_pair(settings: Settings, make_pairs: MakePairs) -> None:
    gone = threading.Event()

    def script(asked: Asked) -> Answer:
        if asked.number >= 6:
            gone.set()
            return Answer({"error": "expired"}, 401)
        return fair(asked)

    finished: list[Verdict] = []
    with serve(script) as standin, pytest.raises(RunError, match="wants another key"):
        judge_pairs(many(make_pairs, 9), settings(standin.url, concurrency=1), finished=finished.append)
    assert gone.is_set()
    assert [verdict.pair.case for verdict in finished] == ["0", "1", "2"]
    assert all(isinstance(verdict, Judgement) for verdict in finished)


def test_a_pair_under_way_when_the_run_ends_is_kept(settings: Settings, make_pairs: MakePairs) -> None:
    under_way = threading.Event()

    def script(asked: Asked) -> Answer:
        if index(asked) == 0:
            under_way.wait(5)
            return Answer({"error": "expired"}, 401)
        under_way.set()
        time.sleep(0.3)
        return fair(asked)

    finished: list[Verdict] = []
    with serve(script) as standin, pytest.raises(RunError, match="wants another key"):
        judge_pairs(many(make_pairs, 4), settings(standin.url, concurrency=2), finished=finished.append)
    assert [verdict.pair.case for verdict in finished] == ["1"]
    assert isinstance(finished[0], Judgement)


def test_an_interrupt_ends_pauses_and_keeps_what_is_finished(settings: Settings, make_pairs: MakePairs) -> None:
    finished: list[Verdict] = []

    def script(asked: Asked) -> Answer:
        return fair(asked) if index(asked) == 0 else BUSY

    def keep(verdict: Verdict) -> None:
        finished.append(verdict)
        raise KeyboardInterrupt  # as Ctrl-C would, in the main thread

    with serve(script) as standin:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            judge_pairs(many(make_pairs, 4), settings(standin.url, pause_s=30, max_pause_s=30), finished=keep)
        assert time.monotonic() - start < 10
    assert [verdict.pair.case for verdict in finished] == ["0"]


def test_earlier_judgements_are_taken_over(settings: Settings, make_pairs: MakePairs) -> None:
    pairs = many(make_pairs, 4)
    with serve(fair) as standin:
        first = judge_pairs(pairs[:2], settings(standin.url))
        earlier = {v.pair.key: v for v in first if isinstance(v, Judgement)}
        verdicts = judge_pairs(pairs, settings(standin.url), earlier=earlier)
        assert len(standin.asked) == 8
    assert verdicts[:2] == first


def test_nothing_is_asked_without_the_key() -> None:
    with pytest.raises(UsageError, match="MOLE_TEST_NO_KEY is not set"):
        judge_pairs([], JudgeConfig(key_env="MOLE_TEST_NO_KEY"))


def test_the_key_is_in_no_verdict_and_no_error(
    settings: Settings, make_pairs: MakePairs, capfd: pytest.CaptureFixture[str]
) -> None:
    def telling(asked: Asked) -> Answer:
        told = asked.headers["Authorization"]
        if index(asked) == 0:
            return Answer({"error": {"message": f"bad request with {told}"}}, 400)
        answer = fair(asked)
        answer.body["choices"][0]["message"]["content"] += f"\n({told})"
        return answer

    with serve(telling) as standin:
        verdicts = judge_pairs(many(make_pairs, 3), settings(standin.url))
    assert "Bearer ***" in repr(verdicts[0])
    assert "Bearer ***" in repr(verdicts[1])
    assert KEY not in repr(verdicts)
    with serve(lambda asked: Answer({"error": str(asked.headers)}, 401)) as standin, pytest.raises(RunError) as caught:
        judge_pairs(many(make_pairs, 3), settings(standin.url))
    assert "Bearer ***" in str(caught.value)
    assert KEY not in str(caught.value)
    assert KEY not in "".join(capfd.readouterr())
