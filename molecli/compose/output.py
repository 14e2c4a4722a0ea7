"""From a mode's name and settings to the method on the UNet's outputs: names become places, triggers are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from molecli.compose.composite import Composite
from molecli.compose.loratorio import Loratorio
from molecli.compose.switch import Switch
from molecli.compose.w_composite import WComposite
from molecli.compose.w_switch import WSwitch
from molecli.errors import UsageError
from molecli.files.near import suggestion
from molecli.files.recipe import MethodConfig
from molecli.protocols import OutputMethod

CHARACTER = "character"


def output_method(
    mode: str,
    names: Sequence[str],
    weights: Tensor,
    config: MethodConfig,
    *,
    triggers: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> OutputMethod:
    """The method `mode` over the experts `names` with `weights` [N], their scale included.

    `triggers` and `kinds` are by expert name. Raises: UsageError for an order that is none of these experts, and for
    an expert without the trigger that the mode needs.
    """
    turns = _turns(config.order, names)
    if mode == "switch":
        return Switch(weights, turns=turns, tau=config.tau)
    if mode == "composite":
        return Composite(weights)
    if mode == "loratorio":
        return Loratorio(weights, base_share=config.base_share)
    words = [_trigger(mode, name, triggers or {}) for name in names]
    if mode == "w_composite":
        return WComposite(weights, words)
    if mode != "w_switch":
        raise UsageError("--mode", f"{mode!r} does not act on the UNet's outputs")
    characters = [turn for turn in turns if (kinds or {}).get(names[turn]) == CHARACTER]
    return WSwitch(weights, words, turns=turns, tau=config.tau, characters=characters)


def _turns(order: Sequence[str], names: Sequence[str]) -> list[int]:
    for name in order:
        if name not in names:
            raise UsageError("method.order", f"there is no LoRA {name!r}", suggestion(name, tuple(names)))
    missing = [name for name in names if name not in order]
    if order and (missing or len(order) != len(names)):
        what = f"it leaves out {', '.join(missing)}" if missing else "it names a LoRA twice"
        raise UsageError("method.order", what, f"Name each once: {', '.join(names)}.")
    return [names.index(name) for name in order or names]


def _trigger(mode: str, name: str, triggers: Mapping[str, str]) -> str:
    trigger = triggers.get(name, "").strip()
    if not trigger:
        what = f"mode {mode} needs the words that call the LoRA, and knows none"
        raise UsageError(name, what, f"Write concepts.{name}.trigger in the recipe, or use another mode.")
    return trigger
