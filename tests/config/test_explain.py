"""Every mistake in a recipe is named with its file and its key, and the nearest key to an unknown one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from molecli.catalog import builtin as catalog
from molecli.config import RECIPES, load_recipe
from molecli.config.recipes import Mode
from molecli.errors import near, suggestion

LORAS = {"loras": "x=org/a,y=org/b"}
GATE_KEYS = (
    "granularity, input, pool, head, head_rank, init_std, normalize, temperature, learn_temperature, top_k, absent"
)


def test_near_finds_the_closest_name() -> None:
    assert near("stepps", ["steps", "seed"]) == "steps"
    assert near("zzz", ["steps", "seed"]) is None
    assert suggestion("zzz", ["steps", "seed"]) == "Known: steps, seed."
    assert suggestion("zzz", []) == "Known: none."


SETS = [
    ("train.stepps=3", "unknown key 'train.stepps'. Did you mean 'train.steps'?"),
    ("outptu=x", "unknown key 'outptu'. Did you mean 'output'?"),
    ("lr=3", "unknown key 'lr'. Did you mean 'train.lr'?"),
    ("gate.zzz=1", f"unknown key 'gate.zzz'. Known: {GATE_KEYS}."),
    ("evaluate.data.suit=bbh", "unknown key 'evaluate.data.suit'. Did you mean 'evaluate.data.suite'?"),
    ("loras=[{name: x, sorce: y}]", "unknown key 'loras.0.sorce'. Did you mean 'loras.0.source'?"),
    ("loras=[{name: x}]", "the key 'loras.0.source' is missing. Write it."),
    ("loras.x.weight=heavy", "loras.0.weight is 'heavy', not a number. Write for example loras.0.weight: 1.0."),
    ("loras.x.wieght=2", "unknown key 'loras.0.wieght'. Did you mean 'loras.0.weight'?"),
    ("train.steps=many", "train.steps is 'many', not a whole number. Write for example train.steps: 300."),
    ("train.steps=1.5", "train.steps is 1.5, not a whole number. Write for example train.steps: 300."),
    ("train.lr=fast", "train.lr is 'fast', not a number. Write for example train.lr: 0.02."),
    ("train.lr=.nan", "train.lr is nan, not a finite number. Write for example train.lr: 0.02."),
    ("train.steps=0", "train.steps is 0; it must be at least 1. Write for example train.steps: 300."),
    ("data.holdout=1", "data.holdout is 1; it must be less than 1. Write for example data.holdout: 0.0."),
    ("gate.init_std=-0.1", "gate.init_std is -0.1; it must be at least 0. Write for example gate.init_std: 0.0."),
    ("gate.init_std=.inf", "gate.init_std is inf, not a finite number. Write for example gate.init_std: 0.0."),
    ("gate.top_k=two", "gate.top_k is 'two', not a whole number. Write a whole number."),
    ("allow_partial=3", "allow_partial is 3, not true or false. Write for example allow_partial: false."),
    ("output=3", "output is 3, not text. Write for example output: runs/compose."),
    ("output=''", "output is empty. Write for example output: runs/compose."),
    ("only=3", "only is 3, not a list. Write it in brackets: [...]."),
    ("train=3", "train is 3, not a section of keys. Write its keys indented below it."),
    (
        "mode=gatd",
        f"mode is 'gatd', not one of {', '.join(get_args(Mode))}. Did you mean 'gated'?",
    ),
    ("preset=papr", "preset is 'papr', not one of paper, few-shot. Did you mean 'paper'?"),
    (
        "data.suite=bbh+nil",
        "data.suite is 'bbh+nil', which names no suite 'nil'. Did you mean 'nli'?",
    ),
    ("evaluate.data.suite=bhh", "evaluate.data.suite is 'bhh', which names no suite 'bhh'. Did you mean 'bbh'?"),
    (
        "train.schedule=step",
        "train.schedule is 'step', not one of constant, linear, cosine. Write one of them.",
    ),
    (
        "data.files=[a/t.jsonl, b/t.jsonl]",
        "data.files is ['a/t.jsonl', 'b/t.jsonl'], not a mapping of names to files. "
        "Write `name: FILE` lines, each name once.",
    ),
]


@pytest.mark.parametrize(("text", "message"), SETS, ids=[text for text, _ in SETS])
def test_a_wrong_set(text: str, message: str, explained: Any) -> None:
    explained(lambda: load_recipe(None, "compose", LORAS, [text]), 2, f"--set: {message}")


def test_the_place_of_a_mistake_is_the_layer_that_holds_it(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("train:\n  stepps: 3\n")
    unknown = "unknown key 'train.stepps'. Did you mean 'train.steps'?"
    explained(lambda: load_recipe(file, "compose", LORAS), 2, f"{file}: {unknown}")
    file.write_text("train: {steps: many}\n")
    wrong = "train.steps is {!r}, not a whole number. Write for example train.steps: 300."
    explained(lambda: load_recipe(file, "compose", LORAS), 2, f"{file}: {wrong.format('many')}")
    flags = {**LORAS, "train.steps": "few"}
    explained(lambda: load_recipe(file, "compose", flags), 2, f"command line: {wrong.format('few')}")
    explained(lambda: load_recipe(file, "compose", flags, ["train.steps=x"]), 2, f"--set: {wrong.format('x')}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "--set train: not of the form key=value. Write for example --set train.lr=1e-3."),
        ("train.=3", "--set train.=3: not of the form key=value. Write for example --set train.lr=1e-3."),
        ("seed=[", "--set seed=[: the value is not valid YAML. Quote it: --set 'key=\"value\"'."),
    ],
)
def test_a_malformed_set(text: str, message: str, explained: Any) -> None:
    explained(lambda: load_recipe(None, "compose", LORAS, [text]), 2, message)


FILES = [
    (
        "seed: 1\n\ttrain: 2\n",
        ":2",
        "invalid YAML (found character '\\t' that cannot start any token). Correct that line.",
    ),
    ("loras: [a\nseed: 1\n", ":2", "invalid YAML (expected ',' or ']', but got ':'). Correct that line."),
    ("seed: 1\nseed: 2\n", ":2", "invalid YAML (the key 'seed' is written twice). Correct that line."),
    (
        "x: !!python/object/apply:os.system [ls]\n",
        ":1",
        "invalid YAML (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'). Correct that line.",
    ),
    ("- a\n- b\n", "", "a recipe is a mapping of keys to values. Write lines such as `mode: gated`."),
    ("command: compse\n", "", "unknown command 'compse'. Did you mean 'compose'?"),
]


@pytest.mark.parametrize(("text", "line", "message"), FILES, ids=[text.split("\n")[0] for text, _, _ in FILES])
def test_a_file_that_is_no_recipe(text: str, line: str, message: str, tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    explained(lambda: load_recipe(file, "compose"), 2, f"{file}{line}: {message}")


def test_a_file_that_is_no_text(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    explained(
        lambda: load_recipe(file, "compose"), 2, f"{file}: the recipe cannot be read (not UTF-8 text). Check the path."
    )


def test_a_recipe_for_another_command(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("command: train-lora\n")
    message = f"{file}: this recipe is for train-lora, not for compose. Run mole train-lora {file}."
    explained(lambda: load_recipe(file, "compose"), 2, message)


def test_a_recipe_without_its_command(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("seed: 1\n")
    message = f"{file}: the key 'command' is missing. Write command: {' | '.join(RECIPES)}."
    explained(lambda: load_recipe(file), 2, message)


def test_a_missing_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, explained: Any) -> None:
    monkeypatch.setattr(catalog, "recipes", lambda: {"text/demo": tmp_path / "demo.yaml"})
    remedy = "`mole recipe ls` lists them."
    message = f"text/dem.yaml: no such recipe. Did you mean 'text/demo'? {remedy}"
    explained(lambda: load_recipe("text/dem.yaml", "compose"), 2, message)
    explained(lambda: load_recipe("zzz", "compose"), 2, f"zzz: no such recipe. Known: text/demo. {remedy}")


def test_the_beginning_of_names_names_those_recipes(monkeypatch: pytest.MonkeyPatch, explained: Any) -> None:
    names = ("paper/table3-bbh", "paper/table3-nli", "paper/table9", "paper/table10")
    monkeypatch.setattr(catalog, "recipes", lambda: dict.fromkeys(names))
    for name, remedy in {
        "paper/table3": "Write one of: paper/table3-bbh, paper/table3-nli.",
        "paper/table3.yaml": "Write one of: paper/table3-bbh, paper/table3-nli.",
        "paper/table1": "Did you mean 'paper/table10'?",
        "paper/tabel9": "Did you mean 'paper/table9'?",
    }.items():
        message = f"{name}: no such recipe. {remedy} `mole recipe ls` lists them."
        explained(lambda name=name: load_recipe(name, "study"), 2, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"base": "org/base", "loras": None},
            "loras: no LoRA is named for the base org/base. Write --loras a=PATH,b=PATH.",
        ),
        (
            {"loras": "x=org/a,x=org/b"},
            "--loras: the name 'x' is used twice. Give each LoRA its own name: name=PATH.",
        ),
        (
            {"mode": "single"},
            "only: mode single needs exactly one LoRA. Write --only NAME, one of: x, y.",
        ),
        (
            {"gate": {"top_k": 3}},
            "gate.top_k: 3 is more than the 2 LoRAs. Lower it.",
        ),
        (
            {"data": {"suite": "jsonl", "files": "t.jsonl"}, "evaluate": {"metrics": "accuracy"}},
            "evaluate.data.files: suite jsonl has no test split, and no file to score is named. "
            "Name one, or write evaluate: null.",
        ),
    ],
)
def test_values_that_do_not_fit_together(values: Any, message: str, explained: Any) -> None:
    explained(lambda: load_recipe(None, "compose", {**LORAS, **values}), 2, message)


def test_a_name_that_cannot_be_typed(explained: Any) -> None:
    message = "--loras a b=org/a: 'a b' is not a valid name (letters, digits, '_', '-' and '.'). "
    message += "Choose another: name=PATH."
    loras = [{"name": "a b", "source": "org/a"}]
    explained(lambda: load_recipe(None, "sample", {"loras": loras}), 2, message)


def test_a_lora_has_no_gates_to_balance(explained: Any) -> None:
    message = "--set: train.balance is 0.5; it must be at most 0. Write for example train.balance: 0.0."
    explained(lambda: load_recipe(None, "train-lora", {}, ["train.balance=0.5"]), 2, message)
