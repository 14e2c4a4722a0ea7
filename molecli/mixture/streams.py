"""What the tokens of a forward pass are (padding, prompt, cached past), read from the model's own call by hooks.

Contents: Pass; Streams and Layout, what a mixture asks of any model, kept in `language_layout` and `pipeline_layout`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from molecli.catalog.methods import Kind
from molecli.errors import RunError
from molecli.protocols import Granularity, Reading, Shape, Site

# What transformers calls the key-value cache, in calls and in outputs: from 5.24 on, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclass
class Pass:
    """One forward pass along one token axis.

    step: counts passes, so that a site knows its gate is stale; past: tokens already in the key-value
    cache, and which that is; over: the pass has ended, and what is called now is recomputed for its backward pass;
    shared: what a first gate computed and the others of this pass need too.
    """

    step: int = 0
    past: int = 0
    cache: weakref.ref[Any] | None = None
    valid: Tensor | None = None
    prompt: Tensor | None = None
    memory: Tensor | None = None
    memory_valid: Tensor | None = None
    over: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)

    def differs(self, later: Pass) -> bool:
        """Whether the `later` pass goes on from another cache than this one filled."""
        return self.cache is not None and later.cache is not None and self.cache() is not later.cache()


class Streams(Protocol):
    """The current pass along each token axis of a model."""

    def attach(self, on_pass: Callable[[], None]) -> list[RemovableHandle]:
        """Hooks that keep the passes current; `on_pass` is called at the start of each."""
        ...

    def of(self, site: Site) -> Pass:
        """The pass that `site` belongs to."""
        ...

    def reading(self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None) -> Reading:
        """What the gate of `site` sees of the entry's input x and its projections u.

        Raises: RunError where the model itself was never called.
        """
        ...


def outside() -> RunError:
    """The error for experts that are called when no pass has begun."""
    what = "the experts were called outside the model they are attached to"
    return RunError("mixture", what, "Call the model itself.")


class Layout(Protocol):
    """How experts sit on one kind of model.

    kind: what the base makes; seq2seq: whether it has an encoder and a decoder; memory_width: that of the encoder's
    output, which the gates of a decoder read as the prompt, None where there is no such thing.
    """

    kind: Kind
    seq2seq: bool
    memory_width: int | None

    def matrices(self) -> dict[str, Shape]:
        """Adaptable matrices: name -> shape."""
        ...

    def in_order(self, matrices: Iterable[str]) -> list[str]:
        """The matrices in the order of a forward pass; unknown ones last."""
        ...

    def streams(self) -> Streams:
        """Fresh passes for one mixture."""
        ...

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """The gate sites over `matrices`, which are in order."""
        ...
