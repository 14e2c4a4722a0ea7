"""A composition is saved whole, loaded as it was, and refuses what it was not made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molecli.experts import Expert, ExpertBank, LowRank
from molecli.files.composition import (
    Composition,
    check_base,
    check_experts,
    load_composition,
    record_of,
    save_composition,
)


def expert(name: str, *, rank: int = 2, alpha: float = 4.0, sha256: str = "ab" * 32, scaling: float = 2.0) -> Expert:
    factors = {m: LowRank(torch.ones(rank, 4), torch.ones(3, rank), scaling) for m in ("encoder.q", "encoder.v")}
    return Expert(name, factors, source=f"loras/{name}", sha256=sha256, rank=rank, alpha=alpha)


@pytest.fixture
def bank() -> ExpertBank:
    return ExpertBank([expert("a"), expert("b", rank=3, alpha=5.0, sha256="cd" * 32)])


@pytest.fixture
def composition(bank: ExpertBank) -> Composition:
    return Composition(
        mode="gated",
        level="site",
        base="org/base",
        base_fingerprint="f1",
        experts=tuple(record_of(e) for e in bank.experts),
        gate={"granularity": "layer", "top_k": None},
        settings={"mode": "gated"},
        recipe="command: compose\nname: é\n",
        tensors={"site/encoder/weight": torch.randn(2, 4), "site/encoder/log_temperature": torch.tensor(0.1)},
        version="0.1.0",
    )


def change(file: Path, **metadata: str | None) -> None:
    """Rewrites `file` with some metadata keys changed, or removed where None."""
    with safe_open(str(file), framework="pt") as opened:
        merged = {**opened.metadata(), **metadata}
    save_file(load_file(file), file, metadata={key: value for key, value in merged.items() if value is not None})


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_composition_is_loaded_as_it_was_saved(by_folder: bool, composition: Composition, tmp_path: Path) -> None:
    file = save_composition(tmp_path / "run", composition)
    loaded = load_composition(tmp_path / "run" if by_folder else file)
    assert loaded.tensors.keys() == composition.tensors.keys()
    assert all(torch.equal(tensor, composition.tensors[name]) for name, tensor in loaded.tensors.items())
    assert replace(loaded, tensors={}) == replace(composition, tensors={})
    assert (tmp_path / "run" / "recipe.yaml").read_text("utf-8") == composition.recipe
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["composition.safetensors", "recipe.yaml"]


def test_a_composition_without_tensors_and_gate_is_kept(composition: Composition, tmp_path: Path) -> None:
    static = replace(composition, mode="linear", level="weights", gate=None, tensors={})
    save_composition(tmp_path, static)
    assert load_composition(tmp_path) == static


def test_the_metadata_is_that_of_the_contract(composition: Composition, tmp_path: Path) -> None:
    with safe_open(str(save_composition(tmp_path, composition)), framework="pt") as opened:
        metadata = opened.metadata()
    assert {"format": "mole", "format_version": "1", "mode": "gated", "level": "site"}.items() <= metadata.items()
    contract = ["base", "base_fingerprint", "experts", "gate", "recipe", "recipe_sha256", "molecli_version"]
    assert set(contract) <= metadata.keys()


def test_the_version_that_made_it_is_noted(composition: Composition, tmp_path: Path) -> None:
    save_composition(tmp_path, replace(composition, version=""))
    assert load_composition(tmp_path).version != ""


# Damage


def test_a_missing_composition(tmp_path: Path, explained: Any) -> None:
    path = tmp_path / "none"
    explained(
        lambda: load_composition(path), 2, f"{path}: no such composition. Name the output folder of mole compose."
    )
    message = f"{tmp_path}: it has no composition.safetensors. Name the output folder of a finished mole compose."
    explained(lambda: load_composition(tmp_path), 2, message)


def test_a_truncated_composition(composition: Composition, tmp_path: Path, explained: Any) -> None:
    file = save_composition(tmp_path, composition)
    file.write_bytes(file.read_bytes()[:-4])
    message = f"{file}: it is a damaged safetensors file (incomplete metadata, file not fully covered). Compose again."
    explained(lambda: load_composition(file), 3, message)


def test_a_safetensors_file_that_is_no_composition(tmp_path: Path, explained: Any) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, file)
    message = f"{file}: this is not a composition. Name the output folder of mole compose."
    explained(lambda: load_composition(file), 3, message)


def test_a_gate_that_is_not_finite(composition: Composition, tmp_path: Path, explained: Any) -> None:
    composition.tensors["site/encoder/weight"][1, 2] = float("nan")
    file = save_composition(tmp_path, composition)
    message = f"{file}: 'site/encoder/weight' holds NaN or infinity. Compose again."
    explained(lambda: load_composition(tmp_path), 3, message)


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        (
            {"format_version": "2"},
            "it has format version 2, and this version of mole reads 1. Update mole, or compose again.",
        ),
        ({"base_fingerprint": None}, "its metadata lacks 'base_fingerprint'. Compose again."),
        ({"experts": "[{]"}, "its metadata key 'experts' is damaged. Compose again."),
        ({"experts": '[{"name": "a"}]'}, "its metadata key 'experts' is damaged. Compose again."),
        ({"gate": "[1]"}, "its metadata key 'gate' is damaged. Compose again."),
        ({"recipe": "command: other"}, "its recipe does not match recipe_sha256. Compose again."),
    ],
)
def test_damaged_metadata(metadata: Any, what: str, composition: Composition, tmp_path: Path, explained: Any) -> None:
    file = save_composition(tmp_path, composition)
    change(file, **metadata)
    explained(lambda: load_composition(tmp_path), 3, f"{file}: {what}")


# Belonging


def test_the_experts_it_was_made_with_are_accepted(composition: Composition, bank: ExpertBank) -> None:
    check_experts(composition, bank)


ORDER = "Give them in this order: a, b."
CONFIG = "Restore its adapter_config.json, or compose again."
OTHER: dict[str, tuple[Callable[[ExpertBank], ExpertBank], str]] = {
    "too few": (
        lambda bank: ExpertBank(bank.experts[:1]),
        f"--loras: 1 LoRAs are given, and the composition was made with 2. {ORDER}",
    ),
    "another order": (lambda bank: bank.permuted([1, 0]), f"--loras: the order is b, a. {ORDER}"),
    "another name": (lambda bank: bank.renamed(1, "c"), f"c: the composition has 'b' in this place. {ORDER}"),
    "other weights": (
        lambda bank: ExpertBank([bank.experts[0], replace(bank.experts[1], sha256="ef" * 32)]),
        "b: its weights differ from those in the composition (efefefefefef, not cdcdcdcdcdcd). "
        "Give the LoRA from loras/b, or compose again.",
    ),
    "another rank": (
        lambda bank: ExpertBank([replace(bank.experts[0], rank=8), bank.experts[1]]),
        f"a: its rank is 8, and the composition was made with 2. {CONFIG}",
    ),
    "another alpha": (
        lambda bank: ExpertBank([replace(bank.experts[0], alpha=16.5), bank.experts[1]]),
        f"a: its alpha is 16.5, and the composition was made with 4. {CONFIG}",
    ),
    "another alpha_pattern": (
        lambda bank: ExpertBank([expert("a", scaling=2.5), bank.experts[1]]),
        f"a: its matrices or their scalings differ from those in the composition. {CONFIG}",
    ),
}


@pytest.mark.parametrize(("other", "message"), OTHER.values(), ids=OTHER)
def test_other_experts_are_refused(
    other: Callable[[ExpertBank], ExpertBank], message: str, composition: Composition, bank: ExpertBank, explained: Any
) -> None:
    explained(lambda: check_experts(composition, other(bank)), 3, message)


def test_the_base_is_compared_by_its_fingerprint(composition: Composition, explained: Any) -> None:
    check_base(composition, "f1")
    check_base(composition, "F1", lambda one, other: one.lower() == other.lower())
    message = "the composition was made on org/base, whose weights differ from this base's. "
    message += "Give --base org/base, or compose again."
    explained(lambda: check_base(composition, "f2", base="org/other"), 3, f"org/other: {message}")
    explained(lambda: check_base(composition, "f2"), 3, f"--base: {message}")
