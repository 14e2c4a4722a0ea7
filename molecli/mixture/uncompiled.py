"""Models run eagerly while experts are attached to one, also those that torch.compile has compiled.

Compiled code does not call hooks that were added after it was compiled, and what is compiled with hooks would keep them
after they were removed. With torch's stance "force_eager" none is used and none is made; after that the code from
before is used again. The stance is one for the whole process.

Contents: run_eagerly.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

_holders: weakref.WeakSet[_Eager] = weakref.WeakSet()
_stance: Any = None  # torch's own context, which knows the stance from before


class _Eager:
    """Holds the stance until it is removed; the last one gives back that from before."""

    def __init__(self) -> None:
        global _stance
        if not _holders:
            _stance = torch.compiler.set_stance("force_eager")
        _holders.add(self)
        weakref.finalize(self, _release)  # a mixture may be dropped without being detached

    def remove(self) -> None:
        _holders.discard(self)
        _release()


def _release() -> None:
    global _stance
    if not _holders and _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None


def run_eagerly() -> _Eager:
    """No compiled code runs until `remove` of the result is called."""
    return _Eager()
