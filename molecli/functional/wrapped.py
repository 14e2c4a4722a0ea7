"""What lies behind a module: the layer inside a PEFT layer, and a weight that accelerate keeps elsewhere.

An adapter library replaces a layer by its own one, which calls it; the layer keeps its name in every file. Offloaded
weights are on the meta device between calls, and accelerate's hook has their values.

Contents: is_wrapper, own_layer, layers_of, held, there, device_of, is_managed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is an adapter library's layer around a layer of the model (PEFT's `BaseTunerLayer`)."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def own_layer(module: nn.Module) -> nn.Module:
    """The model's own layer: the innermost of PEFT's layers around it, or the module itself."""
    while is_wrapper(module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but without the insides of adapter layers, which stand for the layers they wrap."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if is_wrapper(module) else None
        yield name, module


def held(module: nn.Module, name: str) -> Tensor:
    """The module's own parameter `name` with its values, also when accelerate has offloaded them."""
    tensor = getattr(module, name)
    if tensor.is_meta:
        for hook in _hooks(module):
            stored = getattr(hook, "weights_map", None)
            if stored is not None and name in stored:
                return stored[name]
    return tensor


def there(module: nn.Module) -> nn.Module:
    """The module itself, or a copy that has its offloaded parameters."""
    away = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.is_meta]
    if not away:
        return module
    found = copy.copy(module)
    found.__dict__["_parameters"] = module._parameters | {name: held(module, name) for name in away}
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device on which the model computes: where accelerate's hooks execute it, else where its parameters are."""
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def is_managed(model: nn.Module) -> bool:
    """Whether something else changes it from call to call: hooks of accelerate or diffusers, which move weights or
    change their type, or PEFT's layers, whose adapters and scales are set from outside."""
    hooks = ("_hf_hook", "_diffusers_hook")
    return any(is_wrapper(module) or any(hasattr(module, name) for name in hooks) for module in model.modules())


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else (*getattr(hook, "hooks", ()), hook)
