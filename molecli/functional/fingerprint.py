"""Fingerprints identify the base of a composition; they are small enough for file metadata.

The structure (parameter names and shapes) must agree exactly, and 512 sampled values within bf16 rounding, or that of
an 8-bit floating type in which one of the two is stored without scales. A base is the same in another dtype, but not
after fine-tuning or quantising. Of a quantised layer the true shape counts and the
numbers that its weight stands for, so it has the structure of the unquantised base; which kind it is, is named.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molecli.functional.layers import dense_weight, dequantizable, is_packed, is_rounded, kernel_shape, linear_shape
from molecli.functional.wrapped import held, is_wrapper, there

SAMPLES = 512
# bf16 keeps 8 significand bits: two roundings on either side differ by less than 2^-7 of the value.
_RELATIVE = 2.0**-7
# The spacing of float16 subnormals: below it a value has no significant digits after float16.
_ABSOLUTE = 2.0**-24
# The copies that diffusers' `fuse_qkv_projections` makes of a UNet's projections.
_IMAGE_ADAPTER = re.compile(r"\.processor\.|encoder_hid_proj\.image_projection_layers\.")  # diffusers' IP-Adapters
_FUSED = re.compile(r"\.attn\d\.(to_qkv|to_kv)\.")


def fingerprint(model: nn.Module) -> str:
    """JSON: `structure`, a hash of parameter names and shapes; `sample`, base64 of 512 bf16 parameter values; and
    `quantised`, the kind of a quantised base; `stored` is an 8-bit floating type to which it was merely rounded.

    Attached adapters, hooks, offloading and fused projections do not change it. `sample` is empty on the meta device.
    """
    parameters = _base_parameters(model)
    listing = json.dumps([[p.name, list(p.shape)] for p in parameters])
    structure = hashlib.sha256(listing.encode()).hexdigest()[:16]
    sample = ""
    if parameters and not any(p.is_meta for p in parameters):
        values = _sample(parameters)
        sample = base64.b64encode(values.view(torch.int16).numpy().astype("<i2").tobytes()).decode()
    rounded = rounding(model)
    stored = {"stored": str(rounded).removeprefix("torch.")} if rounded is not None else {}
    kind = "" if stored else quantisation(model)
    return json.dumps({"structure": structure, "sample": sample} | ({"quantised": kind} if kind else stored))


def same_base(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same base, in any dtype.

    If one has no sample (a skeleton without weights), only the structure counts.
    """
    try:
        left, right = json.loads(a), json.loads(b)
        if left["structure"] != right["structure"]:
            return False
        if not left["sample"] or not right["sample"]:
            return True
        x, y = _values(left["sample"]), _values(right["sample"])
    except (ValueError, KeyError, TypeError):
        return False
    if x.shape != y.shape:
        return False
    coarse = [torch.finfo(getattr(torch, side["stored"])) for side in (left, right) if "stored" in side]
    relative = _RELATIVE + sum(info.eps / 2 for info in coarse)
    absolute = _ABSOLUTE + sum(info.eps * info.tiny / 2 for info in coarse)
    return bool(((x - y).abs() <= relative * torch.maximum(x.abs(), y.abs()) + absolute).all())


def difference(made: str, given: str) -> str:
    """How the base with the fingerprint `given` differs from the one called `made`, in words that end a sentence."""
    kinds = []
    for text in (made, given):
        try:
            kinds.append(json.loads(text).get("quantised", ""))
        except (ValueError, AttributeError):
            kinds.append("")
    if kinds[0] == kinds[1]:
        return "whose weights differ from this base's"
    was, now = (f"quantised ({kind})" if kind else "not quantised" for kind in kinds)
    return f"which was {was}, and this base is {now}"


def rounding(model: nn.Module) -> torch.dtype | None:
    """The 8-bit floating type in which layers store their weights without scales; None if there is none."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize == 1:
            return weight.dtype if is_packed(module) and is_rounded(module) else None
    return None


def quantisation(model: nn.Module) -> str:
    """The kind of a model's quantised layers, such as "bitsandbytes 4 bit"; "" if it has none."""
    packed = {_kind(module) for module in model.modules() if is_packed(module)}
    if not packed:
        return ""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return ", ".join(sorted(packed))
    stated: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    method = stated.get("quant_method", "unknown")
    for bits in (8, 4):
        if stated.get(f"load_in_{bits}bit"):
            return f"bitsandbytes {bits} bit"
    width = stated.get("bits")
    return f"{getattr(method, 'value', method)}" + (f" {width} bit" if isinstance(width, int) else "")


def _kind(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    return type(weight if isinstance(weight, Tensor) and dequantizable(weight) else layer).__name__


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the base by name; `owner` is the layer that packs it in other tensors, if one does."""

    name: str
    shape: tuple[int, ...]
    stored: tuple[Tensor, ...]
    owner: nn.Module | None = None

    @property
    def is_meta(self) -> bool:
        return any(tensor.is_meta for tensor in self.stored)

    def at(self, places: Tensor) -> Tensor:
        """[len(places)] values at these places, on the CPU; if it is not known how they are packed, stored numbers."""
        dense = dense_weight(self.owner) if self.owner is not None else None
        if dense is None:
            tensors = [t.dequantize() if dequantizable(t) else t for t in self.stored]
            dense = max(tensors, key=Tensor.numel)
            places = places * dense.numel() // max(math.prod(self.shape), 1)
        return dense.reshape(-1)[places.to(dense.device)].to(device="cpu", dtype=torch.bfloat16)


def _base_parameters(model: nn.Module) -> list[_Parameter]:
    """The parameters of the base by name, without PEFT's parameters and the prefixes of its wrappers."""
    own = []
    packed = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_packed(module)}
    for name, module in packed.items():
        module = there(module)
        stored = tuple(t.detach() for t in (*module.parameters(), *module.buffers()))
        shape = linear_shape(module) or kernel_shape(module)
        assert shape is not None
        own.append(_Parameter(_own_name(f"{name}.weight"), shape, stored, module))
    wrappers = sorted(f"{n}." for n, module in model.named_modules(remove_duplicate=False) if is_wrapper(module))
    # With duplicates: moving a model may separate tied weights, and it must stay the same base.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if (owner in packed and leaf != "bias") or _FUSED.search(name) or _of_adapter(name, wrappers):
            continue
        value = held(model.get_submodule(owner), leaf) if parameter.is_meta else parameter
        own.append(_Parameter(_own_name(name), tuple(parameter.shape), (value.detach(),)))
    # Sorted by name: wrappers register modules in another order.
    return sorted(own, key=lambda item: item.name)


def _of_adapter(name: str, wrappers: Sequence[str]) -> bool:
    """Whether a parameter is an adapter's; PEFT's layers have the model's own layer as `base_layer`."""
    if any(part.startswith("lora_") for part in name.split(".")) or _IMAGE_ADAPTER.search(name):
        return True
    place = bisect.bisect(wrappers, name) - 1
    prefix = wrappers[place] if place >= 0 else "."
    return name.startswith(prefix) and not name.removeprefix(prefix).startswith("base_layer.")


def _own_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _sample(parameters: list[_Parameter]) -> Tensor:
    """[SAMPLES] bf16 values at fixed places of the concatenated parameters, on the CPU."""
    total = sum(math.prod(p.shape) for p in parameters)
    stride = max(total // SAMPLES, 1)
    index = torch.arange(SAMPLES)
    # Vary the place in each stride (Knuth's multiplier): a stride that is a multiple of the width would hit one column.
    places = (index * total // SAMPLES + (index * 2654435761) % stride).clamp(max=total - 1)
    picked, start = torch.zeros(SAMPLES, dtype=torch.bfloat16), 0
    for parameter in parameters:
        end = start + math.prod(parameter.shape)
        here = (places >= start) & (places < end)
        if here.any():
            picked[here] = parameter.at(places[here] - start)
        start = end
    return picked


def _values(sample: str) -> Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(sample, validate=True)), dtype=torch.int16)
    return raw.view(torch.bfloat16).float()
