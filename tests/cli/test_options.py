"""Flags: made from recipe fields, they override the recipe and lie below --set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molecli.cli import compose, evaluate, export, inspect_gates, sample, train_lora
from molecli.cli.options import Flag, Request, Toggle, recipe_command
from molecli.cli.single import single
from molecli.config import RECIPES
from molecli.config.defaults import IMAGE_DEFAULTS

MODULES = {
    "compose": compose,
    "evaluate": evaluate,
    "sample": sample,
    "train-lora": train_lora,
    "inspect-gates": inspect_gates,
    "export": export,
}
EVERYWHERE = {"--base", "--gguf-file", "--dtype", "--device", "--seed", "--limit", "--batch-size", "--output"}


def _asked(*arguments: str, flags: tuple[Flag | Toggle, ...] = compose.FLAGS, command: str = "compose") -> Request:
    """The request that a command line makes."""
    seen: list[Request] = []
    run = recipe_command(command, target=("RECIPE", ""), flags=flags)(seen.append)
    single(run)(args=list(arguments), standalone_mode=False)
    return seen[0]


@pytest.mark.parametrize("command", list(MODULES))
def test_every_flag_overrides_a_field_that_exists(command: str) -> None:
    model = RECIPES[command]
    for flag in MODULES[command].FLAGS:
        if isinstance(flag, Flag):
            assert flag.key.split(".")[0] in model.model_fields


@pytest.mark.parametrize("command", list(MODULES))
def test_the_flags_that_every_command_has(command: str) -> None:
    names = {flag.name for flag in MODULES[command].FLAGS}
    without = {"--limit"} if command == "sample" else set()
    assert names >= EVERYWHERE - without


def test_a_flag_overrides_the_recipe_and_set_overrides_the_flag(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("command: compose\nloras: [a=x, b=y]\ntrain: {steps: 7, lr: 0.1, batch_size: 3}\n")
    recipe: Any = _asked(str(file), "--steps", "8", "--lr", "0.2", "--set", "train.lr=0.3").recipe(str(file))
    assert (recipe.train.steps, recipe.train.lr, recipe.train.batch_size) == (8, 0.3, 3)


def test_a_flag_that_is_not_given_overrides_nothing() -> None:
    assert _asked().overrides == {}


def test_own_files_imply_the_suite_that_reads_them() -> None:
    request = _asked("--files", "x.jsonl, y.jsonl")
    assert request.overrides == {"data.files": ["x.jsonl", "y.jsonl"], "data.suite": "jsonl"}


@pytest.mark.parametrize(
    ("arguments", "mask"),
    [
        (("--mask", "a,b"), ("a", "b")),
        (("--mask", ""), ()),
        (("--mask", "a", "--mask", "b,c", "--mask", ""), (("a",), ("b", "c"), ())),
    ],
)
def test_a_flag_that_may_be_given_again_is_one_list_of_names_for_each_time(
    arguments: tuple[str, ...], mask: tuple[Any, ...]
) -> None:
    recipe: Any = _asked(*arguments, flags=evaluate.FLAGS, command="evaluate").recipe(None)
    assert (recipe.mask, recipe.only) == (mask, ())


def test_a_weighted_lora_is_read_from_the_command_line() -> None:
    recipe: Any = _asked("--loras", "u=p/q@0.5,v=w").recipe(None)
    assert [(lora.name, lora.source, lora.weight) for lora in recipe.loras] == [("u", "p/q", 0.5), ("v", "w", 1.0)]


def test_the_help_of_a_flag_is_the_description_and_default_of_its_field(mole: Callable[..., Any]) -> None:
    field = RECIPES["compose"].model_fields["train"].annotation.model_fields["steps"]  # type: ignore[union-attr]
    text = " ".join(mole("compose", "--help").out.split())
    assert f"--steps N {field.description} [default: {field.default}]" in text
    of_pictures = IMAGE_DEFAULTS["compose"]["train"]["batch_size"]
    assert f"[default: 16; images: {of_pictures}]" in text
    assert f"[default: auto; images: {IMAGE_DEFAULTS['compose']['gate']['pool']}]" in text
