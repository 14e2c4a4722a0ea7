"""What PEFT computes for an adapter, and the settings worth comparing under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q": 2, "block.1.*.wo": 7}},
    "alpha_pattern": {"alpha_pattern": {r"decoder\..*\.v": 3, "o": 32}},
    "both patterns, rslora": {
        "use_rslora": True,
        "rank_pattern": {"^encoder.block.0.layer.0.SelfAttention.q": 3, "k": 5},
        "alpha_pattern": {"k": 20, "encoder.block.0.layer.0.SelfAttention.q": 1},
    },
}


def matrices_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Adaptable matrices of a test model: name -> (d_out, d_in)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            found[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    return found


def peft_deltas(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """ΔW by matrix as PEFT computes it, [d_out, d_in] whatever the layer's layout."""
    adapted = peft.PeftModel.from_pretrained(model, str(folder)).base_model.model
    deltas = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default")
            deltas[name] = delta.T if module.fan_in_fan_out else delta
    return deltas


def assert_same_deltas(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(delta.abs().max() > 0.01 for delta in theirs.values())
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-6, atol=1e-7)
