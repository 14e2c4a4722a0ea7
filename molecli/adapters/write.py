"""Writes low-rank factors as a folder that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from molecli.adapters.keys import PEFT_PREFIX
from molecli.adapters.lora_config import lora_config
from molecli.adapters.write_diffusers import stored
from molecli.adapters.write_fused import Parameters, stacks
from molecli.experts import LowRank
from molecli.files.atomic import atomic_folder
from molecli.files.lora_spec import CONFIG_FILE, WEIGHTS_FILE

# PEFT's configuration, the part that is equal for all LoRAs.
_CONFIG = {
    "peft_type": "LORA",
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "inference_mode": True,
}


def write_peft(
    folder: str | Path,
    factors: Mapping[str, LowRank],
    base: str,
    *,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    parameters: Parameters | None = None,
    replace: bool = False,
) -> Path:
    """Writes `factors` (matrix name -> A, B, scaling) for PEFT to compute the same updates; returns the folder.

    The most frequent rank and alpha become `r` and `lora_alpha`, the others patterns. `fan_in_fan_out` is for bases
    with transposed layers (GPT-2); it changes no factor. `parameters` are the base's that no layer holds: factors of
    their matrices are written as PEFT's target_parameters. Raises: RunError if the folder cannot be written.
    """
    with atomic_folder(folder, replace=replace) as part:
        fused = stacks(factors, parameters or {})
        of_parameters = {name for names in (parameters or {}).values() for name in names}
        plain = {matrix: low_rank for matrix, low_rank in factors.items() if matrix not in of_parameters}
        tensors = {}
        for key, low_rank in [*plain.items(), *((stack.key, LowRank(stack.A, stack.B, 1.0)) for stack in fused)]:
            for name, factor in zip("AB", stored(low_rank), strict=True):
                tensors[f"{PEFT_PREFIX}{key}.lora_{name}.weight"] = factor
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        settings = lora_config(plain | {stack.name: stack.one for stack in fused})
        settings |= {"target_modules": list(plain), "target_parameters": [stack.name for stack in fused] or None}
        config = {**_CONFIG, **settings, "base_model_name_or_path": base}
        config |= {"task_type": task_type, "fan_in_fan_out": fan_in_fan_out}
        (part / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)
