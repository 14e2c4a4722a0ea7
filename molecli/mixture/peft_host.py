"""A model inside a `PeftModel`: experts are attached beside the adapters that it has.

A `PeftModel` calls the model's `forward` itself, without the hooks of the model. While experts are attached, its tuner
calls the model instead.

Contents: inside_peft, called_whole.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from molecli.errors import UsageError
from molecli.mixture.covered import Covered

# model -> the tuners through which a PeftModel calls it
_TUNERS: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()


def inside_peft(model: nn.Module) -> nn.Module | None:
    """The model in a `PeftModel`; None for other modules. Raises: UsageError for prompts that are learned."""
    tuner: Any = getattr(model, "base_model", None)
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "get_base_model"):
        return None
    inner = getattr(tuner, "model", None)
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        what = "its PEFT adapter puts learned tokens before the prompt, and it is not known which tokens are the prompt"
        raise UsageError("attach", what, "Give the model without that adapter.")
    if not isinstance(inner, nn.Module):
        return None
    known = _TUNERS.setdefault(inner, [])
    if all(one() is not tuner for one in known):
        known.append(weakref.ref(tuner))
    return inner


def called_whole(model: nn.Module) -> list[Covered]:
    """Lets the tuners around `model` run it with its hooks; each handle ends that for one."""

    def whole(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    tuners = [tuner for one in _TUNERS.get(model, ()) if (tuner := one()) is not None]
    return [Covered(tuner, "forward", whole) for tuner in tuners if getattr(tuner, "model", None) is model]
