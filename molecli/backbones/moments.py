"""Which denoising step a call of the UNet is.

Contents: Clock; guided.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from molecli.protocols import Moment


class Clock:
    """Which denoising step a UNet call is, read off the scheduler: its own loop need not be known."""

    def __init__(self) -> None:
        self._times: weakref.ref[Tensor] | None = None
        self._values: list[float] = []
        self._index = -1

    def moment(self, scheduler: Any, timestep: Tensor | float, guided: bool) -> Moment:
        """The step at `timestep`: the next one, where it fits (a scheduler may come back to a time), else the first
        of that time."""
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        times = getattr(scheduler, "timesteps", None)
        if not isinstance(times, Tensor) or times.numel() == 0:
            return Moment(0, 1, time, guided)
        if self._times is None or self._times() is not times:  # every picture's scheduler sets its times anew
            self._times, self._values, self._index = weakref.ref(times), [float(t) for t in times.tolist()], -1
        following = self._index + 1
        if following >= len(self._values) or self._values[following] != time:
            gaps = [abs(value - time) for value in self._values]
            following = gaps.index(min(gaps))
        self._index = following
        return Moment(following, len(self._values), time, guided)


def guided(pipe: Any, rows: int) -> bool:
    """Whether the UNet's rows are two halves. A pipeline that was never called knows of no guidance."""
    return rows % 2 == 0 and bool(getattr(pipe, "do_classifier_free_guidance", False))
