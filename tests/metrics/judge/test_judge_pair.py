"""A pair is judged in both orders; the average is blind to the place a picture is shown in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from standin import Answer, Script, StandIn, biased, fair, lines, says, serve

from molecli.config import JudgeConfig
from molecli.errors import RunError
from molecli.metrics.judge import Failure, Judgement, Pair, Verdict
from molecli.metrics.judge.client import Client, read_key
from molecli.metrics.judge.pair import judge_pair
from molecli.metrics.judge.parse import DIMENSIONS, Scores

Settings = Callable[..., JudgeConfig]
MakePairs = Callable[..., list[Pair]]
GOOD = says(lines((7, 8), (4, 9)))
NOT_FOUND = Answer({"error": {"message": "No such model"}}, 404)


def judged(
    pair: Pair, config: JudgeConfig, pauses: list[float] | None = None, earlier: Judgement | None = None
) -> Verdict:
    pauses = [] if pauses is None else pauses
    with Client(config, read_key(config)) as client:
        return judge_pair(pair, client, config, pause=pauses.append, earlier=earlier)


def in_turn(*answers: Answer) -> Script:
    """A script that gives these answers, then good ones."""
    return lambda asked: answers[asked.number] if asked.number < len(answers) else fair(asked)


def test_both_orders_are_asked_with_the_same_words(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(fair) as standin:
        verdict = judged(pair, settings(standin.url))
    assert [asked.worth for asked in standin.asked] == [[(7, 8), (4, 9)], [(4, 9), (7, 8)]]
    assert standin.asked[0].text == standin.asked[1].text
    assert "1. character (Alice): blue dress\n2. style (ink)" in standin.asked[0].text
    assert isinstance(verdict, Judgement)
    assert [reply.text for reply in verdict.replies] == [lines((7, 8), (4, 9)), lines((4, 9), (7, 8))]
    assert [reply.scores[0] for reply in verdict.replies] == [Scores(7, 8), Scores(4, 9)]
    assert (verdict.picture, verdict.other) == (Scores(7, 8), Scores(4, 9))
    assert [verdict.outcome(dimension) for dimension in DIMENSIONS] == ["win", "loss"]


def test_the_question_names_no_method(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(fair) as standin:
        judged(pair, settings(standin.url))
    for asked in standin.asked:
        assert "switch" not in str(asked.body)
        assert "merge" not in str(asked.body)


def test_what_a_place_adds_cancels(settings: Settings, make_pairs: MakePairs) -> None:
    for worths in (((5, 6), (5, 6)), ((5, 6), (6, 5.5))):
        (pair,) = make_pairs(worths)
        with serve(biased) as standin:
            verdict = judged(pair, settings(standin.url))
        assert isinstance(verdict, Judgement)
        # Each order by itself is wrong: the first picture is given 2 points more in both.
        assert all(reply.scores[0].composition > reply.scores[1].composition for reply in verdict.replies)
        (composition, image), (other_composition, other_image) = worths
        assert verdict.picture == Scores(composition + 1, image + 1)
        assert verdict.other == Scores(other_composition + 1, other_image + 1)
    (tied,) = make_pairs(((5, 6), (5, 6)))
    with serve(biased) as standin:
        verdict = judged(tied, settings(standin.url))
    assert isinstance(verdict, Judgement)
    assert [verdict.outcome(dimension) for dimension in DIMENSIONS] == ["tie", "tie"]


def test_swapping_the_pictures_swaps_the_result_and_changes_no_number(
    settings: Settings, make_pairs: MakePairs
) -> None:
    opposite = {"win": "loss", "tie": "tie", "loss": "win"}
    for script in (fair, biased):
        (pair,) = make_pairs(((5, 7.5), (6.5, 7)))
        swapped = replace(pair, picture=pair.other, other=pair.picture)
        with serve(script) as standin:
            one, two = judged(pair, settings(standin.url)), judged(swapped, settings(standin.url))
        assert isinstance(one, Judgement)
        assert isinstance(two, Judgement)
        assert (one.picture, one.other) == (two.other, two.picture)
        for dimension in DIMENSIONS:
            assert opposite[one.outcome(dimension)] == two.outcome(dimension)


@pytest.mark.parametrize(
    "bad",
    [
        says("I can't help with that."),
        says(None, refusal="I'm sorry, I cannot compare these."),
        says(None, finish="content_filter"),
        says("Image 1: Composition Quality: 7/10"),
        says(lines((11, 8), (4, 9))),
        Answer(b"<html>"),
        Answer({"error": {"message": "overloaded"}}, 503),
        Answer({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
    ],
    ids=["declined", "refusal field", "filtered", "half", "out of range", "no JSON", "503", "429"],
)
def test_a_bad_answer_is_asked_for_again(bad: Answer, settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(in_turn(bad, bad)) as standin:
        verdict = judged(pair, settings(standin.url))
    assert isinstance(verdict, Judgement)
    assert [reply.tries for reply in verdict.replies] == [3, 1]
    assert (verdict.picture, verdict.other) == (Scores(7, 8), Scores(4, 9))


def test_a_further_try_after_an_unreadable_answer_says_what_was_wrong(
    settings: Settings, make_pairs: MakePairs
) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(in_turn(says("Both are fine."), Answer({"error": "busy"}, 500))) as standin:
        judged(pair, settings(standin.url))
    texts = [asked.text for asked in standin.asked]
    assert "no scores in it ('Both are fine.')" in texts[1]
    assert texts[2] == texts[1]
    assert texts[3] == texts[0]  # the other order begins afresh


def test_tries_are_bounded_and_what_was_said_is_kept(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    refusal = says("I can't help with that.")
    with serve(in_turn(GOOD, refusal, refusal, refusal)) as standin:
        verdict = judged(pair, settings(standin.url, retries=2))
    assert len(standin.asked) == 4
    reason = 'the judge declines ("I can\'t help with that.") (try 3 of 3)'
    answers = (lines((7, 8), (4, 9)), *["I can't help with that."] * 3)
    assert verdict == Failure(pair, "answer", reason, answers)


def test_an_answer_cut_off_says_so(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(lambda asked: says("For image 1: the", finish="length")) as standin:
        verdict = judged(pair, settings(standin.url, retries=0))
    assert isinstance(verdict, Failure)
    assert verdict.reason == ("no scores in it ('For image 1: the'); it was cut off at its length limit (try 1 of 1)")


def test_pauses_double_up_to_the_longest(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    pauses: list[float] = []
    with serve(lambda asked: Answer({"error": "busy"}, 500)) as standin:
        verdict = judged(pair, settings(standin.url, retries=5, pause_s=1, max_pause_s=5), pauses)
    assert pauses == [1, 2, 4, 5, 5]
    assert verdict == Failure(pair, "endpoint", "HTTP 500: busy (try 6 of 6)")


def test_retry_after_is_honoured(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    pauses: list[float] = []
    busy = Answer({"error": "slow down"}, 429, {"Retry-After": "3"})
    with serve(in_turn(busy, busy)) as standin:
        verdict = judged(pair, settings(standin.url, pause_s=2), pauses)
    assert pauses == [3, 4]
    assert isinstance(verdict, Judgement)


def test_an_endpoint_that_asks_for_too_long_a_wait_is_left(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    pauses: list[float] = []
    with serve(lambda asked: Answer({"error": "quota"}, 429, {"Retry-After": "3600"})) as standin:
        verdict = judged(pair, settings(standin.url), pauses)
    assert (pauses, len(standin.asked)) == ([], 1)
    reason = "HTTP 429: quota (it asks to wait 3600 s, more than judge.max_pause_s) (try 1 of 3)"
    assert verdict == Failure(pair, "endpoint", reason)


def test_a_refused_request_is_not_repeated(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(lambda asked: Answer({"error": "too large"}, 400)) as standin:
        verdict = judged(pair, settings(standin.url))
    assert len(standin.asked) == 1
    assert verdict == Failure(pair, "endpoint", "HTTP 400: too large (try 1 of 3)")


def test_an_unknown_model_ends_the_run(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    with serve(lambda asked: NOT_FOUND) as standin, pytest.raises(RunError) as caught:
        judged(pair, settings(standin.url, model="gpt-0"))
    assert len(standin.asked) == 1
    what = f"judge: {standin.url} does not answer for the model 'gpt-0' (HTTP 404: No such model). "
    assert str(caught.value) == what + "Check judge.model and judge.endpoint, which ends before /chat/completions."


def test_pictures_that_are_not_there_cost_no_request(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    assert pair.other is not None
    with serve(fair) as standin:
        config = settings(standin.url)
        assert judged(replace(pair, picture=None), config) == Failure(
            replace(pair, picture=None), "picture", "switch drew no picture"
        )
        undrawn = judged(replace(pair, other=None), config)
        assert isinstance(undrawn, Failure)
        assert undrawn.reason == "merge drew no picture"
        pair.other.write_bytes(b"")
        assert judged(pair, config) == Failure(pair, "picture", f"{pair.other} is not a readable picture")
        pair.other.unlink()
        assert judged(pair, config) == Failure(pair, "picture", f"{pair.other} does not exist")
    assert standin.asked == []


def test_an_earlier_judgement_of_the_same_is_taken_over(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))

    def requests(standin: StandIn, now: Pair, **more: object) -> int:
        before = len(standin.asked)
        judged(now, settings(standin.url, **more), earlier=first)
        return len(standin.asked) - before

    with serve(fair) as standin:
        first = judged(pair, settings(standin.url))
        assert isinstance(first, Judgement)
        assert judged(pair, settings(standin.url, retries=9, concurrency=1), earlier=first) == first
        assert len(standin.asked) == 2
        assert requests(standin, pair, model="another") == 2
        assert requests(standin, pair, options={"temperature": 0}) == 2
        assert requests(standin, replace(pair, elements=pair.elements[:1])) == 2
        assert requests(standin, replace(pair, picture=pair.other, other=pair.picture)) == 2
        (repainted,) = make_pairs(((7, 8), (4, 8.5)))
        assert requests(standin, repainted) == 2


def test_threads_may_share_a_client(settings: Settings, make_pairs: MakePairs) -> None:
    (pair,) = make_pairs(((7, 8), (4, 9)))
    verdicts: list[Verdict] = []
    with serve(fair) as standin:
        config = settings(standin.url)
        with Client(config, read_key(config)) as client:

            def judge() -> None:
                verdicts.append(judge_pair(pair, client, config, pause=lambda seconds: None))

            threads = [threading.Thread(target=judge) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(verdicts) == 6
    assert all(isinstance(v, Judgement) and v.picture == Scores(7, 8) for v in verdicts)
