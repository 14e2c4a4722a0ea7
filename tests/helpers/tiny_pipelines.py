"""Tiny random diffusion pipelines of the shapes of Stable Diffusion 1, 2 and XL, and experts for them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from molecli.experts import Expert, LowRank

PIPELINES = ("sd", "sd2", "sdxl")
# Width of each text encoder; the UNet's cross-attention reads them side by side.
WIDTHS = {"sd": (16,), "sd2": (24,), "sdxl": (16, 24)}
TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def build_pipeline(kind: str, seed: int = 0) -> Any:
    """A pipeline of random weights in eval mode, none of which trains; it draws 16x16 pixels from 8x8 latents."""
    torch.manual_seed(seed)
    tokenizer = build_clip_tokenizer()
    first, *others = WIDTHS[kind]
    parts = {
        "unet": build_unet(kind),
        "vae": build_vae(),
        "text_encoder": build_clip(first, len(tokenizer), openclip=kind == "sd2"),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if kind == "sd2" else "epsilon",
        ),
    }
    if others:
        second = build_clip(others[0], len(tokenizer), openclip=True, projected=True)
        pipe: Any = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=build_clip_tokenizer(), add_watermarker=False
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def build_unet(kind: str, **changes: Any) -> nn.Module:
    """Two resolutions; SDXL has no attention in the first and two transformer blocks in each of the second.

    `changes` override the UNet's settings."""
    settings: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 2 if kind == "sd" else (2, 4), "cross_attention_dim": sum(WIDTHS[kind]),
        "use_linear_projection": kind != "sd",
    }  # fmt: skip
    if kind == "sdxl":
        settings |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 12,
        }  # fmt: skip
    else:
        settings |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    return diffusers.UNet2DConditionModel(**(settings | changes))


def build_vae() -> nn.Module:
    """16x16 pixels to 8x8 latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, sample_size=16,
        scaling_factor=0.5,
    )  # fmt: skip


def build_clip(width: int, vocabulary: int, *, openclip: bool = False, projected: bool = False) -> nn.Module:
    """Two layers; OpenCLIP's have another activation than CLIP's."""
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=12,
        hidden_act="gelu" if openclip else "quick_gelu",
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:  # CLIP's own start is too faint to tell prompts apart
            parameter.data.normal_(std=0.5 if "embedding" in name else parameter.shape[1] ** -0.5)
    return model


def build_clip_tokenizer() -> Any:
    """A CLIP tokenizer whose tokens are letters; TOKENS of them at most, start and end included."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*letters, *(letter + "</w>" for letter in letters), START, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def make_expert(
    name: str,
    matrices: Mapping[str, tuple[int, ...]],
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    scale: float = 0.3,
    keep: Callable[[str], bool] = lambda matrix: True,
) -> Expert:
    """A random LoRA on those of `matrices` that `keep` takes."""
    factors = {}
    for matrix, shape in matrices.items():
        if keep(matrix):
            generator = torch.Generator().manual_seed(zlib.crc32(matrix.encode()) + seed)
            A = torch.randn(rank, *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
            B = scale * torch.randn(shape[0], rank, generator=generator)
            factors[matrix] = LowRank(A, B, alpha / rank)
    return Expert(name, factors, source=name, sha256=name * 8, rank=rank, alpha=alpha)


def attention_only(matrix: str) -> bool:
    """What most LoRAs adapt."""
    return ".attn" in matrix or ".self_attn." in matrix


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is within `tolerance` of the largest value."""
    return float((a - b).abs().max() / b.abs().max()) < tolerance
