"""A tiny base that draws, three LoRAs on it with their concepts, and a gated composition of them, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_pipelines import attention_only, make_expert

from molecli import __version__
from molecli.adapters import write_diffusers
from molecli.catalog.methods import get_method
from molecli.config import dump_recipe, load_recipe
from molecli.files.composition import Composition, record_of, save_composition
from molecli.files.concepts import Concept, write_concept
from molecli.functional.fingerprint import fingerprint
from molecli.mixture.attach import attach

KINDS = {"cat": "character", "hat": "clothing", "sea": "background"}


class PictureWorld(NamedTuple):
    """The base, the LoRAs by name, and the composition of all three."""

    base: Path
    loras: dict[str, Path]
    gated: Path

    def named(self, *names: str) -> str:
        """--loras for those LoRAs, or for all."""
        return ",".join(f"{name}={self.loras[name]}" for name in names or self.loras)


def build_world(folder: Path, base: Path, pipe: Any) -> PictureWorld:
    """The world in `folder`, on the pipeline `pipe` that is saved at `base`."""
    from molecli.mixture.layout import adaptable_matrices, host_of

    model = host_of(pipe)
    loras = {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        expert = make_expert(name, adaptable_matrices(model), seed=seed, keep=attention_only)
        loras[name] = write_diffusers(folder / name, expert.factors)
        write_concept(loras[name], Concept(name, f"a {name}", name, kind))
    recipe = load_recipe(
        None,
        "compose",
        {
            "base.id": str(base),
            "loras": [f"{name}={path}" for name, path in loras.items()],
            "gate.granularity": "block",
            "output": str(folder / "gated"),
        },
    )
    mixture = attach(pipe, loras={n: str(p) for n, p in loras.items()}, mode="gated", gate=recipe.gate)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.named_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    composition = Composition(
        mode="gated",
        level=get_method("gated").level,
        base=str(base),
        base_fingerprint=fingerprint(model),
        experts=tuple(record_of(expert) for expert in mixture.bank.experts),
        gate=recipe.gate.model_dump(mode="json"),  # type: ignore[union-attr]
        settings={},
        recipe=dump_recipe(recipe),
        tensors=mixture.state_dict(),
        version=__version__,
    )
    save_composition(folder / "gated", composition)
    return PictureWorld(base, loras, folder / "gated")
