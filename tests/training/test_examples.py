"""Examples by task, held-out parts and batches: all of them functions of the configuration and the seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from molecli.config import DataConfig
from molecli.errors import UsageError
from molecli.protocols import Example
from molecli.training.examples import Batches, flatten, hold_out, load_tasks, split_tasks


def write_jsonl(path: Path, count: int) -> str:
    rows = [{"input": f"{path.stem} {i}", "target": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int, task: str = "t") -> list[Example]:
    return [Example(task, str(i), str(i)) for i in range(count)]


def test_tasks_come_in_the_order_asked_for_and_a_limit_takes_a_sample_in_file_order(tmp_path: Path) -> None:
    files = {"one": write_jsonl(tmp_path / "one.jsonl", 50), "two": write_jsonl(tmp_path / "two.jsonl", 2)}
    data = DataConfig(suite="jsonl", files=files, tasks=("two", "one"), limit=3)
    tasks = load_tasks(data)
    assert {task: len(examples) for task, examples in tasks.items()} == {"two": 2, "one": 3}
    assert list(tasks) == ["two", "one"]
    places = [int(example.prompt.split()[-1]) for example in tasks["one"]]
    assert places == sorted(places)
    assert places != [0, 1, 2]  # a sorted file's start is not like the rest
    assert load_tasks(data) == tasks
    assert flatten(tasks) == [*tasks["two"], *tasks["one"]]


def test_held_out_rows_are_never_trained_on_whatever_the_limit(tmp_path: Path) -> None:
    files = {"one": write_jsonl(tmp_path / "one.jsonl", 50)}
    whole = split_tasks(DataConfig(suite="jsonl", files=files, holdout=0.2))
    limited = split_tasks(DataConfig(suite="jsonl", files=files, holdout=0.2, limit=4))
    for part, sampled in zip(whole, limited, strict=True):
        assert set(sampled["one"]) < set(part["one"])
        assert len(sampled["one"]) == 4
    assert [len(part["one"]) for part in whole] == [40, 10]
    assert not set(whole[0]["one"]) & set(whole[1]["one"])


def test_an_empty_training_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(UsageError) as caught:
        load_tasks(DataConfig(suite="jsonl", files={"empty": str(path)}))
    assert str(caught.value) == (f'{path}: holds no examples. Write one {{"input": ..., "target": ...}} per line.')


def test_an_empty_split_of_a_suite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hollow:
        name = "bbh"

        def tasks(self, data_dir: str | None) -> list[str]:
            return ["word_sorting"]

        known = tasks

        def load(self, task: str, split: str, data_dir: str | None) -> list[Example]:
            return []

    monkeypatch.setattr("molecli.training.examples.load_suite", lambda name, files: Hollow())
    with pytest.raises(UsageError) as caught:
        load_tasks(DataConfig(suite="bbh"))
    assert str(caught.value) == (
        "suite bbh: the train split of the task 'word_sorting' is empty. Leave the task out, or check --data-dir."
    )


def test_the_held_out_part_is_disjoint_in_order_and_fixed_by_the_seed() -> None:
    tasks = {"a": numbered(20, "a"), "b": numbered(3, "b")}
    kept, held = hold_out(tasks, 0.25, seed=1)
    assert len(held["a"]) == 5
    assert len(held["b"]) == 1
    for task, examples in tasks.items():
        assert sorted(kept[task] + held[task], key=lambda e: int(e.prompt)) == examples
        assert held[task] == [e for e in examples if e in held[task]]
    assert (kept, held) == hold_out(tasks, 0.25, seed=1)
    assert held != hold_out(tasks, 0.25, seed=2)[1]
    assert held["a"] == hold_out({"a": tasks["a"]}, 0.25, seed=1)[1]["a"]


def test_nothing_is_held_out_at_fraction_zero() -> None:
    assert hold_out({"a": numbered(2)}, 0.0, seed=1) == ({"a": numbered(2)}, {})


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(UsageError) as caught:
        hold_out({"a": numbered(1)}, 0.1, seed=1)
    assert str(caught.value) == (
        "data.holdout: the task 'a' has only one example, so none can be held out. "
        "Give it more examples, or write data.holdout: 0."
    )


def test_every_epoch_sees_every_example_once_in_another_order() -> None:
    batches = Batches(numbered(10), batch_size=4, seed=0)
    stream = [example.prompt for step in range(1, 6) for example in batches[step]]
    first, second = stream[:10], stream[10:]
    assert Counter(first) == Counter(second) == Counter(str(i) for i in range(10))
    assert first != second


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forward = Batches(numbered(10), batch_size=4, seed=0)
    ahead = [forward[step] for step in range(1, 9)]
    backward = Batches(numbered(10), batch_size=4, seed=0)
    assert [backward[step] for step in range(8, 0, -1)] == ahead[::-1]
    assert Batches(numbered(10), batch_size=4, seed=1)[1] != ahead[0]


def test_a_batch_larger_than_the_data_repeats_it() -> None:
    assert len(Batches(numbered(2), batch_size=5, seed=0)[1]) == 5


def test_the_digest_tells_data_apart() -> None:
    digests = {Batches(numbered(n, task), batch_size=1, seed=0).digest for n in (2, 3) for task in "ab"}
    assert len(digests) == 4
