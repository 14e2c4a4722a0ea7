"""The diffusion pipelines that `image_cost.py` times: Stable Diffusion 1.5's shape and smaller ones, random weights.

Nothing is downloaded: shapes are written here, and the tokenizer's tokens are letters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tools.image_builtin import models
from tools.image_builtin.captions import LENGTH

# These loggers warn about every further adapter that lacks keys, and about parts that no adapter changes.
diffusers.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP-L's vocabulary; only its first rows are read here.
CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Shape:
    """A pipeline and the side of its pictures in pixels; `parts` makes (unet, vae, clip, scheduler)."""

    pixels: int
    tokens: int
    parts: Callable[[Any], tuple[nn.Module, nn.Module, nn.Module, Any]]


def build_pipeline(shape: Shape, *, device: str, dtype: torch.dtype, seed: int) -> Any:
    """The frozen pipeline, in eval mode."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(shape.tokens)
    with torch.device(device):
        unet, vae, clip, scheduler = shape.parts(tokenizer)
    scheduler = type(scheduler).from_config(scheduler.config)  # its schedule belongs on the CPU
    for part in (unet, vae, clip):
        part.to(device, dtype).eval().requires_grad_(False)
    parts = {"unet": unet, "vae": vae, "text_encoder": clip, "tokenizer": tokenizer, "scheduler": scheduler}
    return assemble(parts)


def assemble(parts: dict[str, Any]) -> Any:
    """A StableDiffusionPipeline of these components that shows no progress."""
    pipe = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tokenizer(tokens: int) -> Any:
    """A CLIP tokenizer whose tokens are letters, with a maximum length that includes start and end."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*letters, *(letter + "</w>" for letter in letters), START, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=tokens)


def _stable_diffusion(widths: tuple[int, ...], text: int, layers: int, vae: tuple[int, ...], side: int) -> Any:
    """`parts` of a pipeline with SD 1.5's modules of a given width."""

    def parts(tokenizer: Any) -> tuple[nn.Module, nn.Module, nn.Module, Any]:
        unet = diffusers.UNet2DConditionModel(
            sample_size=side,
            block_out_channels=widths,
            cross_attention_dim=text,
            attention_head_dim=8,  # diffusers reads this as the number of heads
        )
        coder = diffusers.AutoencoderKL(
            block_out_channels=vae,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=8 * side,
        )
        return unet, coder, _clip(text, layers, tokenizer), _scheduler()

    return parts


def _clip(width: int, layers: int, tokenizer: Any) -> nn.Module:
    end = tokenizer.eos_token_id
    config = transformers.CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )
    return transformers.CLIPTextModel(config)


def _scheduler() -> Any:
    return diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _embedded(tokenizer: Any) -> tuple[nn.Module, nn.Module, nn.Module, Any]:
    """The embedded pipeline's, over the letters' vocabulary."""
    return models.new_unet(), models.new_vae(), models.new_text_encoder(len(tokenizer)), models.new_scheduler()


SHAPES = {
    "sd15": Shape(512, 77, _stable_diffusion((320, 640, 1280, 1280), 768, 12, (128, 256, 512, 512), 64)),
    # SD 1.5's modules, so narrow that only the cost of calling them remains: the main cost of small batches on a GPU.
    "narrow": Shape(64, 77, _stable_diffusion((32, 32, 64, 64), 64, 2, (32, 32, 32, 32), 8)),
    "tiny": Shape(64, LENGTH, _embedded),
}
