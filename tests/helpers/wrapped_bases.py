"""Tiny language models alone and inside multimodal models, and LoRA files of them under other names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
_IDS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_PICTURE = {"image_size": 28, "patch_size": 14}
_CLIP = {"model_type": "clip_vision_model", **_SMALL, **_PICTURE, "projection_dim": 16}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
# model_type -> (class, text part, vision part)
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", TEXT, {**_SMALL, **_PICTURE}),
    "llava": ("LlavaForConditionalGeneration", {"model_type": "llama", **TEXT}, _CLIP),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {**TEXT, "rope_parameters": _ROPE},
        {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", **TEXT},
        {"model_type": "pixtral", "head_dim": 8, **_SMALL, **_PICTURE},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {"model_type": "gemma", **TEXT},
        {"model_type": "siglip_vision_model", **_SMALL, **_PICTURE, "projection_dim": 32},
    ),
}
IDS = torch.tensor([[8, 12, 61, 33, 18, 5]])


def wrapper(kind: str) -> Any:
    """A random multimodal model, the same each time."""
    name, text, vision = WRAPPERS[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    return spread(getattr(transformers, name)(config))


def language_model(kind: str, **settings: Any) -> Any:
    """A random language model of the same text part, such as "llama"."""
    torch.manual_seed(0)
    return spread(
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**TEXT, **settings}))
    )


def spread(model: Any) -> Any:
    """The model, frozen, with matrices large enough that every layer counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def rewritten(folder: Path, to: Path, edit: Callable[[str], str]) -> Path:
    """A copy of the LoRA in `folder` with its keys changed by `edit`."""
    shutil.copytree(folder, to)
    file = to / "adapter_model.safetensors"
    save_file({edit(key): tensor for key, tensor in load_file(file).items()}, file)
    return to
