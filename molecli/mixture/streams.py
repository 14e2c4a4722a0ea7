"""What the tokens of a forward pass are (padding, prompt, cached past). Hooks read it from the model's own call.

Contents: Pass; the protocols Streams and Layout, implemented in `language_layout` and `pipeline_layout`; outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from molecli.catalog.methods import Kind
from molecli.errors import RunError
from molecli.mixture.continuation import Trace
from molecli.mixture.generation import Generation
from molecli.protocols import Gate, Granularity, Reading, Shape, Site, Stream

# The cache's names in transformers' calls and outputs: from 5.24 on, before, and in recurrent models (Mamba, RWKV).
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state")


class Tokens(Protocol):
    """The tokens of a pass: [B, T] or unknown, which are not padding, and which belong to the prompt."""

    shape: tuple[int, int] | None

    @property
    def valid(self) -> Tensor: ...

    @property
    def prompt(self) -> Tensor: ...

    @property
    def memory_valid(self) -> Tensor: ...

    def size(self) -> tuple[int, int]:
        """The numbers of sequences and tokens. Raises: RunError if they are unknown."""
        ...

    def all_answer(self) -> bool:
        """Whether it is known that no token belongs to the prompt."""
        ...


@dataclass
class Pass:
    """One forward pass along one token axis.

    step: the number of the pass, by which a site knows that its gate value is old; tokens: what the call says of its
    tokens, None if all count; past: the number of tokens in the cache (a recurrent state counts as one token), None if
    it is unknown; trace: what continues what; moved: whether the rows of its cache may have been put in another order;
    generation: the running call of `generate`; memory: the encoder's output that it reads; over: it has ended, and
    calls now recompute it for the backward pass; shared: values that one gate computed and other gates of this pass
    need too; learning: whether a backward pass may follow, which needs values and expanded: by site, the gate's value
    and where it was computed, and that value by rank; scale: a factor on all updates that a pipeline's caller gives.
    """

    step: int = 0
    tokens: Tokens | None = None
    past: int | None = 0
    trace: Trace = field(default_factory=Trace)
    moved: bool = False
    generation: Generation | None = None
    memory: Tensor | None = None
    over: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)
    learning: bool = False
    values: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    expanded: dict[Any, Any] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def valid(self) -> Tensor | None:
        """[B, T], which tokens are not padding. Raises: RunError if the call does not say it."""
        return None if self.tokens is None else self.tokens.valid

    @property
    def prompt(self) -> Tensor | None:
        """[B, T], which tokens belong to the prompt. Raises: RunError if the call does not say it."""
        return None if self.tokens is None else self.tokens.prompt

    @property
    def memory_valid(self) -> Tensor | None:
        """[B, S], which tokens of the memory are not padding. Raises: RunError if the call does not say it."""
        return None if self.tokens is None or self.memory is None else self.tokens.memory_valid


class Streams(Protocol):
    """The current pass along each token axis of a model; `probing`: it runs only to see the shapes of inputs."""

    probing: bool

    def attach(self, on_pass: Callable[[], Any], *, pools: bool = False) -> list[Any]:
        """Hooks that update the passes; `on_pass` is called at the start of each pass, and returns whether the order of
        an input's axes is still to be found out; pools: whether gates average over tokens. Each has `remove`."""
        ...

    def parts(self) -> Sequence[nn.Module]:
        """The modules whose calls are passes; those inside another one first."""
        ...

    def optional(self, matrices: Sequence[str]) -> Collection[str]:
        """Those of the matrices whose input a pass may lack, such as pictures."""
        ...

    def of(self, site: Site) -> Pass:
        """The pass that `site` belongs to."""
        ...

    def fitted(self, matrix: str, value: Tensor, x: Tensor) -> Tensor:
        """A gate's `value` ([N], [B, N] or [B, T, N]) for the rows of x, the input of `matrix`.

        Raises: RunError if x has other rows than those that the value belongs to.
        """
        ...

    def axes(self, stream: Stream) -> tuple[int, int] | None:
        """The numbers of sequences and of tokens along a token axis; None if rows are never in another order."""
        ...

    def reading(
        self, site: Site, x: Tensor, u: Tensor, state: tuple[Tensor, Tensor] | None, *, gate: Gate, first: bool | None
    ) -> Reading:
        """The input of the `gate` of `site`, from the entry's input x and its projections u.

        first: whether x is known to have sequences before tokens. Raises: RunError if the model itself was not called,
        did not say what the gate needs, or gives this input in another shape.
        """
        ...

    def check_shared(self) -> None:
        """Raises: RunError if a gate's value from the encoder does not belong to what the decoder reads."""
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
