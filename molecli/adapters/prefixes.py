"""The prefixes of LoRA names: which part of a pipeline each stands for, in the layouts of trainers and programs.

    lora_unet.  diffusion_model.            dotted, of the UNet          lora_te1_   lora_unet_      kohya, underscored
    cond_stage_model.  conditioner.embedders.0.  text_encoders.clip_l.   text encoders of the original code and ComfyUI

Names become `<component>.<path>`; a path may still be that of the original code, which `place` knows (`blocks`).
"""

from __future__ import annotations

import re

# kohya's, which stay in names: only with the base is it known which "_" stands for a dot.
KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}

_UNET_HEADS = (
    "input_blocks|middle_block|output_blocks|time_embed|label_emb|out|"
    "down_blocks|mid_block|up_blocks|time_embedding|add_embedding|conv_in|conv_out"
)
# A prefix as a regular expression -> the component. The first that matches is replaced.
_DOTTED = (
    (r"lora_unet\.", "unet"),
    # Other models than UNets have this prefix too: their names are left for the message.
    (rf"(model\.)?diffusion_model\.(?=({_UNET_HEADS})(\.|$))", "unet"),
    (r"lora_te1?\.", "text_encoder"),
    (r"lora_te2\.", "text_encoder_2"),
    (r"cond_stage_model\.(transformer\.|model\.(?=transformer\.))", "text_encoder"),
    (r"conditioner\.embedders\.0\.(transformer\.|model\.(?=transformer\.))", "text_encoder"),
    (r"conditioner\.embedders\.1\.(transformer\.|model\.(?=transformer\.))", "text_encoder_2"),
    (r"(text_encoders\.)?clip_[lh]\.(transformer\.)?", "text_encoder"),
    (r"(text_encoders\.)?clip_g\.(transformer\.)?", "text_encoder_2"),
)
_COMPILED = tuple((re.compile(pattern), component) for pattern, component in _DOTTED)
# OpenCLIP's names inside a layer -> those of transformers.
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPENCLIP = {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}


def without_prefix(name: str) -> str:
    """`name` as `<component>.<path>` if it begins with one of the dotted prefixes, otherwise unchanged."""
    for pattern, component in _COMPILED:
        if match := pattern.match(name):
            return f"{component}.{_from_openclip(name[match.end() :])}"
    return name


def _from_openclip(path: str) -> str:
    match = _OPENCLIP_LAYER.fullmatch(path)
    return f"encoder.layers.{match[1]}.{_OPENCLIP.get(match[2], match[2])}" if match else path
