"""Code that torch.compile made of a model before LoRAs were attached to it, or while they were.

Contents: forget_compiled.
"""

from __future__ import annotations

import sys

import torch


def forget_compiled() -> None:
    """Drops all compiled code of this process; it is compiled again when it is next called.

    Compiled code does not notice hooks that are added to a module after its compilation, so that LoRAs would silently
    do nothing. Which code contains a module is not known: it may be a function of the user's that calls the model.
    Source: `torch._dynamo.config.skip_nnmodule_hook_guards`.
    """
    if "torch._dynamo" in sys.modules:  # otherwise nothing was ever compiled
        torch.compiler.reset()
