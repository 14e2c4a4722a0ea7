"""Named sets of recipe values. A preset lies below every explicit value and above the defaults."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["paper", "few-shot"]
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
        # A handful of examples of a task that no LoRA was trained on: what benchmarks/studies/unseen-choice.yaml chose
        # without a test set, and unseen.yaml found best on BIG-Bench Hard with five examples of each task.
        "few-shot": {
            "gate": {"granularity": "matrix", "pool": "token"},
            "train": {"steps": 40, "batch_size": 5, "warmup_steps": 5},
        },
    },
}

# The same for a diffusion base.
IMAGE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "compose": {
        # Source: Wu et al., ICLR 2024, section 4.1 (image settings): CLIP guidance, 400 iterations, batch 2, α 0.5.
        "paper": {
            "gate": {"input": "experts", "normalize": "unit", "pool": "mean", "head": "full"},
            "objective": {"denoise": 0.0, "clip": 1.0, "clip_local": 0.5},
            "image": {"scheduler": "ddpm", "steps": 50, "guidance": 7.5},
            "train": {
                "lr": 1e-5,
                "steps": 400,
                "batch_size": 2,
                "balance": 0.5,
                "schedule": "constant",
                "warmup_steps": 0,
            },
        },
    },
}
