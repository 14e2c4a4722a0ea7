"""Which pipeline makes a UNet call: several may share one UNet (diffusers' `from_pipe`). Contents: calling_pipeline."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def calling_pipeline(own: Any) -> Any:
    """The pipeline whose `__call__` is running and calls the UNet; `own` if none is, as in a loop of the user's.

    A UNet call does not name it, and guidance, the scheduler and the number of steps are the pipeline's.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if hasattr(caller, "unet") and hasattr(caller, "scheduler"):
                return caller
        frame = frame.f_back
    return own
