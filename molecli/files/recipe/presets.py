"""Named sets of recipe values. A preset lies below every explicit value and above the defaults."""

from __future__ import annotations

from typing import Any

# command -> preset -> values
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "compose": {
        # Source: Wu et al., Mixture of LoRA Experts, ICLR 2024, section 4.1 (text settings) and Eq. 9-10.
        "paper": {
            "gate": {"input": "experts", "normalize": "unit", "pool": "auto", "head": "full"},
            "train": {
                "lr": 1e-5,
                "steps": 800,
                "batch_size": 12,
                "balance": 0.5,
                "schedule": "constant",
                "warmup_steps": 0,
            },
        },
    },
}
