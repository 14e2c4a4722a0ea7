"""Tiny random models, their tokenizers and PEFT adapters for them: offline, on CPU, built in milliseconds.

Fixtures: `make_tiny(kind)` builds a fresh `Tiny(model, tokenizer)`; `tiny_t5`, `tiny_bart`, `tiny_llama` and
`tiny_gpt2` are private copies that a test may wrap or change; `tiny_folder(kind)` is a saved base that
`load_backbone` reads; `make_peft_adapter(model, folder, ...)` saves a PEFT adapter with a nonzero B. Of diffusion:
`make_pipeline(kind)`, `tiny_sd`, `tiny_sd2`, `tiny_sdxl` and `pipeline_folder(kind)` likewise; see `tiny_pipelines`.
`picture_world` is a saved base with LoRAs and a composition.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before transformers and huggingface_hub are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # Tiny matrices: a second thread costs more than it saves.

KINDS = ("t5", "bart", "llama", "gpt2")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tiny(NamedTuple):
    """A random model in eval mode and the tokenizer that fits it."""

    model: nn.Module
    tokenizer: Any


def build_tokenizer(kind: str, *, chat: bool = False) -> Any:
    """A byte-level tokenizer (any text round-trips, no training) that adds specials as `kind` does.

    T5 appends eos, BART wraps in bos and eos, Llama prepends bos, GPT-2 adds nothing and has no pad token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    frame = {"t5": "$A </s>", "bart": "<s> $A </s>", "llama": "<s> $A", "gpt2": None}[kind]
    if frame is not None:
        ids = [("</s>", 1), ("<s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    names: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>"}
    if kind != "gpt2":
        names["pad_token"] = "<pad>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(kind: str, vocabulary: int, seed: int) -> nn.Module:
    """A random model of two layers and width 32, frozen, in eval mode."""
    import transformers

    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config: Any
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.1,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
    elif kind == "bart":
        config = transformers.BartConfig(
            vocab_size=vocabulary, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=512,
            decoder_start_token_id=1, forced_eos_token_id=None, **ids,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, **ids,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=512,
            eos_token_id=1, bos_token_id=2,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        raise ValueError(f"unknown kind {kind!r}: one of {KINDS}")
    _spread(model)
    return model.eval().requires_grad_(False)


def _spread(model: nn.Module) -> None:
    """Redraws the matrices so that layers outweigh the embeddings: else greedy output repeats one token."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2:
                fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter.shape[1]
                std = 0.4 if isinstance(module, nn.Embedding) else 1.5 / fan_in**0.5
                parameter.data.normal_(std=std)
            elif name == "bias":
                parameter.data.normal_(std=0.1)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Tiny]:
    """`make_tiny(kind, seed=0, chat=False)` -> a fresh, frozen random model with its tokenizer."""

    def build(kind: str, *, seed: int = 0, chat: bool = False) -> Tiny:
        tokenizer = build_tokenizer(kind, chat=chat)
        return Tiny(build_model(kind, len(tokenizer), seed), tokenizer)

    return build


@pytest.fixture(scope="session")
def _originals(make_tiny: Callable[..., Tiny]) -> dict[str, Tiny]:
    return {kind: make_tiny(kind) for kind in KINDS}


@pytest.fixture
def tiny_t5(_originals: dict[str, Tiny]) -> Tiny:
    """A private copy of the tiny T5 (gated-gelu feed-forward, untied head, as FLAN-T5)."""
    return copy.deepcopy(_originals["t5"])


@pytest.fixture
def tiny_bart(_originals: dict[str, Tiny]) -> Tiny:
    """A private copy of the tiny BART (biases everywhere, tied embeddings)."""
    return copy.deepcopy(_originals["bart"])


@pytest.fixture
def tiny_llama(_originals: dict[str, Tiny]) -> Tiny:
    """A private copy of the tiny Llama (grouped-query attention, bos prepended)."""
    return copy.deepcopy(_originals["llama"])


@pytest.fixture
def tiny_gpt2(_originals: dict[str, Tiny]) -> Tiny:
    """A private copy of the tiny GPT-2 (transposed Conv1D layers, no pad token)."""
    return copy.deepcopy(_originals["gpt2"])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Tiny]) -> Callable[..., Path]:
    """`tiny_folder(kind, seed=0, chat=False)` -> a folder that transformers loads; built once, do not write in it."""
    built: dict[tuple[str, int, bool], Path] = {}

    def folder(kind: str, *, seed: int = 0, chat: bool = False) -> Path:
        key = (kind, seed, chat)
        if key not in built:
            path = tmp_path_factory.mktemp("bases") / kind
            for part in make_tiny(kind, seed=seed, chat=chat):
                part.save_pretrained(path)
            built[key] = path
        return built[key]

    return folder


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., Any]:
    """`make_pipeline(kind, seed=0)` -> a fresh random pipeline; kind is sd, sd2 or sdxl."""
    from tiny_pipelines import build_pipeline

    return build_pipeline


@pytest.fixture
def tiny_sd(make_pipeline: Callable[..., Any]) -> Any:
    """A private pipeline of Stable Diffusion 1's shape: 1x1 convolutions around attention, predicts noise."""
    return make_pipeline("sd")


@pytest.fixture
def tiny_sd2(make_pipeline: Callable[..., Any]) -> Any:
    """A private pipeline of Stable Diffusion 2's shape: linear projections, OpenCLIP's encoder, predicts velocity."""
    return make_pipeline("sd2")


@pytest.fixture
def tiny_sdxl(make_pipeline: Callable[..., Any]) -> Any:
    """A private pipeline of Stable Diffusion XL's shape: two text encoders, sizes among the conditions."""
    return make_pipeline("sdxl")


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory, make_pipeline: Callable[..., Any]) -> Callable[..., Path]:
    """`pipeline_folder(kind, seed=0)` -> a folder that diffusers loads; built once, do not write in it."""
    built: dict[tuple[str, int], Path] = {}

    def folder(kind: str, *, seed: int = 0) -> Path:
        if (kind, seed) not in built:
            built[kind, seed] = tmp_path_factory.mktemp("pipelines") / kind
            make_pipeline(kind, seed).save_pretrained(built[kind, seed])
        return built[kind, seed]

    return folder


@pytest.fixture(scope="session")
def picture_world(
    tmp_path_factory: pytest.TempPathFactory, make_pipeline: Callable[..., Any], pipeline_folder: Callable[..., Path]
) -> Any:
    """A base that draws, LoRAs cat, hat and sea on it, and a gated composition, in folders; see `picture_world`."""
    from picture_world import build_world

    return build_world(tmp_path_factory.mktemp("world"), pipeline_folder("sd"), make_pipeline("sd"))


@pytest.fixture(scope="session")
def make_peft_adapter() -> Callable[..., Path]:
    """`make_peft_adapter(model, folder, ...)` -> the folder, holding a LoRA that PEFT wrote for `model`.

    `model` is copied, so it stays as it was. B is random too: a zero B would let every parity test pass.
    Further keywords go to `peft.LoraConfig` (rank_pattern, alpha_pattern, use_rslora, use_dora, bias, ...).
    """

    def make(
        model: nn.Module,
        folder: Path,
        *,
        rank: int = 4,
        alpha: float = 8.0,
        targets: str | Sequence[str] = "all-linear",
        seed: int = 0,
        scale: float = 0.3,
        **settings: Any,
    ) -> Path:
        import peft

        if model.config.model_type == "gpt2":  # type: ignore[union-attr]
            settings.setdefault("fan_in_fan_out", True)  # Else PEFT sets it with a warning.
        named = targets if isinstance(targets, str) else list(targets)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=named, **settings)  # type: ignore[arg-type]
        config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
        adapted = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(str(folder))
        return Path(folder)

    return make


@pytest.fixture
def explained() -> Callable[..., None]:
    """`explained(call, code, message)` asserts the exact message and exit code of the UserError that `call` raises."""

    from molecli.errors import UserError

    def check(call: Callable[[], Any], code: int, message: str) -> None:
        with pytest.raises(UserError) as caught:
            call()
        assert (caught.value.exit_code, str(caught.value)) == (code, message)
        assert message.count("\n") < 3

    return check
