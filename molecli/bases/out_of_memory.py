"""What says that memory ran out, and how to have it back.

Contents: out_of_memory, freed.
"""

from __future__ import annotations

import traceback

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on an accelerator or, in torch's own words, on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def freed(error: BaseException) -> None:
    """What the error's frames hold, tensors of a batch that failed, is let go: the next, smaller one needs it."""
    traceback.clear_frames(error.__traceback__)
    if out_of_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()
