"""Low-rank factors as a folder that PEFT loads."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from molecli.experts import LowRank
from molecli.files.adapters.weights import PEFT_PREFIX
from molecli.files.atomic import atomic_folder
from molecli.files.lora_spec import CONFIG_FILE, WEIGHTS_FILE


def write_peft(
    folder: str | Path,
    factors: Mapping[str, LowRank],
    base: str,
    *,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    replace: bool = False,
) -> Path:
    """The folder, holding `factors` (matrix name -> A, B, scaling) so that PEFT computes the same updates.

    The commonest rank and alpha become `r` and `lora_alpha`, the others patterns. `fan_in_fan_out` is for bases
    with transposed layers (GPT-2); it changes no factor. Raises: RunError when the folder cannot be written.
    """
    with atomic_folder(folder, replace=replace) as part:
        tensors = {}
        for matrix, low_rank in factors.items():
            tensors[f"{PEFT_PREFIX}{matrix}.lora_A.weight"] = low_rank.A.detach().cpu().contiguous()
            tensors[f"{PEFT_PREFIX}{matrix}.lora_B.weight"] = low_rank.B.detach().cpu().contiguous()
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        config = _config(factors, base) | {"task_type": task_type, "fan_in_fan_out": fan_in_fan_out}
        (part / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def _config(factors: Mapping[str, LowRank], base: str) -> dict[str, Any]:
    ranks = {matrix: low_rank.rank for matrix, low_rank in factors.items()}
    alphas = {matrix: _alpha(low_rank) for matrix, low_rank in factors.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(m): a for m, a in alphas.items() if a != alpha},
        "target_modules": list(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exactly(matrix: str) -> str:
    # PEFT matches a pattern at the end of a name; the anchor keeps "decoder.q" from meaning "x.decoder.q" too.
    return f"^{re.escape(matrix)}"


def _alpha(low_rank: LowRank) -> float:
    """The alpha for which alpha / r is the scaling to the last bit, as an integer where it is one."""
    alpha = low_rank.scaling * low_rank.rank
    near = (alpha, float(round(alpha)), math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    exact = next((a for a in near if a / low_rank.rank == low_rank.scaling), alpha)
    return int(exact) if exact.is_integer() else exact
