"""The judge's step of an evaluation: pairs out of cases, a file that keeps every verdict, a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from standin import KEY, Answer, Asked, fair, lines, paint, says, serve

from molecli.config import JudgeConfig
from molecli.errors import RunError, UsageError
from molecli.images.judge import JUDGEMENTS_FILE, Case, check_judge, pair_up, read_judgements, run_judge
from molecli.metrics.judge import Element, Failure, Judgement, Pair
from molecli.metrics.judge.parse import Scores

WORTHS = {"switch": [(7, 8), (5, 5), (3, 9)], "gated": [(9, 9), (6, 6), (2, 9)], "merge": [(4, 9), (5, 5), (3, 8)]}
CASES = [Case("2", f"a dog|{i}", (Element("object", "dog", ("sks dog",)),)) for i in range(3)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    drawn: dict[str, list[Path | None]] = {
        method: [paint(tmp_path / f"{method}-{i}.png", *worth) for i, worth in enumerate(worths)]
        for method, worths in WORTHS.items()
    }
    return pair_up(CASES, drawn, "merge")


def settings(url: str, **more: object) -> JudgeConfig:
    quick = {"endpoint": url, "key_env": "MOLE_TEST_KEY", "baseline": "merge", "timeout_s": 5, "pause_s": 0.001}
    return JudgeConfig.model_validate({**quick, "retries": 1, **more})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JUDGEMENTS_FILE).read_text().splitlines()]


def test_every_other_method_meets_the_baseline_case_by_case(pairs: list[Pair]) -> None:
    assert [(p.method, p.case) for p in pairs] == [(m, case.name) for m in ("switch", "gated") for case in CASES]
    assert {p.baseline for p in pairs} == {"merge"}
    assert [(p.picture.name, p.other.name) for p in pairs[:2] if p.picture and p.other] == [
        ("switch-0.png", "merge-0.png"),
        ("switch-1.png", "merge-1.png"),
    ]
    assert pairs[0].elements == CASES[0].elements


def test_pairing_needs_a_picture_or_none_of_every_case_and_cases_apart() -> None:
    assert pair_up(CASES[:1], {"merge": [None], "nla": [None]}, "merge")[0].picture is None
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        pair_up(CASES, {"merge": [None] * 3, "nla": [None]}, "merge")
    with pytest.raises(ValueError, match="the same name"):
        pair_up([CASES[0], CASES[0]], {"merge": [None] * 2, "nla": [None] * 2}, "merge")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            ["gated", "merge"],
            "judge.baseline: the baseline 'merg' is not among the methods. Did you mean 'merge'?",
        ),
        (["merg"], "judge.baseline: merg has nothing to be compared with. Add --modes."),
    ],
)
def test_mistakes_are_found_before_a_picture_is_drawn(methods: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_judge(settings("http://127.0.0.1/v1", baseline="merg"), methods)
    assert str(caught.value) == message


def test_a_missing_key_is_one_of_them() -> None:
    with pytest.raises(UsageError, match="MOLE_TEST_NO_KEY is not set"):
        check_judge(JudgeConfig(key_env="MOLE_TEST_NO_KEY"), ["linear", "gated"])
    check_judge(settings("http://127.0.0.1/v1"), ["merge", "gated"])


def test_the_file_holds_both_orders_raw_and_the_averages(pairs: list[Pair], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with serve(fair) as standin:
        run_judge(settings(standin.url), pairs, tmp_path / "run", progress=lambda *step: seen.append(step))
    found = rows(tmp_path / "run")
    assert [(row["method"], row["case"]) for row in found] == [(p.method, p.case) for p in pairs]
    first = found[0]
    assert (first["task"], first["baseline"]) == ("2", "merge")
    assert first["pictures"] == [str(pairs[0].picture), str(pairs[0].other)]
    assert [reply["text"] for reply in first["replies"]] == [lines((7, 8), (4, 9)), lines((4, 9), (7, 8))]
    assert first["replies"][1]["scores"][0] == {"composition": 4, "image": 9}
    assert first["scores"] == {
        "method": {"composition": 7, "image": 8},
        "baseline": {"composition": 4, "image": 9},
    }
    assert first["outcome"] == {"composition": "win", "image": "loss"}
    assert seen == [("judge", i, 6) for i in range(1, 7)]


def test_the_report_says_who_wins(pairs: list[Pair], tmp_path: Path) -> None:
    with serve(fair) as standin:
        config = settings(standin.url, model="judge-1", options={"seed": 1})
        report = run_judge(config, pairs, tmp_path / "run", samples=100)
    document = json.loads(json.dumps(report.document(), allow_nan=False))
    assert {key: document[key] for key in ("endpoint", "model", "baseline", "options", "pairs", "failed")} == {
        "endpoint": standin.url,
        "model": "judge-1",
        "baseline": "merge",
        "options": {"seed": 1},
        "pairs": 6,
        "failed": [],
    }
    counts = {(c["method"], c["dimension"]): (c["wins"], c["ties"], c["losses"]) for c in document["contests"]}
    assert counts == {
        ("switch", "composition"): (1, 2, 0),
        ("switch", "image"): (1, 1, 1),
        ("gated", "composition"): (2, 0, 1),
        ("gated", "image"): (2, 1, 0),
    }
    assert document["contests"][0]["win"] == pytest.approx(1 / 3)
    assert document["contests"][0]["win_interval"]["low"] == 0
    assert len(report.lines()) == 4
    assert report.lines()[0].startswith("switch against merge, composition quality: wins 33.3% [0.0, ")


def test_a_failed_pair_is_in_the_file_and_the_report(pairs: list[Pair], tmp_path: Path) -> None:
    def script(asked: Asked) -> Answer:
        return says("I can't compare these.") if (9, 9) in asked.worth else fair(asked)

    with serve(script) as standin:
        report = run_judge(settings(standin.url), pairs, tmp_path / "run")
    reason = 'the judge declines ("I can\'t compare these.") (try 2 of 2)'
    names = {"task": "2", "case": "a dog|0", "method": "gated", "baseline": "merge"}
    assert report.document()["failed"] == [{**names, "cause": "answer", "reason": reason}]
    assert [row.get("failed") for row in rows(tmp_path / "run")] == [None, None, None, "answer", None, None]
    assert rows(tmp_path / "run")[3]["answers"] == ["I can't compare these."] * 2


def test_a_run_that_dies_is_gone_on_with(pairs: list[Pair], tmp_path: Path) -> None:
    def dying(asked: Asked) -> Answer:
        return fair(asked) if asked.number < 4 else Answer({"error": "expired"}, 401)

    path = tmp_path / "run" / JUDGEMENTS_FILE
    with serve(dying) as standin:
        with pytest.raises(RunError) as caught:
            run_judge(settings(standin.url, concurrency=1), pairs, tmp_path / "run")
        assert str(caught.value) == (
            f"judge: {standin.url} wants another key (HTTP 401: expired). Check the key in the environment variable "
            f"MOLE_TEST_KEY. The finished verdicts are kept in {path}; --resume asks for the rest."
        )
        assert caught.value.exit_code == 1
        assert len(rows(tmp_path / "run")) == 2
        with path.open("a") as stream:
            stream.write('{"task": "2", "cas')  # as a kill leaves it

        standin.script = fair
        report = run_judge(settings(standin.url, concurrency=1), pairs, tmp_path / "run")
        assert len(standin.asked) == 5 + 8
    assert len(rows(tmp_path / "run")) == 6
    assert all(isinstance(verdict, Judgement) for verdict in report.verdicts)
    assert [verdict.pair for verdict in report.verdicts] == pairs


def test_a_line_cut_short_does_not_spoil_the_next(pairs: list[Pair], tmp_path: Path) -> None:
    path = tmp_path / "run" / JUDGEMENTS_FILE
    with serve(fair) as standin:
        run_judge(settings(standin.url), pairs[:1], tmp_path / "run")
        with path.open("a") as stream:
            stream.write('{"task": "2", "cas')
        standin.script = lambda asked: fair(asked) if asked.number < 4 else Answer({"error": "expired"}, 401)
        with pytest.raises(RunError):
            run_judge(settings(standin.url, concurrency=1), pairs, tmp_path / "run")
    assert [key[1] for key in read_judgements(path)] == ["a dog|0", "a dog|1"]


def test_a_failed_pair_is_asked_for_again(pairs: list[Pair], tmp_path: Path) -> None:
    with serve(lambda asked: says("no") if (7, 8) in asked.worth else fair(asked)) as standin:
        first = run_judge(settings(standin.url), pairs, tmp_path / "run")
        before = len(standin.asked)
        standin.script = fair
        second = run_judge(settings(standin.url), pairs, tmp_path / "run")
        assert len(standin.asked) == before + 2
    assert isinstance(first.verdicts[0], Failure)
    assert isinstance(second.verdicts[0], Judgement)
    assert second.verdicts[0].picture == Scores(7, 8)
    assert second.verdicts[1:] == first.verdicts[1:]


def test_pictures_drawn_anew_are_judged_anew(pairs: list[Pair], tmp_path: Path) -> None:
    with serve(fair) as standin:
        run_judge(settings(standin.url), pairs, tmp_path / "run")
        assert pairs[0].picture is not None
        paint(pairs[0].picture, 1, 1)
        report = run_judge(settings(standin.url), pairs, tmp_path / "run")
        assert len(standin.asked) == 12 + 2
    assert isinstance(report.verdicts[0], Judgement)
    assert report.verdicts[0].picture == Scores(1, 1)
    assert rows(tmp_path / "run")[0]["outcome"] == {"composition": "loss", "image": "loss"}


def test_lines_that_are_no_judgement_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / JUDGEMENTS_FILE
    path.write_text(
        '[]\n{"task": "2"}\n\nnot JSON\n{"task": 1, "case": 2, "method": 3, "baseline": 4, "replies": [1]}\n'
    )
    assert read_judgements(path) == {}
    assert read_judgements(tmp_path / "none") == {}


def test_nothing_kept_nothing_promised(pairs: list[Pair], tmp_path: Path) -> None:
    with serve(lambda asked: Answer({"error": "x"}, 401)) as standin, pytest.raises(RunError) as caught:
        run_judge(settings(standin.url), pairs, tmp_path / "run")
    assert str(caught.value).endswith("Check the key in the environment variable MOLE_TEST_KEY.")


def test_the_key_is_in_no_file_and_no_report(
    pairs: list[Pair], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def telling(asked: Asked) -> Answer:
        told = asked.headers["Authorization"]
        if (9, 9) in asked.worth:
            return says(f"I can't help you, {told}.")
        answer = fair(asked)
        answer.body["choices"][0]["message"]["content"] += f"\n({told})"
        return answer

    with caplog.at_level("DEBUG"), serve(telling) as standin:
        config = settings(standin.url)
        report = run_judge(config, pairs, tmp_path / "run")
        assert standin.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) == 1
    assert b"Bearer ***" in written[0]
    assert all(KEY.encode() not in content for content in written)
    shown = [json.dumps(report.document()), *report.lines(), repr(report), repr(config), config.model_dump_json()]
    assert all(KEY not in text for text in [*shown, caplog.text, *capfd.readouterr()])
