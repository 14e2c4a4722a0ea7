"""A tiny pipeline as one file under the names of the original code, as A1111 and ComfyUI have it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from molecli.adapters.blocks import original_names

_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_VAE = (
    (r"(\w+)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
    (r"(\w+)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
    (r"(\w+)\.up_blocks\.(\d+)\.resnets\.(\d+)", r"\1.up.\2.block.\3"),
    (r"(\w+)\.up_blocks\.(\d+)\.upsamplers\.0", r"\1.up.\2.upsample"),
    (r"(\w+)\.mid_block\.resnets\.0", r"\1.mid.block_1"),
    (r"(\w+)\.mid_block\.resnets\.1", r"\1.mid.block_2"),
    (r"(\w+)\.mid_block\.attentions\.0", r"\1.mid.attn_1"),
)
_VAE_LEAVES = {
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def write_checkpoint(pipe: Any, file: Path, *, metadata: Mapping[str, str] | None = None, **extra: Tensor) -> Path:
    """`pipe` (of Stable Diffusion 1's or XL's shape) as one .safetensors file, without tokenizer and configuration."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in _unet(pipe.unet.state_dict()).items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in _vae(pipe.vae).items()}
    second = getattr(pipe, "text_encoder_2", None)
    start = "cond_stage_model.transformer." if second is None else "conditioner.embedders.0.transformer."
    encoder = {"text_model." + n.removeprefix("text_model."): t for n, t in pipe.text_encoder.state_dict().items()}
    tensors |= {start + name: t for name, t in encoder.items()}
    if second is not None:
        tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in _openclip(second.state_dict()).items()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in (tensors | extra).items()}
    save_file(tensors, file, metadata=dict(metadata or {}))
    return file


def _unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modules = {name.rpartition(".")[0] for name in state}
    names = original_names(modules)
    found = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        name = names.get(module, module).replace("conv_norm_out", "out.0")
        head, _, last = name.rpartition(".")
        found[f"{head}.{_NORMS[last]}.{leaf}" if last in _NORMS and ".resnets." in key else f"{name}.{leaf}"] = tensor
    return found


def _vae(vae: Any) -> dict[str, Tensor]:
    found = {}
    blocks = len(vae.config.block_out_channels)
    for key, tensor in vae.state_dict().items():
        module, _, leaf = key.rpartition(".")
        module = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{blocks - 1 - int(m[1])}", module)
        for pattern, name in _VAE:
            module = re.sub(pattern, name, module)
        for name, old in _VAE_LEAVES.items():
            module = re.sub(rf"\.{re.escape(name)}$", f".{old}", module)
        attention = ".attn_1." in module and tensor.ndim == 2
        found[f"{module}.{leaf}"] = tensor[..., None, None] if attention else tensor
    return found


def _openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"text_projection": state["text_projection.weight"].T}
    names = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"self_attn.out_proj": "attn.out_proj"}
    for key, tensor in state.items():
        name = key.removeprefix("text_model.")
        if name in names:
            found[names[name]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, module, leaf = match.groups()
            if module == "self_attn.q_proj":
                rows = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(rows)
            elif module in inner:
                found[f"transformer.resblocks.{layer}.{inner[module]}.{leaf}"] = tensor
    return found


def assert_same_weights(ours: Any, theirs: Any) -> None:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(theirs, name, None) is None:
            continue
        a, b = getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a), name
