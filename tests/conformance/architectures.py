"""The rows of the table of compatibility: one tiny random model for each architecture of transformers.

The settings are those of its configuration, for most rows those of `DENSE` and a few others. Contents: ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.conformance.models import Architecture, Kind

TOKENS: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def _names(text: str) -> list[str]:
    return text.split()


def _dense(names: str) -> list[Architecture]:
    return [Architecture(name, "decoder", DENSE) for name in _names(names)]


def _row(kind: Kind, name: str, *, cls: str = "", leave: str = "", **settings: Any) -> Architecture:
    """A row with the settings of `DENSE` and the others given."""
    every = {key: value for key, value in {**DENSE, **settings}.items() if value is not None}
    return Architecture(name, kind, every, cls, leave)


# PEFT turns these names into the fused weights of the experts, whatever they are named.
_FUSED = r"(gate|up|down)_proj$"
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {**_EXPERTS, "num_experts": None, "num_local_experts": None, "n_routed_experts": 4, "n_shared_experts": 1}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SMALL_STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

_DECODERS = [
    *_dense("llama ministral3 qwen2 qwen3 gemma phi gpt_neox stablelm starcoder2 olmo olmo2"),
    *_dense("granite cohere glm glm4 ernie4_5"),
    *(_row("decoder", name, sliding_window=5) for name in _names("mistral ministral gemma2 gemma3_text phi3")),
    *(_row("decoder", name, sliding_window=5) for name in _names("olmo3 cohere2 exaone4")),
    *_dense("hunyuan_v1_dense smollm3 persimmon nemotron helium diffllama apertus arcee seed_oss bitnet cwm"),
    *_dense("jais2 nanochat vaultgemma hyperclovax modernbert-decoder biogpt doge bloom gpt_bigcode"),
    *_dense("mpt openai-gpt xlm"),
    _row("decoder", "opt", ffn_dim=48, word_embed_proj_dim=32),
    _row("decoder", "falcon", head_dim=None, ffn_hidden_size=48),
    _row("decoder", "gpt2", head_dim=None),
    Architecture("gptj", "decoder", {**_GPT, "rotary_dim": 4}),
    Architecture("codegen", "decoder", {**_GPT, "rotary_dim": 4, "n_ctx": 128}),
    Architecture("ctrl", "decoder", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "dff": 48}),
    Architecture(
        "gpt_neo",
        "decoder",
        {
            **TOKENS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    Architecture(
        "xglm",
        "decoder",
        {**TOKENS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
    ),
    Architecture("xlnet", "decoder", {**TOKENS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    _row(
        "decoder",
        "gemma3n_text",
        intermediate_size=[48, 48],
        vocab_size_per_layer_input=96,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        leave="altup",
    ),
    _row("decoder", "gemma4_text", vocab_size_per_layer_input=96, hidden_size_per_layer_input=8),
    _row("decoder", "youtu", **_LATENT),
    _row("decoder", "minicpm3", **_LATENT),
]
_MIXTURES = [
    *(_row("experts", name, **_EXPERTS) for name in _names("mixtral granitemoe granitemoeshared phimoe olmoe")),
    *(_row("experts", name, **_EXPERTS) for name in _names("flex_olmo qwen3_moe jetmoe minimax_m2")),
    *(_row("experts", name, leave=_FUSED, **_EXPERTS) for name in ("exaone_moe", "afmoe")),
    *(_row("experts", name, leave=_FUSED, **_ROUTED, **_GROUPS) for name in _names("glm4_moe dots1 solar_open")),
    *(_row("experts", f"deepseek_v{i}", leave=_FUSED, **_ROUTED, **_GROUPS, **_LATENT) for i in (2, 3)),
    _row("experts", "gpt_oss", **_EXPERTS, sliding_window=5),
    _row("experts", "qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=16),
    _row("experts", "hunyuan_v1_moe", leave=_FUSED, **{**_EXPERTS, "moe_topk": 2}),
    _row("experts", "ernie4_5_moe", leave=_FUSED, **_EXPERTS, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
    _row("experts", "llama4_text", **_EXPERTS, intermediate_size_mlp=48),
    Architecture(
        "dbrx",
        "experts",
        {
            **TOKENS,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
]
_RECURRENT = [
    *(_row("recurrent", name, state_size=8, leave="out_proj|dt_proj") for name in ("mamba", "falcon_mamba")),
    _row("recurrent", "mamba2", state_size=8, num_heads=8, n_groups=1, chunk_size=16, leave="out_proj"),
    _row("recurrent", "bamba", **_SMALL_STATE, attn_layer_indices=[1]),
    _row("recurrent", "falcon_h1", leave="out_proj", **{**_SMALL_STATE, "mamba_d_ssm": 64}),
    _row(
        "recurrent",
        "granitemoehybrid",
        **_SMALL_STATE,
        **_EXPERTS,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=16,
    ),
    _row(
        "recurrent",
        "jamba",
        leave="dt_proj",
        **_EXPERTS,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    _row(
        "recurrent",
        "zamba",
        mamba_d_state=8,
        mamba_dt_rank=4,
        n_mamba_heads=2,
        use_mamba_kernels=False,
        layers_block_type=["hybrid", "hybrid"],
        head_dim=None,
        num_key_value_heads=4,
    ),
    _row(
        "recurrent",
        "zamba2",
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        head_dim=None,
        layers_block_type=["mamba", "hybrid"],
        adapter_rank=4,
        use_mamba_kernels=False,
        num_key_value_heads=4,
    ),
    _row(
        "recurrent",
        "nemotron_h",
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=16,
        layers_block_type=["mamba", "attention", "mlp"],
        num_hidden_layers=None,
        use_mamba_kernels=False,
        leave="out_proj",
    ),
    _row(
        "recurrent",
        "recurrent_gemma",
        lru_width=32,
        attention_window_size=16,
        conv1d_width=4,
        block_types=["recurrent", "attention"],
    ),
    _row("recurrent", "rwkv", context_length=64, attention_hidden_size=32),
    _row(
        "recurrent", "xlstm", mlstm_round_up_to_multiple_of=8, num_heads=4, num_blocks=2, chunk_size=16, head_dim=None
    ),
    _row("recurrent", "qwen3_next", leave=_FUSED, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16),
    _row("recurrent", "qwen3_5_text", **_DELTA),
    _row("recurrent", "qwen3_5_moe_text", **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16),
    _row("recurrent", "olmo_hybrid", **_DELTA),
    _row("recurrent", "minimax", **_EXPERTS, layer_types=["linear_attention", "full_attention"], block_size=8),
    _row("recurrent", "lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
    _row("recurrent", "lfm2_moe", **_EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1),
]
# Encoder-decoders: the sizes of the T5 family and those of the BART family.
_T5 = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
_BART = {
    **TOKENS,
    "decoder_start_token_id": 2,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_STACK = {**DENSE, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
_SWITCH = {
    "num_experts": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "expert_capacity": 64,
    "router_jitter_noise": 0.0,
}
_BERT = {"model_type": "bert", **DENSE}


def _seq2seq(name: str, *, leave: str = "", **settings: Any) -> Architecture:
    return Architecture(name, "encoder-decoder", settings, leave=leave)


_ENCODER_DECODERS = [
    *(_seq2seq(name, **_T5) for name in ("t5", "mt5", "umt5")),
    _seq2seq("longt5", **_T5, local_radius=4),
    _seq2seq("switch_transformers", **_T5, **_SWITCH),
    *(_seq2seq(name, **_BART) for name in _names("bart mbart m2m_100 pegasus marian blenderbot blenderbot-small")),
    *(_seq2seq(name, **_BART) for name in ("plbart", "mvp")),
    _seq2seq("pegasus_x", **_BART, block_size=8, num_global_tokens=4),
    _seq2seq("bigbird_pegasus", **_BART, attention_type="original_full"),
    _seq2seq(
        "led",
        **{**_BART, "max_position_embeddings": None},
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=128,
        attention_window=4,
    ),
    _seq2seq("fsmt", **_BART, leave="output_projection", langs=["en", "de"], src_vocab_size=96, tgt_vocab_size=96),
    _seq2seq("nllb-moe", **_BART, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, moe_token_dropout=0.0),
    _seq2seq(
        "prophetnet",
        **TOKENS,
        decoder_start_token_id=2,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=128,
        ngram=2,
    ),
    _seq2seq("t5gemma", encoder=_STACK, decoder=_STACK, vocab_size=96),
    _seq2seq(
        "encoder-decoder",
        encoder=_BERT,
        decoder={**_BERT, "is_decoder": True, "add_cross_attention": True},
        decoder_start_token_id=1,
        pad_token_id=0,
    ),
]
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_PICTURE = {"image_size": 28, "patch_size": 14}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION, **_PICTURE}
_CLIP = {"model_type": "clip_vision_model", **_VISION, **_PICTURE, "projection_dim": 16}
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_LLAMA4_VISION = {**_VISION, **_PICTURE, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}


def _multimodal(name: str, cls: str, text: Mapping[str, Any], vision: Mapping[str, Any], **other: Any) -> Architecture:
    settings = {"text_config": {**DENSE, **text}, "vision_config": dict(vision), "tie_word_embeddings": False, **other}
    return Architecture(name, "multimodal", settings, f"{cls}ForConditionalGeneration")


_IMAGE = {"image_token_index": 95, "image_token_id": 95}
_MULTIMODAL = [
    _multimodal("gemma3", "Gemma3", {}, {**_VISION, **_PICTURE}),
    _multimodal(
        "mistral3",
        "Mistral3",
        {"model_type": "mistral"},
        {"model_type": "pixtral", "head_dim": 8, **_VISION, **_PICTURE},
    ),
    _multimodal(
        "llama4",
        "Llama4",
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        _LLAMA4_VISION,
    ),
    _multimodal("llava", "Llava", {"model_type": "llama"}, _CLIP, **_IMAGE),
    _multimodal("llava_next", "LlavaNext", {"model_type": "llama"}, _CLIP, **_IMAGE),
    _multimodal("llava_onevision", "LlavaOnevision", {"model_type": "qwen2"}, _SIGLIP, **_IMAGE),
    _multimodal(
        "paligemma",
        "PaliGemma",
        {"model_type": "gemma"},
        {**_SIGLIP, "projection_dim": 32},
        **_IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    _multimodal("idefics3", "Idefics3", {"model_type": "llama"}, {**_VISION, **_PICTURE}, **_IMAGE),
    _multimodal("smolvlm", "SmolVLM", {"model_type": "llama"}, {**_VISION, **_PICTURE}, **_IMAGE),
    _multimodal("internvl", "InternVL", {"model_type": "qwen2"}, {**_VISION, "image_size": [28, 28]}, **_IMAGE),
    _multimodal("aya_vision", "AyaVision", {"model_type": "cohere2"}, _SIGLIP, **_IMAGE),
    _multimodal(
        "mllama",
        "Mllama",
        {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            **_PICTURE,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
        image_token_index=95,
    ),
    _multimodal("qwen2_vl", "Qwen2VL", _ROPE, {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32}),
    _multimodal("qwen2_5_vl", "Qwen2_5_VL", _ROPE, _QWEN_VISION),
    _multimodal("qwen3_vl", "Qwen3VL", _ROPE, {**_QWEN_VISION, "deepstack_visual_indexes": [0]}),
    _multimodal("qwen3_5", "Qwen3_5", _DELTA, _QWEN_VISION),
    _multimodal("glm4v", "Glm4v", _ROPE, {**_QWEN_VISION, **_PICTURE}),
]
ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row for row in (*_DECODERS, *_MIXTURES, *_RECURRENT, *_ENCODER_DECODERS, *_MULTIMODAL)
}
