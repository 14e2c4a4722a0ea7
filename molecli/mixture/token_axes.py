"""Which vectors of a matrix's input belong to which sequence and token.

Most models give every matrix [sequences, tokens, d]; some put tokens first (LED, FSMT, XLNet), join both axes (OPT),
put heads between them (DeepSeek), pad inside (LED) or send each expert its own tokens (Switch). A gate's values
reach the vectors they belong to, or the matrix is refused by name.

Contents: Axes, axes_of, routed; placed and check_one_token, for a gate's values; as_tokens, for a gate's input.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from molecli.errors import RunError

# Names of one expert among several, which gets only the tokens that a router sends it.
_ROUTED = re.compile(r"(?:^|\.)(?:experts(?=\.)|expert_?\d+(?=\.))")


class Axes(NamedTuple):
    """rows, tokens: the places of the two axes before the last one, None if unknown; both 0 if they are joined."""

    rows: int | None
    tokens: int | None

    @property
    def joined(self) -> bool:
        return self.rows == self.tokens == 0


_PLAIN = Axes(0, 1)


def routed(matrix: str) -> bool:
    """Whether the matrix is in an expert of a mixture of experts, of which each gets other tokens."""
    return _ROUTED.search(matrix) is not None


def axes_of(lead: tuple[int, ...], rows: int, tokens: int, *, first: bool | None = None) -> Axes:
    """The axes of an input [*lead, d] in a pass over `rows` sequences of `tokens` tokens.

    first: whether sequences are known to come before tokens, from a pass in which both had other sizes.
    """
    if len(lead) == 1:
        return Axes(0, 0) if lead[0] == rows * tokens else Axes(None, None)
    if rows == tokens and rows > 1 and first is None:
        return Axes(None, None)  # nobody can tell them apart
    token_first = lead[:2] == (tokens, rows) if rows != tokens else first is False
    if token_first:
        return Axes(lead.index(rows, 1), 0) if lead[0] == tokens and rows in lead[1:] else Axes(None, None)
    others = [place for place in range(1, len(lead)) if lead[place] == tokens]
    if lead[0] != rows or ((len(lead) > 2 or not others) and _twice(lead, rows, others)):
        return Axes(None, None)
    if lead[1:] == (tokens,):
        return _PLAIN
    # [sequences, heads, tokens]: an axis of the same size by chance leaves it open which one has the tokens.
    return Axes(0, others[0] if len(others) == 1 else None)


def _twice(lead: tuple[int, ...], rows: int, tokens: list[int]) -> bool:
    """Whether another axis than that of the tokens might be the sequences too."""
    return rows > 1 and any(lead[place] == rows for place in range(1, len(lead)) if [place] != tokens)


def placed(weights: Tensor, matrix: str, lead: tuple[int, ...], axes: Axes, size: tuple[int, int]) -> Tensor:
    """A gate's `weights` [b, t, R] in a shape that multiplies u [*lead, R]; `size` is (sequences, tokens) of the pass.

    b is 1 or divides the sequences (beams repeat each one); t is 1 or the tokens. Raises: RunError naming the matrix.
    """
    rows, tokens = size
    b, t, ranks = weights.shape
    if b == t == 1:
        return weights.reshape(*(1,) * len(lead), ranks)
    known = axes.rows is not None and (t == 1 or axes.tokens is not None) and not (routed(matrix) and len(lead) == 1)
    if not known or rows % b or t not in (1, tokens):
        raise _unknown(matrix, lead, size)
    if 1 < b < rows:
        weights = weights.repeat_interleave(rows // b, dim=0)
    if axes.joined:
        return weights.expand(rows, tokens, ranks).reshape(rows * tokens, ranks)
    shape = [1] * len(lead)
    assert axes.rows is not None
    shape[axes.rows] = weights.shape[0]
    if t > 1:
        assert axes.tokens is not None
        shape[axes.tokens] = t
        if axes.tokens < axes.rows:
            weights = weights.transpose(0, 1)
    return weights.reshape(*shape, ranks)


def check_one_token(matrix: str, lead: tuple[int, ...], axis: int | None, size: tuple[int, int]) -> None:
    """Raises: RunError if an input [*lead, d] in a pass over one token may have others, such as those in the cache
    (DeepSeek's `kv_b_proj`). axis: the place of its tokens in an earlier pass over several, None if there was none."""
    if axis is None or axis >= len(lead) or lead[axis] != 1:
        raise _unknown(matrix, lead, size)


def as_tokens(x: Tensor, matrix: str, axes: Axes, size: tuple[int, int]) -> Tensor:
    """The input x [*lead, d] as [sequences, tokens, d]. Raises: RunError naming the matrix."""
    lead = tuple(x.shape[:-1])
    if lead == size and axes == _PLAIN:
        return x
    one_each = x.shape[:-1].numel() == size[0] * size[1]
    if not one_each or axes.rows is None or axes.tokens is None or (routed(matrix) and len(lead) == 1):
        raise _unread(matrix, lead, size)
    if axes.joined:
        return x.reshape(*size, -1)
    return x.movedim((axes.rows, axes.tokens), (0, 1)).reshape(*size, -1)


def _unknown(matrix: str, lead: tuple[int, ...], size: tuple[int, int]) -> RunError:
    what = f"a gate weighs LoRAs for each sequence, and {_misfit(lead, size)}"
    remedy = "Give one sequence at a time, use LoRAs that do not adapt it, or --mode linear."
    if size[0] == size[1]:
        remedy = "Give another number of sequences or tokens, as with one more token of padding."
    return RunError(matrix, what, remedy)


def _unread(matrix: str, lead: tuple[int, ...], size: tuple[int, int]) -> RunError:
    what = f"a gate reads the tokens here, and {_misfit(lead, size)}"
    remedy = "Use LoRAs that do not adapt it, or --mode linear."
    if size[0] == size[1] and lead == size:
        remedy = "Give another number of sequences or tokens, as with one more token of padding."
    longer = max(lead) if len(lead) == 2 and min(lead) == size[0] else 0
    if size[1] < longer < 2 * size[1] or (longer > size[1] and longer % size[1]):
        remedy = f"If the model pads inside, pad the batch to {longer} tokens yourself (pad_to_multiple_of={longer})."
    return RunError(matrix, what, remedy)


def _misfit(lead: tuple[int, ...], size: tuple[int, int]) -> str:
    shape = " x ".join(map(str, lead)) or "1"
    return f"the input's {shape} vectors cannot be told apart as {size[0]} sequences of {size[1]} tokens"
