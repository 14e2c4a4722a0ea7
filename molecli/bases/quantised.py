"""Checkpoints that are quantised: checked before their weights are read, and loaded as transformers wants them.

Contents: quantised_by, method_of, loading_options, by_bitsandbytes, settled, say_changes, not_here.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
import transformers
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from molecli.bases.library_logs import first_line
from molecli.errors import RunError, UsageError
from molecli.files.base_source import BaseSource
from molecli.functional.layers import dequantizable, is_packed

BITSANDBYTES = "bitsandbytes"
_COMPUTING = (torch.float32, torch.bfloat16, torch.float16)


def quantised_by(config: Any) -> dict[str, Any]:
    """The quantisation in a model's configuration, which may be in its text part; empty if there is none."""
    text = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None) or {}
    return dict(found) if isinstance(found, dict) else found.to_dict()


def method_of(config: Any) -> str:
    """The name of the method in a model's configuration, "" if it is not quantised."""
    stated = quantised_by(config)
    return _name(stated) if stated else ""


def _name(stated: dict[str, Any]) -> str:
    method = stated.get("quant_method") or ""
    # Old checkpoints of bitsandbytes name only the width.
    bits = stated.get("load_in_4bit") or stated.get("load_in_8bit")
    return str(getattr(method, "value", method) or (BITSANDBYTES if bits else "unknown"))


def loading_options(
    source: BaseSource, config: Any, device: torch.device, dtype: torch.dtype, *, quantize: str | None = None
) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a base with this configuration; none for one that is and stays unquantised.

    quantize: 4bit or 8bit, to quantise it now.

    Its `dtype` is that which the method allows. Changes `config`: 4-bit weights of bitsandbytes compute in `dtype`,
    whatever the checkpoint says.
    Raises: UsageError for an unknown method, or to quantise what is quantised; RunError if a package or device that it
    needs is missing.
    """
    stated, fresh = quantised_by(config), {}
    if quantize is not None:
        _check_plain(source, config)
        fresh = {"quantization_config": by_bitsandbytes(quantize, dtype)}
        stated = fresh["quantization_config"].to_dict()
    if not stated:
        return {}
    method, where, four_bit = _name(stated), f"base {source.name}", bool(stated.get("load_in_4bit"))
    known = method if method != BITSANDBYTES else f"{method}_{4 if four_bit else 8}bit"
    if known not in AUTO_QUANTIZER_MAPPING:
        what = f"it is quantised by {method!r}, which transformers {transformers.__version__} does not know"
        raise UsageError(where, what, "Upgrade transformers, or write another base.")
    if four_bit and not fresh:
        stated["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        owner = config if getattr(config, "quantization_config", None) else config.get_text_config(decoder=True)
        owner.quantization_config = stated
    # Quantised weights cannot all be moved afterwards.
    placed: dict[str, Any] = {"device_map": {"": device}}
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(stated), pre_quantized=not fresh)
        quantizer.validate_environment(weights_only=True, **placed)
        placed["dtype"] = quantizer.update_dtype(dtype)
    except Exception as error:  # each library has its own
        raise not_here(where, method, error) from error
    return placed | fresh


def by_bitsandbytes(width: str, dtype: torch.dtype) -> Any:
    """The configuration that quantises to 4bit, as QLoRA does (2305.14314), or to 8bit (LLM.int8(), 2208.07339)."""
    if width == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _check_plain(source: BaseSource, config: Any) -> None:
    """Raises: UsageError if the base's files are quantised already."""
    method = method_of(config) or ("GGUF" if source.gguf_file else "")
    if method:
        raise UsageError("--quantize", f"base {source.name} is quantised already ({method})", "Leave it out.")


def say_changes(source: BaseSource, method: str, model: Any, *, asked: str) -> None:
    """Warns if the loaded model's type is not the one asked for, or if its weights had to be dequantised."""
    where, dtype = f"base {source.name}", str(model.dtype).removeprefix("torch.")
    if asked not in ("auto", dtype):
        warnings.warn(f"{where}: its quantisation needs {dtype}, so --dtype {asked} has no effect", stacklevel=3)
    if not getattr(model, "is_quantized", False):
        what = f"its {method} weights are dequantised to {dtype}, because nothing here computes with them"
        warnings.warn(f"{where}: {what}", stacklevel=3)


def not_here(where: str, method: str, error: Exception) -> RunError:
    """The message for a quantised base that cannot be loaded on this machine."""
    if isinstance(error, ImportError):
        named = re.search(r"pip install (?:-\S+ )*[\"'`]?([A-Za-z][\w.-]*)", str(error))
        package = named.group(1) if named else getattr(error, "name", None)
        if package is None:
            what = f"it is quantised ({method}), which needs a package that is missing ({first_line(error)})"
            return RunError(where, what, "Install it, or write the unquantised base.")
        what = f"it is quantised ({method}), which needs the package {package}"
        return RunError(where, what, f"Run: pip install {package}.")
    what = f"it is quantised ({method}), and cannot be loaded on this machine ({first_line(error)})"
    return RunError(where, what, "Write the unquantised base, or use another machine.")


def settled(model: Any, dtype: torch.dtype) -> Any:
    """The same model, with everything that is not quantised in `dtype`.

    transformers leaves it in the checkpoint's type, also beside weights that it has dequantised to `dtype`. On
    processors with AVX512-BF16, bitsandbytes' 4-bit layers would reorder their weights in the first pass, round the
    scales for good and lose the gradient from then on; this is switched off.
    """
    single = set() if dtype is torch.float32 else set(model._keep_in_fp32_modules_strict or ())
    single |= set(model._keep_in_fp32_modules or ()) if dtype is torch.float16 else set()
    for name, module in model.named_modules():
        own = torch.float32 if single & set(name.split(".")) else dtype
        packed = is_packed(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in _COMPUTING and not dequantizable(parameter) and (leaf == "bias" or not packed):
                parameter.data = parameter.data.to(own)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
