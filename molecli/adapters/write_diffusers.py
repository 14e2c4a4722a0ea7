"""Writes low-rank factors of a pipeline as a folder for diffusers' `load_lora_weights`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from molecli.adapters.keys import CLIP_PREFIX, filed
from molecli.adapters.lora_config import exact_pattern, lora_config
from molecli.adapters.metadata import CONFIG_KEYS
from molecli.experts import LowRank
from molecli.files.atomic import atomic_folder
from molecli.files.lora_spec import DIFFUSERS_FILE


def write_diffusers(
    folder: str | Path,
    factors: Mapping[str, LowRank],
    *,
    metadata: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Path:
    """Writes `factors` (unet.…, text_encoder.…, text_encoder_2.…) for diffusers; returns the folder.

    Ranks and alphas are stored as by diffusers: one LoraConfig per component in the file's metadata, together with
    `metadata` (`base_model_name_or_path` names the base). Raises: RunError if the folder cannot be written.
    """
    components: dict[str, dict[str, LowRank]] = {}
    tensors: dict[str, Tensor] = {}
    for name, low_rank in factors.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path.removeprefix(CLIP_PREFIX)] = low_rank
        key = f"{component}.{filed(component, path)}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = stored(low_rank)
    config = {f"{c}.{key}": value for c, part in components.items() for key, value in _config(c, part).items()}
    text = json.dumps(config, indent=2, sort_keys=True)
    with atomic_folder(folder, replace=replace) as part:
        save_file(tensors, part / DIFFUSERS_FILE, metadata={"format": "pt", **(metadata or {}), CONFIG_KEYS[0]: text})
    return Path(folder)


def stored(low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """(A, B) as stored in files: B of a convolution is a 1x1 kernel, [c_out, r, 1, 1]."""
    a, b = low_rank.A, low_rank.B
    # Copies, because safetensors refuses tensors that share memory, such as views of stacked factors.
    return a.detach().cpu().contiguous().clone(), b.detach().cpu().reshape(
        *b.shape, *[1] * (a.ndim - 2)
    ).contiguous().clone()


def _config(component: str, factors: Mapping[str, LowRank]) -> dict[str, Any]:
    return lora_config(factors, exact_pattern if component == "unet" else _with_or_without_prefix)


def _with_or_without_prefix(path: str) -> str:
    # The release of transformers determines which of the two names CLIP's modules have.
    return f"^({re.escape(CLIP_PREFIX)})?{re.escape(path)}"
