"""Defaults that replace those of the fields on a diffusion base, or for an SVDiff adapter. A preset overrides them.

Contents: IMAGE_DEFAULTS, image_defaults, adapter_defaults, image_base, is_pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from molecli.catalog.builtin import (
    BUILTIN_BASE,
    BUILTIN_IMAGE_BASE,
    BUILTIN_PREFIX,
    PIPELINE_FILE,
    builtin_base,
    is_image_lora,
)
from molecli.catalog.suites import DEFAULT_SCENES
from molecli.errors import UsageError

# Sections that only a diffusion base reads; a recipe that has one is for such a base.
_IMAGE_SECTIONS = ("pictures", "image", "objective", "concepts")

IMAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "train-lora": {
        "adapter": {"rank": 8, "alpha": 8, "targets": "attention"},
        "train": {"steps": 500, "batch_size": 2, "lr": 1e-4, "schedule": "constant", "warmup_steps": 0},
    },
    # Separate gate weights for each image position and each prompt token: docs/images.md has the measurement.
    "compose": {"gate": {"pool": "token"}, "train": {"batch_size": 8}, "evaluate": None},
}
_BUILTIN_DEFAULTS: dict[str, dict[str, Any]] = {
    # With so few pixels attention alone is not enough to learn an object that stays recognisable next to others.
    "train-lora": {
        "adapter": {"alpha": 16, "targets": "all-linear"},
        "train": {"batch_size": 8, "lr": 1e-3, "steps": 400},
    },
    # So many steps take under two minutes on two cores, with the preview: about half a CPU second a step.
    "compose": {"train": {"steps": 150}},
    "evaluate": {"eval": {"data": {"suite": DEFAULT_SCENES}}},
}
# Source: Han et al., SVDiff, arXiv 2303.11305: the rate, and training every weight of the UNet.
_SHIFT_RATE = 1e-3
# For the embedded bases, chosen by training loss: they train for few steps, where the published rate changes little.
_BUILTIN_SHIFT_RATES = {BUILTIN_BASE: 5e-2, BUILTIN_IMAGE_BASE: 5e-2}


def image_defaults(command: str, base: str) -> dict[str, Any]:
    """The defaults of `command` on the diffusion base `base`."""
    from molecli.config.tree import merged

    small = _BUILTIN_DEFAULTS.get(command, {}) if base == BUILTIN_IMAGE_BASE else {}
    return merged(IMAGE_DEFAULTS.get(command, {}), small)


def adapter_defaults(tree: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    """The defaults of the adapter that a recipe's tree trains, on the diffusion base `image` or on a language model."""
    adapter, base = tree.get("adapter"), tree.get("base")
    if not isinstance(adapter, Mapping) or adapter.get("method") != "svdiff":
        return {}
    named = base.get("id") if isinstance(base, Mapping) else base
    rate = _BUILTIN_SHIFT_RATES.get(image or str(named or BUILTIN_BASE), _SHIFT_RATE)
    targets = {"adapter": {"targets": "all-linear,conv"}} if image is not None else {}
    return {"train": {"lr": rate}, **targets}


def image_base(tree: Mapping[str, Any]) -> str | None:
    """The id of the diffusion base that a recipe's tree is for; None where it is for a language model.

    Recognised by the base's folder, a section that only images have, or a LoRA of the embedded image base. Without a
    base, pictures to learn from and the embedded suite of scenes stand for the embedded image base.
    """
    base = tree.get("base")
    named = base.get("id") if isinstance(base, Mapping) else base
    if isinstance(named, str):
        return named if is_pipeline(named) or any(tree.get(key) for key in _IMAGE_SECTIONS) else None
    if named is None and (tree.get("pictures") or (_suite(tree) == DEFAULT_SCENES and not tree.get("compositions"))):
        return BUILTIN_IMAGE_BASE
    loras = tree.get("loras")
    sources = [lora.get("source") for lora in loras if isinstance(lora, Mapping)] if isinstance(loras, list) else []
    return BUILTIN_IMAGE_BASE if any(isinstance(s, str) and is_image_lora(s) for s in sources) else None


def _suite(tree: Mapping[str, Any]) -> Any:
    """The suite that an evaluation recipe's tree names."""
    scored = tree.get("eval")
    data = scored.get("data") if isinstance(scored, Mapping) else None
    return data.get("suite") if isinstance(data, Mapping) else None


def is_pipeline(base: str) -> bool:
    """Whether `base` is a diffusers pipeline on this machine: built in, a folder, or in the hub's cache."""
    if base.startswith(BUILTIN_PREFIX):
        try:
            return (builtin_base(base) / PIPELINE_FILE).is_file()
        except UsageError:
            return False
    folder = Path(base).expanduser()
    if folder.is_dir():
        return (folder / PIPELINE_FILE).is_file()
    if folder.suffix == ".safetensors":  # of one-file bases, only pipelines are read
        return folder.is_file()
    if base.count("/") != 1:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(base, PIPELINE_FILE), str)
    except HFValidationError:
        return False


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
        # For a handful of examples of a task that no LoRA was trained on. benchmarks/studies/unseen-choice.yaml chose
        # these values without a test set; unseen.yaml found them best on BIG-Bench Hard with five examples a task.
        "few-shot": {
            "gate": {"granularity": "matrix", "pool": "token"},
            "train": {"steps": 40, "batch_size": 5, "warmup_steps": 5},
        },
    },
}

# The presets for a diffusion base.
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
