"""A model inside a `PeftModel`: experts are attached beside the adapters that it has.

A `PeftModel` calls the model's `forward` itself, without the hooks of the model. While experts are attached, its tuner
calls the model instead.

Contents: inside_peft, CalledWhole, called_whole.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from molecli.errors import UsageError

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


class CalledWhole:
    """A tuner's calls run the model with its hooks, until `remove` is called."""

    def __init__(self, tuner: nn.Module, model: nn.Module) -> None:
        self._tuner, self._before = tuner, tuner.__dict__.get("forward")
        self._covering = lambda *args, **kwargs: model(*args, **kwargs)
        tuner.forward = self._covering

    def remove(self) -> None:
        if self._tuner.__dict__.get("forward") is not self._covering:
            return  # another mixture has covered it since, in the same way
        if self._before is None:
            del self._tuner.forward
        else:
            self._tuner.forward = self._before


def called_whole(model: nn.Module) -> list[CalledWhole]:
    """Lets the tuners around `model` run it with its hooks; each handle ends that for one."""
    tuners = [tuner for one in _TUNERS.get(model, ()) if (tuner := one()) is not None]
    return [CalledWhole(tuner, model) for tuner in tuners if getattr(tuner, "model", None) is model]
