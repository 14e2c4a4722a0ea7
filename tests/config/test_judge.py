"""The judge's section: an address, the name of a variable, and no place where a key could be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from molecli.config import EvaluateRecipe, JudgeConfig, dump_recipe, load_recipe
from molecli.errors import UsageError

SECRET = "sk-secret-0123456789"


def judge(*sets: str) -> JudgeConfig:
    recipe = load_recipe(None, "evaluate", {}, [f"judge.{text}" for text in sets])
    assert isinstance(recipe, EvaluateRecipe)
    assert recipe.judge is not None
    return recipe.judge


def test_without_the_section_nothing_is_judged() -> None:
    recipe = load_recipe(None, "evaluate")
    assert isinstance(recipe, EvaluateRecipe)
    assert recipe.judge is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://host/api/v1/", "https://host/api/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_an_endpoint_is_its_base(written: str, read: str) -> None:
    assert judge(f"endpoint={written}").endpoint == read


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "https://", "http://[::1", "http://h:x/v1", "http://a b"]
)
def test_an_endpoint_that_is_no_address(url: str, explained: Callable[[Any, int, str], None]) -> None:
    message = "judge.endpoint: this is not a web address. Write one such as https://api.openai.com/v1."
    explained(lambda: judge(f"endpoint='{url}'"), 2, message)


@pytest.mark.parametrize(
    "url", [f"https://me:{SECRET}@host/v1", f"https://{SECRET}@host", f"https://host/v1?key={SECRET}"]
)
def test_an_endpoint_with_a_secret_in_it_is_refused_unseen(
    url: str, explained: Callable[[Any, int, str], None]
) -> None:
    what = "judge.endpoint: it holds more than a host and a path, and a recipe is written to disk. "
    explained(lambda: judge(f"endpoint={url}"), 2, what + "Keep the key in the variable that judge.key_env names.")


@pytest.mark.parametrize("name", [SECRET, "hf_AbCd0123", "A B", "''", "1A"])
def test_a_key_in_the_place_of_its_variable_is_refused_unseen(
    name: str, explained: Callable[[Any, int, str], None]
) -> None:
    what = "judge.key_env: this is not the name of an environment variable (capitals, digits and '_'). "
    explained(
        lambda: judge(f"key_env={name}"), 2, what + "Write the variable's name here, and the key into the environment."
    )


def test_there_is_no_field_for_a_key(explained: Callable[[Any, int, str], None]) -> None:
    message = "--set: unknown key 'judge.key'. Did you mean 'judge.key_env'?"
    explained(lambda: judge(f"key={SECRET}"), 2, message)


def test_further_fields_of_the_request(explained: Callable[[Any, int, str], None]) -> None:
    assert judge("options={temperature: 0, max_tokens: 2048}").options == {"temperature": 0, "max_tokens": 2048}
    message = "judge.options.model: mole fills this field of the request itself. Leave it out."
    explained(lambda: judge("options={model: x}"), 2, message)
    message = "judge.options: this is not a mapping. Write for example judge.options: {temperature: 0}."
    explained(lambda: judge("options=3"), 2, message)


@pytest.mark.parametrize(
    "text", ["timeout_s=0", "retries=-1", "pause_s=-1", "max_pause_s=.inf", "concurrency=0", "model=''"]
)
def test_a_number_out_of_range(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        judge(text)
    assert str(caught.value).startswith(f"--set: judge.{text.partition('=')[0]} is ")


def test_the_written_recipe_holds_the_variable_and_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    recipe = load_recipe(None, "evaluate", {}, ["judge.key_env=MY_KEY", "judge.options={seed: 1}"])
    text = dump_recipe(recipe)
    assert SECRET not in text
    assert yaml.safe_load(text)["judge"]["key_env"] == "MY_KEY"
    assert EvaluateRecipe.model_validate(yaml.safe_load(text)) == recipe
