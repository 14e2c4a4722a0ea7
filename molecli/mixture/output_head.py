"""The adapted output head of a language model, which reads only the tokens whose logits are asked for.

`generate` asks for those of a prompt's last token, training for the scored ones (`logits_to_keep`). A gate there must
all the same see the whole prompt, as the gates of all other layers do. Contents: OutputHead, output_head.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from molecli.errors import RunError

_KEPT = "logits_to_keep"


class OutputHead:
    """The head `module` of `model`: what it reads in the current pass, and of which tokens."""

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model, self.module = model, module
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._kept: int | Tensor = 0
        self._hidden: Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Hooks that note the asked tokens and the last hidden states of every pass."""

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(self._names, args, strict=False)), **kwargs}
            kept = given.get(_KEPT)
            self._kept, self._hidden = 0 if kept is None else kept, None

        def end(*_: Any) -> None:
            self._hidden = None

        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
            self._hidden = states if states is not None else self._hidden

        inner = [part for part in self.model.modules() if part is not self.model and isinstance(part, PreTrainedModel)]
        return [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.register_forward_hook(end),
            *(module.register_forward_hook(note) for module in inner),
        ]

    def whole(self, x: Tensor) -> Tensor:
        """The head's input for all tokens of the pass, [B, T, d], of which x [B, k, d] has the asked ones.

        Raises: RunError if that cannot be told.
        """
        if self._all:
            return x
        if self._hidden is None or not _same(self._asked(self._hidden), x):
            what = "the output head reads something else than the last hidden states, so its gate cannot see the prompt"
            raise RunError("output head", what, f"Leave {_KEPT} out, or use LoRAs that do not adapt the head.")
        return self._hidden

    def rows(self, value: Tensor) -> Tensor:
        """Gate values [N], [B, N] or [B, T, N] for the tokens that the head reads: [N], [B, N] or [B, k, N]."""
        return value if self._all or value.dim() < 3 else self._asked(value)

    @property
    def _all(self) -> bool:
        return not isinstance(self._kept, Tensor) and self._kept == 0

    def _asked(self, states: Tensor) -> Tensor:
        """Those of states [B, T, ...] that are asked for, as transformers' models take them."""
        places = self._kept if isinstance(self._kept, Tensor) else slice(-self._kept, None)
        return states[:, places]


def output_head(model: nn.Module, matrices: Collection[str]) -> OutputHead | None:
    """The output head of `model`, if it is one of the adapted `matrices`."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    names = [name for name, module in model.named_modules() if module is head and name in matrices]
    return OutputHead(model, head) if head is not None and names else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
