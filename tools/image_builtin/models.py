"""Shapes of the networks that ship: Stable Diffusion's modules at about a two-hundredth of the size."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from .captions import LENGTH
from .data import SIZE

TEXT_WIDTH = 160
EMBEDDING_SCALE = 0.1  # trained and never trained tokens stay of comparable length


def new_vae() -> AutoencoderKL:
    """64×64 pictures to 16×16 latents of four channels; about 0.95 M parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def new_unet() -> UNet2DConditionModel:
    """About 5.4 M parameters; self- and cross-attention at 16×16 and 8×8."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
    )


def new_text_encoder(vocab: int) -> CLIPTextModel:
    """Three layers of width 160 over a tiny vocabulary whose last id ends a text."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            bos_token_id=vocab - 2,
            eos_token_id=vocab - 1,
            pad_token_id=vocab - 1,
        )
    )
    model.get_input_embeddings().weight.data.normal_(0, EMBEDDING_SCALE)
    return model


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction; sampling starts at the last timestep."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def clip_config(vocab: int) -> dict[str, Any]:
    """open_clip_config.json: a ViT of 8×8-pixel patches and a small text tower; about 1.1 M parameters."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
            "text_cfg": {
                "context_length": LENGTH,
                "vocab_size": vocab,
                "hf_tokenizer_name": "tiny-clip",
                "width": 96,
                "heads": 3,
                "layers": 2,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
