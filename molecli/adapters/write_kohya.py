"""Writes low-rank factors of a pipeline as one file in kohya's layout, for A1111, ComfyUI and diffusers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from molecli.adapters.blocks import original_names
from molecli.adapters.keys import filed, underscored
from molecli.adapters.lora_config import exact_alpha
from molecli.adapters.write_diffusers import stored
from molecli.experts import LowRank
from molecli.files.atomic import write_with


def write_kohya(
    file: str | Path,
    factors: Mapping[str, LowRank],
    matrices: Iterable[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `factors` (unet.…, text_encoder.…, text_encoder_2.…), each with its alpha, in float32; returns the file.

    `matrices` names all matrices of the base. They show the numbers of its blocks, and whether it is SDXL, whose UNet
    has the original block names in this layout. Raises: RunError if the file cannot be written.
    """
    names = kohya_names(matrices)
    tensors: dict[str, Tensor] = {}
    for name, low_rank in factors.items():
        key = names[name]
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = stored(low_rank)
        tensors[f"{key}.alpha"] = torch.tensor(float(exact_alpha(low_rank)))
    return write_with(file, lambda part: save_file(tensors, part, metadata={"format": "pt", **(metadata or {})}))


def with_one_alpha(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same updates with B rescaled so that every alpha is the most frequent rank.

    Some readers of kohya's layout, such as diffusers, use one alpha for many matrices.
    """
    alpha = Counter(low_rank.rank for low_rank in factors.values()).most_common(1)[0][0]
    return {name: _at_alpha(low_rank, alpha) for name, low_rank in factors.items()}


def _at_alpha(low_rank: LowRank, alpha: float) -> LowRank:
    scaling = alpha / low_rank.rank
    return LowRank(low_rank.A, low_rank.B * (low_rank.scaling / scaling), scaling)


def kohya_names(matrices: Iterable[str]) -> dict[str, str]:
    """matrix of a pipeline -> the name of its module in kohya's layout."""
    matrices = list(matrices)
    sdxl = any(name.startswith("text_encoder_2.") for name in matrices)
    originals = original_names(n.removeprefix("unet.") for n in matrices if n.startswith("unet.")) if sdxl else {}
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}
    found = {}
    for name in matrices:
        component, _, path = name.partition(".")
        path = originals.get(path, path) if component == "unet" else filed(component, path)
        found[name] = starts[component] + underscored(path)
    return found
