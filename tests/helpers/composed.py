"""Compositions saved as `mole compose` saves them, without training: gates are random, fixed modes are themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from molecli.adapters import LoraSpec
from molecli.catalog.methods import get_method
from molecli.config import ExportRecipe, dump_recipe, load_recipe
from molecli.files.composition import Composition, record_of, save_composition
from molecli.functional.fingerprint import fingerprint
from molecli.mixture.attach import read_experts
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import host_of


def save_composed(folder: Path, base: Path, model: Any, loras: Mapping[str, Path], mode: str, **sections: Any) -> Path:
    """The folder, holding a composition of the LoRAs (name -> path) on `model`, which is saved at `base`.

    `sections` are laid over the recipe, by dotted key; `weights` are those of a fixed mode, by name.
    """
    named = {"base.id": str(base), "loras": [f"{name}={path}" for name, path in loras.items()], "mode": mode}
    weights = sections.pop("weights", {})
    recipe: Any = load_recipe(None, "compose", {**named, "output": str(folder), **sections})
    host = host_of(model)
    experts = read_experts(host, [LoraSpec(name, str(path)) for name, path in loras.items()])
    mixture = build_mixture(host, experts, mode=mode, gate=recipe.gate, weights=weights, method=recipe.method)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.named_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    row = get_method(mode)
    composition = Composition(
        mode=mode,
        level=row.level,
        base=str(base),
        base_fingerprint=fingerprint(host),
        experts=tuple(record_of(expert) for expert in experts),
        gate=recipe.gate.model_dump(mode="json") if row.level == "site" else None,
        settings={"method": recipe.method.model_dump(mode="json")}
        if row.level == "output" or row.family == "merges"
        else {},
        recipe=dump_recipe(recipe),
        tensors=mixture.state_dict(),
    )
    save_composition(folder, composition)
    return folder


def export_recipe(composition: Path, output: Path, **changes: Any) -> ExportRecipe:
    """The export of `composition` on the CPU; `changes` by dotted key."""
    recipe = load_recipe(
        None, "export", {"composition": str(composition), "output": str(output), "device": "cpu", **changes}
    )
    assert isinstance(recipe, ExportRecipe)
    return recipe
