"""What `generate` was asked, as far as its single passes do not say it: where the prompt ends.

Without a cache each pass reads the whole text again, candidates of assisted decoding come together with the prompt, and
a prompt may come in parts. So a call of `generate` is noted while a mixture is attached, and passed on as it is.

Contents: Generation, Generations.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import GenerationMixin

from molecli.errors import RunError
from molecli.mixture.covered import Covered


@dataclass
class Generation:
    """One call of `generate`.

    prompt: the number of tokens of its prompt, with padding, None if it is not known; start: the number of tokens in
    the cache before its first pass; passes: how many passes of the decoder it has made; inner: whether another call
    made it.
    """

    prompt: int | None
    start: int | None = 0
    passes: int = 0
    inner: bool = False


class Generations:
    """The calls of `generate` of a model that are running now, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Generation] = []

    @property
    def current(self) -> Generation | None:
        return self.running[-1] if self.running else None

    def watch(self, model: nn.Module, *, pools: bool) -> list[Covered]:
        """Notes calls of the model's `generate`, if it has one, until the handles are removed.

        pools: whether gates average over tokens. Then `generate_batch` is refused, whose threads would only log it.
        """
        inner = getattr(model, "generate", None)
        if inner is None:
            return []
        usual = getattr(type(model), "generate", None) is GenerationMixin.generate

        @functools.wraps(inner)
        def generate(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # A model with its own `generate` may change the prompt before its first pass.
            prompt = _prompt_length(args, kwargs) if usual else None
            self.running.append(Generation(prompt, inner=bool(self.running)))
            try:
                return inner(*args, **kwargs)
            finally:
                self.running.pop()

        def refuse(*_: Any, **__: Any) -> None:
            what = "generate_batch packs several sequences into one row, and gates weigh LoRAs for each sequence"
            raise RunError("generation", what, "Call model.generate, or use gates with --pool token.")

        watched = [Covered(model, "generate", types.MethodType(generate, model))]
        if pools and hasattr(model, "generate_batch"):
            watched.append(Covered(model, "generate_batch", refuse))
        return watched


def _prompt_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The tokens that `generate` was given; without any, its prompt is the start token."""
    given = (kwargs.get("inputs_embeds"), args[0] if args else kwargs.get("inputs"), kwargs.get("input_ids"))
    prompt = next((one for one in given if one is not None), None)
    return 1 if prompt is None else max(1, int(prompt.shape[1]))
