"""Detects changes of tensors. Contents: Stamp, stamp."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

Stamp = list[tuple[int, int]]


def stamp(tensors: Iterable[Tensor]) -> Stamp:
    """A value that changes if the memory of one of the tensors is replaced or written to."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
