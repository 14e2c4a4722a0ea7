"""What the tokens of a forward pass are (padding, prompt, cached past). Hooks read it from the model's own call.

Contents: Pass; the protocols Streams and Layout, implemented in `language_layout` and `pipeline_layout`; outside.
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

# The cache's names in transformers' calls and outputs: from 5.24 on, before, and in recurrent models (Mamba, RWKV).
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state")


@dataclass
class Pass:
    """One forward pass along one token axis.

    step: the number of the pass, by which a site knows that its gate value is old; past, cache: the number of tokens in
    the cache, and that cache (a recurrent state counts as one token; past is None if it is unknown); over: the pass has
    ended, and calls now recompute it for the backward pass; scale: a factor on all experts' updates, which a pipeline's
    caller gives; shared: values that one gate computed and other gates of this pass need too.
    """

    step: int = 0
    past: int | None = 0
    cache: weakref.ref[Any] | None = None
    valid: Tensor | None = None
    prompt: Tensor | None = None
    memory: Tensor | None = None
    memory_valid: Tensor | None = None
    over: bool = False
    scale: float = 1.0
    shared: dict[Any, Any] = field(default_factory=dict)

    def differs(self, later: Pass) -> bool:
        """Whether the `later` pass continues with another cache than that of this pass."""
        return self.cache is not None and later.cache is not None and self.cache() is not later.cache()


class Streams(Protocol):
    """The current pass along each token axis of a model."""

    def attach(self, on_pass: Callable[[], None]) -> list[RemovableHandle]:
        """Hooks that update the passes; `on_pass` is called at the start of each pass."""
        ...

    def of(self, site: Site) -> Pass:
        """The pass that `site` belongs to."""
        ...

    def reading(self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None) -> Reading:
        """The input of the gate of `site`, from the entry's input x and its projections u.

        Raises: RunError if the model itself was not called.
        """
        ...

    def fitted(self, matrix: str, value: Tensor, x: Tensor) -> Tensor:
        """A gate's `value` ([N], [B, N] or [B, T, N]) for the rows of x, the input of `matrix`.

        Raises: RunError if x has other rows than the sequences or pictures that the value belongs to.
        """
        ...


def outside() -> RunError:
    """The error for experts that are called before a pass of the model has begun."""
    what = "the experts were called outside the model they are attached to"
    return RunError("mixture", what, "Call the model itself.")


class Layout(Protocol):
    """How experts are placed on one kind of model.

    kind: texts or pictures; seq2seq: whether it has an encoder and a decoder; memory_width: the width of the encoder's
    output, which the gates of a decoder read as the prompt; None if there is no encoder.
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
        """New passes for one mixture."""
        ...

    def outside(self, matrices: Iterable[str]) -> list[str]:
        """Those of the matrices that work on something else than the prompt, so that no gate can be there."""
        ...

    def sites(self, matrices: Sequence[str], granularity: Granularity, *, per_token: bool) -> list[Site]:
        """The gate sites over `matrices`, which are in the order of a forward pass."""
        ...
