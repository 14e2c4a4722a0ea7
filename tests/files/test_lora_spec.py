"""How a LoRA is written: name=PATH@WEIGHT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molecli.adapters import resolve_source
from molecli.catalog import builtin as catalog
from molecli.files.lora_spec import LoraSpec, parse_lora, parse_loras


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("runs/a", LoraSpec("a", "runs/a")),
        ("runs/a/", LoraSpec("a", "runs/a/")),
        ("x=runs/a", LoraSpec("x", "runs/a")),
        ("x=runs/a@0.7", LoraSpec("x", "runs/a", 0.7)),
        ("runs/a@-1e-2", LoraSpec("a", "runs/a", -0.01)),
        ("deep/style.v1.safetensors", LoraSpec("style.v1", "deep/style.v1.safetensors")),
        ("org/some-lora", LoraSpec("some-lora", "org/some-lora")),
        ("x=org/some-lora@2", LoraSpec("x", "org/some-lora", 2.0)),
        ("runs/lr=1e-3/lora", LoraSpec("lora", "runs/lr=1e-3/lora")),
        ("x=runs/lr=1e-3/lora", LoraSpec("x", "runs/lr=1e-3/lora")),
        ("runs@home/lora", LoraSpec("lora", "runs@home/lora")),
    ],
)
def test_a_lora_is_parsed(text: str, spec: LoraSpec) -> None:
    assert parse_lora(text) == spec


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a package with the built-in LoRAs `alphabet` and `number`."""
    for name in ("alphabet", "number"):
        folder = tmp_path / "package" / "builtin" / "loras" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(catalog, "package_folder", lambda: tmp_path / "package")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package" / "builtin" / "loras"


def test_letters_stand_for_the_builtin_loras_in_order(shipped: Path) -> None:
    assert parse_loras(["a,b@2"]) == (LoraSpec("alphabet", "alphabet"), LoraSpec("number", "number", 2.0))
    assert parse_lora("x=builtin:b") == LoraSpec("x", "number")
    assert resolve_source(LoraSpec("x", "number")) == shipped / "number"


def test_a_lora_of_ones_own_comes_before_a_builtin_one(shipped: Path) -> None:
    Path("a").mkdir()
    assert parse_lora("a").name == "alphabet"  # an empty folder is no LoRA
    (Path("a") / "adapter_config.json").write_text("{}")
    assert parse_lora("a") == LoraSpec("a", "a")
    assert resolve_source(LoraSpec("a", "a")) == Path("a")


def test_a_mistyped_builtin_name_is_corrected(shipped: Path, explained: Any) -> None:
    message = "numbr: no such built-in LoRA, folder or file. Did you mean 'number'?"
    explained(lambda: resolve_source(LoraSpec("numbr", "numbr")), 2, message)


def test_a_list_is_split_at_commas() -> None:
    assert parse_loras(["runs/a,x=runs/b@2", "c"])[:2] == (LoraSpec("a", "runs/a"), LoraSpec("x", "runs/b", 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=", "--loras a=: the path is missing. Write name=PATH or name=PATH@WEIGHT."),
        ("a=x@", "--loras a=x@: the weight '' is not a number. Write name=PATH@0.7."),
        ("a=x@heavy", "--loras a=x@heavy: the weight 'heavy' is not a number. Write name=PATH@0.7."),
        ("a=x@nan", "--loras a=x@nan: the weight 'nan' is not a number. Write name=PATH@0.7."),
        (
            "a b=x",
            "--loras a b=x: 'a b' is not a valid name (letters, digits, '_', '-' and '.'). Choose another: name=PATH.",
        ),
        ("..", "--loras ..: '..' is not a valid name (letters, digits, '_', '-' and '.'). Choose another: name=PATH."),
    ],
)
def test_a_malformed_lora_is_explained(text: str, message: str, explained: Any) -> None:
    explained(lambda: parse_lora(text), 2, message)


def test_a_repeated_name_is_explained(explained: Any) -> None:
    message = "--loras: the name 'a' is used twice. Give each LoRA its own name: name=PATH."
    explained(lambda: parse_loras(["one/a", "two/a"]), 2, message)
