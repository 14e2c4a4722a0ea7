"""From a base's settings to a frozen backbone: a language model through transformers' Auto classes, or a pipeline.

Contents: load_backbone, load_skeleton (no weights), pick_device, pick_dtype.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from molecli.bases.causal import Causal
from molecli.bases.language import freeze
from molecli.bases.library_logs import first_line, quiet
from molecli.bases.prompt_record import prompt_settings, refuse_settings
from molecli.bases.quantised import BITSANDBYTES, loading_options, method_of, not_here, say_changes, settled
from molecli.bases.seq2seq import Seq2Seq
from molecli.errors import MismatchError, UsageError
from molecli.files.base_source import PROMPT_FLAGS, BaseSettings, BaseSource, explain_hub, find_base
from molecli.protocols import Backbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_backbone(base: BaseSettings, device: str | torch.device = "auto") -> Backbone:
    """The frozen base on `device`, in eval mode.

    Raises: UsageError if there is no such base or transformers does not know its architecture; MismatchError if its
    files are damaged or do not belong together.
    """
    source, place = find_base(base), pick_device(device)
    if source.pipeline:
        refuse_settings(base)
        from molecli.bases.pipeline_loading import load_pipeline

        _check_unquantised(base)
        return load_pipeline(base, place, pick_dtype(base.dtype, place))
    with quiet(source):
        config = _config(source)
        auto, method = _auto_class(source, config), method_of(config) or BITSANDBYTES
        tokenizer = _tokenizer(source)
        prompts = prompt_settings(base, tokenizer, source.name)
        dtype = pick_dtype(base.dtype, place)
        options = {"dtype": dtype} | loading_options(source, config, place, dtype, quantize=base.quantize)
        model = _weights(source, config, auto, options)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, but the model only {rows}"
        raise MismatchError(f"base {source.name}", what, "Load model and tokenizer from the same place.")
    if "device_map" in options:
        model = settled(model, options["dtype"])
        say_changes(source, method, model, asked=base.dtype)
    else:
        model = model.to(place)
    made = Seq2Seq if config.is_encoder_decoder else Causal
    return made(model, tokenizer, source.name, **prompts)


def load_skeleton(base: BaseSettings) -> nn.Module:
    """The base's model on the meta device: names, shapes and dtype without weights, for plans and dry runs."""
    source = find_base(base)
    if source.pipeline:
        refuse_settings(base)
        from molecli.bases.pipeline_loading import load_pipeline_skeleton

        _check_unquantised(base)
        return load_pipeline_skeleton(base)
    if any(getattr(base, key) not in (None, {}, True) for key in PROMPT_FLAGS):
        with quiet(source):
            prompt_settings(base, _tokenizer(source), source.name)  # refused as by the run
    with quiet(source), torch.device("meta"):
        config = _config(source)
        model = _auto_class(source, config).from_config(config, dtype=DTYPES.get(base.dtype, torch.float32))
    return freeze(model)


def _check_unquantised(base: BaseSettings) -> None:
    """Raises: UsageError if a pipeline is to be quantised while it is loaded."""
    if base.quantize is not None:
        what = f"{base.id} is a pipeline, and only language models are quantised while they are loaded"
        raise UsageError("--quantize", what, "Save a pipeline with quantised parts, and name that.")


def pick_device(device: str | torch.device) -> torch.device:
    """The device for auto, cpu, cuda or mps on this machine; with `accelerate launch`, this process's own GPU."""
    if isinstance(device, torch.device):
        return device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind, there in available.items() if there) if device == "auto" else device
    kind = name.partition(":")[0]
    if kind not in available:
        raise UsageError(f"--device {device}", "no such device", "Write auto, cpu, cuda or mps.")
    if not available[kind]:
        raise UsageError(f"--device {device}", f"torch finds no {kind} device on this machine", "Write auto or cpu.")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the base's weights; auto is bfloat16 on a GPU that supports it, otherwise float32.

    auto is never float16, because T5's activations overflow in it. A half-precision type that the processor only
    emulates is used if it is asked for, with a warning.
    """
    if dtype == "auto":
        fit = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fit else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}", "no such dtype", f"Write auto, {', '.join(DTYPES)}.")
    if device.type == "cpu" and dtype != "float32" and _emulates_halves():
        warnings.warn(f"this processor emulates {dtype}: --dtype float32 is many times faster", stacklevel=2)
    return DTYPES[dtype]


def _emulates_halves() -> bool:
    """Whether this processor multiplies half-precision numbers one by one: x86 before AVX-512."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _config(source: BaseSource) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, trust_remote_code=False, **source.arguments)
    except OSError as error:
        raise _unread(source, error) from error
    except Exception as error:  # ValueError for an unknown architecture; a damaged GGUF fails in many ways
        raise _unknown(source, error) from error
    return config


def _auto_class(source: BaseSource, config: Any) -> Any:
    if config.is_encoder_decoder and type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    if not config.is_encoder_decoder and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    what = f"the architecture {config.model_type!r} is neither a seq2seq nor a causal language model"
    raise UsageError(f"base {source.name}", what, "Write for example a T5, BART, Llama, Qwen or GPT-2 model.")


def _tokenizer(source: BaseSource) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, **source.arguments)
    except Exception as error:
        # Each tokenizer class fails in its own way on a missing or damaged file.
        what = f"its tokenizer cannot be loaded ({first_line(error)})"
        raise MismatchError(f"base {source.name}", what, "Put tokenizer.json beside config.json.") from error


def _weights(source: BaseSource, config: Any, auto: Any, options: dict[str, Any]) -> Any:
    """The model with complete weights, on the CPU unless `options` of `from_pretrained` say where."""
    options = {**source.arguments, **options}
    if source.gguf_file and hasattr(transformers, "GgufConfig"):
        # Packed blocks are not linear layers, and gradients cannot pass through them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, report = auto.from_pretrained(
            source.path,
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except Exception as error:
        if "device_map" in options and not isinstance(error, OSError | SafetensorError):
            raise not_here(f"base {source.name}", method_of(config) or BITSANDBYTES, error) from error
        # SafetensorError, RuntimeError, UnpicklingError, struct.error ... all mean that the file is damaged.
        raise _unread(source, error) from error
    for kind, keys in (("lack", report["missing_keys"]), ("have another shape for", report["mismatched_keys"])):
        if keys:
            first = sorted(key if isinstance(key, str) else key[0] for key in keys)[0]
            what = f"its weights {kind} {len(keys)} of the model's tensors, such as {first}"
            raise MismatchError(f"base {source.name}", what, "Download it again, or correct config.json.")
    return model


def _unread(source: BaseSource, error: Exception) -> Exception:
    """The message for a source that could not be read."""
    if not source.local and isinstance(error, OSError):
        return explain_hub(source, error, offline=huggingface_hub.is_offline_mode())
    what = f"it is damaged or incomplete ({first_line(error)})"
    return MismatchError(source.where, what, "Download the base again.")


def _unknown(source: BaseSource, error: Exception) -> Exception:
    """The message for a configuration that transformers cannot build a model from."""
    where, reason = f"base {source.name}", str(error)
    if "trust_remote_code" in reason:
        return UsageError(where, "it needs its own code, which is never run", "Write a base that transformers knows.")
    found = re.search(r"(?:model type|architecture) [`'\"]?([\w.-]+)", reason)
    if found is None:
        what = f"it is damaged or incomplete ({first_line(error)})"
        return MismatchError(source.where, what, "Download the base again.")
    what = f"transformers {transformers.__version__} does not know the architecture {found.group(1)!r}"
    return UsageError(where, what, "Upgrade transformers, or write another base.")
