"""A tiny random CLIP in open_clip's folder format: the embedded one's shape, weights spread so that texts differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import TOKENS, build_clip_tokenizer

SIZE = 32


def build_tiny_clip(folder: Path, *, seed: int = 0, **preprocess: Any) -> Path:
    """The folder, holding configuration, weights and tokenizer."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    tokenizer = build_clip_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            "text_cfg": {
                "context_length": TOKENS, "vocab_size": len(tokenizer), "hf_tokenizer_name": "tiny-clip",
                "width": 32, "heads": 2, "layers": 2,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.4, 0.6], "std": [0.25, 0.3, 0.2], "interpolation": "bicubic", "resize_mode": "shortest",
            **preprocess,
        },
    }  # fmt: skip
    torch.manual_seed(seed)
    model: Any = CLIP(**config["model_cfg"])
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=1.0 if "embedding" in name else parameter.shape[1] ** -0.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
