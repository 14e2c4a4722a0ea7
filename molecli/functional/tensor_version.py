"""What tells that tensors are no longer what they were.

Tensors in, no tensors out. Contents: Stamp, stamp.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

Stamp = list[tuple[int, int]]


def stamp(tensors: Iterable[Tensor]) -> Stamp:
    """What changes when the memory of one of the tensors is replaced or written to."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
