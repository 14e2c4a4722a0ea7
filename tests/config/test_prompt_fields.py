"""How prompts are written, as keys of a base: short forms, types, and recipes that repeat them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molecli.config import BaseConfig, dump_recipe, load_recipe
from molecli.config.shorthand import as_pairs
from molecli.errors import UsageError
from molecli.files.base_source import PROMPT_FLAGS


@pytest.mark.parametrize(
    ("text", "value"),
    [("x=false", False), ("x=3", 3), ("x=0.5", 0.5), ("x=a b", "a b"), ("x=2025-01-02", "2025-01-02"), ("x=", "")],
)
def test_a_pair_is_read_as_yaml_and_a_date_stays_text(text: str, value: Any) -> None:
    assert as_pairs([text], "--template-arg") == {"x": value}
    assert type(as_pairs([text], "--template-arg")["x"]) is type(value)


def test_later_pairs_win_and_a_value_may_hold_an_equals_sign() -> None:
    assert as_pairs(["x=1", "y=a=b", "x=2"], "--template-arg") == {"x": 2, "y": "a=b"}


@pytest.mark.parametrize("text", ["x", "=1", " =1"])
def test_a_pair_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not of the form KEY=VALUE"):
        as_pairs([text], "--template-arg")


@pytest.mark.parametrize("text", ["x=null", "x=[1, 2]", "x={a: 1}"])
def test_a_value_is_one_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"base\.template_args\.x: .* is not text, a number, true or false"):
        as_pairs([text], "--template-arg")


@pytest.mark.parametrize("command", ["train-lora", "compose", "sample", "evaluate"])
def test_a_recorded_recipe_has_them_all(command: str, tmp_path: Path) -> None:
    base = {
        "id": "x", "chat_template": False, "template_file": "t.jinja", "system_prompt": "Be brief.",
        "template_args": {"a": True, "b": 0.5}, "source_language": "en_XX", "target_language": "fr_XX",
    }  # fmt: skip
    assert set(base) == {"id", *PROMPT_FLAGS}
    recipe = load_recipe(None, command, {"base": base, **({"loras": ["a=y"]} if command == "compose" else {})})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    again: Any = load_recipe(file)
    assert again == recipe
    assert again.base.model_dump(include=set(base)) == base


def test_an_unknown_key_of_a_base_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'base\.system_promt'\. Did you mean 'base\.system_prompt'"):
        load_recipe(None, "sample", {"base.system_promt": "x"})


def test_a_base_has_no_prompt_settings_by_itself() -> None:
    assert all(getattr(BaseConfig(), key) in (None, {}, True) for key in PROMPT_FLAGS)
