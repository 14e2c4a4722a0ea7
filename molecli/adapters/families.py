"""The family of models that a LoRA was made for, from the names in its file."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names that only this family has, dotted or with underscores; the first that matches any name is the family.
_FAMILIES = (
    (r"lora_prior_(unet|te)_|^prior_unet", "Stable Cascade"),
    (r"token_refiner|double_blocks\.\d+\.(img|txt)_attn_qkv", "HunyuanVideo"),
    (r"double_stream_(modulation|blocks)[._]", "FLUX.2 or HiDream"),
    (r"joint_transformer_blocks[._]", "AuraFlow"),
    (r"double_blocks|single_transformer_blocks|(^|[._])single_blocks[._]", "FLUX"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)", "Qwen-Image"),
    (r"(noise|context)_refiner|diffusion_model[._]layers[._]\d+[._](attention|feed_forward)", "Z-Image or Lumina"),
    (r"(^|[._])blocks[._]\d+[._](cross_attn|self_attn)[._](q|k|v|o)([._]|$)", "Wan, a video model"),
    (r"temporal_transformer_blocks", "Stable Video Diffusion"),
    (r"motion_modules", "AnimateDiff (it adapts motion modules)"),
    (r"lora_te3_|text_encoder_3\.|t5xxl\.", "a model with a T5 encoder, such as FLUX or Stable Diffusion 3"),
)
# Models with one transformer in place of a UNet, of no family that is known by its names.
_TRANSFORMER = re.compile(
    r"(transformer|lora_transformer|diffusion_model|lora_unet|unet)[._](transformer_blocks|blocks|layers)[._]"
    r"|diffusion_model\.(?!(input|output|down|up)_blocks|mid)"
)
_KNOWN = tuple((re.compile(pattern), family) for pattern, family in _FAMILIES)


def family_in(names: Iterable[str]) -> str | None:
    """The family without a plain UNet that the names belong to; None for names of a UNet, of CLIP and unknown ones."""
    names = list(names)
    for pattern, family in _KNOWN:
        if any(pattern.search(name) for name in names):
            return family
    if any(_TRANSFORMER.match(name) for name in names):
        return "a model with a transformer in place of the UNet, such as FLUX, Qwen-Image or Wan"
    return None
