"""Fingerprints identify the base of a composition; they are small enough for file metadata.

The structure (parameter names and shapes) must agree exactly, and 512 sampled values within bf16 rounding, or that of
an 8-bit floating type in which one of the two is stored. A base is the same in another dtype, but not after fine-tuning
or requantising.
"""

from __future__ import annotations

import base64
import hashlib
import json

import torch
from torch import Tensor, nn

from molecli.functional.layers import held, is_wrapper

SAMPLES = 512
# bf16 keeps 8 significand bits: two roundings on either side differ by less than 2^-7 of the value.
_RELATIVE = 2.0**-7
# The spacing of float16 subnormals: below it a value has no significant digits after float16.
_ABSOLUTE = 2.0**-24


def fingerprint(model: nn.Module) -> str:
    """JSON: `structure`, a hash of parameter names and shapes; `sample`, base64 of 512 bf16 parameter values.

    `stored` is an 8-bit floating type that some parameters have, if any. Attached PEFT adapters, hooks and offloading
    do not change the fingerprint. `sample` is empty for a model on the meta device.
    """
    parameters = _base_parameters(model)
    listing = json.dumps([[name, list(p.shape)] for name, p in parameters])
    structure = hashlib.sha256(listing.encode()).hexdigest()[:16]
    sample = ""
    if parameters and not any(p.is_meta for _, p in parameters):
        values = _sample([p for _, p in parameters])
        sample = base64.b64encode(values.view(torch.int16).numpy().astype("<i2").tobytes()).decode()
    found = {"structure": structure, "sample": sample}
    coarse = next((p.dtype for _, p in parameters if p.is_floating_point() and p.dtype.itemsize == 1), None)
    if coarse is not None:
        found["stored"] = str(coarse).removeprefix("torch.")
    return json.dumps(found)


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


def _base_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters of the base by name, without PEFT's parameters and the prefixes of its wrappers."""
    own = []
    wrappers: list[str] = []
    # With duplicates: moving a model may separate tied weights, and it must stay the same base.
    for path, module in model.named_modules(remove_duplicate=False):
        if is_wrapper(module):
            wrappers.append(f"{path}.")
        for key in dict(module.named_parameters(recurse=False, remove_duplicate=False)):
            name = f"{path}.{key}" if path else key
            if _of_adapter(name, wrappers):
                continue
            own.append(
                (name.removeprefix("base_model.model.").replace(".base_layer.", "."), held(module, key).detach())
            )
    # Sorted by name: wrappers register modules in another order.
    return sorted(own, key=lambda item: item[0])


def _of_adapter(name: str, wrappers: list[str]) -> bool:
    """Whether a parameter is an adapter's; PEFT's layers have the model's own layer as `base_layer`."""
    if any(part.startswith("lora_") for part in name.split(".")):
        return True
    if ".processor." in name or "encoder_hid_proj.image_projection_layers." in name:  # diffusers' IP-Adapters
        return True
    around = [prefix for prefix in wrappers[-1:] if name.startswith(prefix)]
    return any(not name.removeprefix(prefix).startswith("base_layer.") for prefix in around)


def _sample(parameters: list[Tensor]) -> Tensor:
    """[SAMPLES] bf16 values at fixed places of the concatenated parameters, on the CPU."""
    total = sum(p.numel() for p in parameters)
    stride = max(total // SAMPLES, 1)
    index = torch.arange(SAMPLES)
    # Vary the place in each stride (Knuth's multiplier): a stride that is a multiple of the width would hit one column.
    places = (index * total // SAMPLES + (index * 2654435761) % stride).clamp(max=total - 1)
    picked, start = torch.zeros(SAMPLES, dtype=torch.bfloat16), 0
    for parameter in parameters:
        end = start + parameter.numel()
        here = (places >= start) & (places < end)
        if here.any():
            inside = (places[here] - start).to(parameter.device)
            picked[here] = parameter.reshape(-1)[inside].to(device="cpu", dtype=torch.bfloat16)
        start = end
    return picked


def _values(sample: str) -> Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(sample, validate=True)), dtype=torch.int16)
    return raw.view(torch.bfloat16).float()
