"""Recognises errors about lack of memory, and frees memory after an error.

Contents: out_of_memory, freed.
"""

from __future__ import annotations

import traceback

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is about lack of memory, on an accelerator or on the CPU (recognised by torch's message)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def freed(error: BaseException) -> None:
    """Frees the tensors in the error's frames (those of the failed batch): the next, smaller batch needs the memory."""
    traceback.clear_frames(error.__traceback__)
    if out_of_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()
