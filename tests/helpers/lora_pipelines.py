"""Tiny random pipelines of the three families, LoRAs for them, and what diffusers makes of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from molecli.experts import LowRank

FAMILIES = ("sd1", "sd2", "sdxl")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Width of the text encoder, and so of the UNet's cross-attention; SDXL reads both of its encoders.
WIDTHS = {"sd1": (16,), "sd2": (24,), "sdxl": (16, 24)}


def build_pipeline(family: str, seed: int = 0) -> Any:
    """A random pipeline with the blocks, the kinds of layers and the names of `family`, three blocks deep."""
    torch.manual_seed(seed)
    widths = WIDTHS[family]
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    parts = {
        "vae": vae,
        "unet": build_unet(family),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "text_encoder": build_clip(widths[0]),
        "tokenizer": None,
    }
    if family != "sdxl":
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = build_clip(widths[1], transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=None, add_watermarker=False)


def build_clip(width: int, kind: Any = transformers.CLIPTextModel) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return kind(config).eval()


def build_unet(family: str) -> nn.Module:
    settings: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4,
        "attention_head_dim": 4, "cross_attention_dim": sum(WIDTHS[family]), "use_linear_projection": family != "sd1",
    }  # fmt: skip
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    if family == "sdxl":
        settings |= {
            "down_block_types": ("DownBlock2D", down, down), "up_block_types": (up, up, "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 12,
        }  # fmt: skip
    else:
        settings |= {"down_block_types": (down, down, "DownBlock2D"), "up_block_types": ("UpBlock2D", up, up)}
    return diffusers.UNet2DConditionModel(**settings).eval()


def pipeline_matrices(pipeline: Any) -> dict[str, tuple[int, ...]]:
    """Every linear and convolution of the UNet and the text encoders: name -> shape of its weight."""
    found = {}
    for component in COMPONENTS:
        for name, module in getattr(pipeline, component, nn.Module()).named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                found[f"{component}.{name}"] = tuple(module.weight.shape)
    return found


def random_factors(
    matrices: Mapping[str, tuple[int, ...]],
    names: Iterable[str],
    *,
    rank: Callable[[int], int] = lambda i: 4,
    alpha: Callable[[int], float] = lambda i: 4.0,
    seed: int = 0,
) -> dict[str, LowRank]:
    """Factors for the matrices called `names`; `rank` and `alpha` are given the place in the list."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for i, name in enumerate(names):
        d_out, *d_in = matrices[name]
        a = torch.randn(rank(i), *d_in, generator=random)
        b = torch.randn(d_out, rank(i), generator=random)
        found[name] = LowRank(a, b, alpha(i) / rank(i))
    return found


def dense(low_rank: LowRank) -> Tensor:
    """The dense update in the shape of the weight, a convolution's too."""
    flat = low_rank.B @ low_rank.A.flatten(1)
    return low_rank.scaling * flat.reshape(-1, *low_rank.A.shape[1:])


def diffusers_deltas(pipeline: Any, source: Path) -> dict[str, Tensor]:
    """ΔW by matrix name, as diffusers computes it for the LoRA at `source` (a folder or a file)."""
    file = source if source.is_file() else source / "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="x")
    deltas = {}
    for component in COMPONENTS:
        for name, module in getattr(pipeline, component, nn.Module()).named_modules():
            if isinstance(module, LoraLayer):
                deltas[f"{component}.{name}"] = module.get_delta_weight("x").detach()
    pipeline.unload_lora_weights()
    return deltas


def assert_same_updates(ours: Mapping[str, LowRank], theirs: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    assert all(delta.abs().max() > 0.01 for delta in theirs.values())
    for name, delta in theirs.items():
        torch.testing.assert_close(dense(ours[name]), delta, rtol=1e-6, atol=1e-6)
