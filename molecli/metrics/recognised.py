"""The share of a scene's concepts that a recogniser finds in its picture.

The recogniser is independent of the CLIP that guides training and scores alignment.
"""

from __future__ import annotations

from molecli.errors import UsageError
from molecli.metrics.image_batch import Shots


def score(shots: Shots) -> list[float]:
    """For each picture the fraction of `scene.classes` above their thresholds. Raises: UsageError: unknown class."""
    recogniser = shots.instruments.recogniser
    place = {name: i for i, name in enumerate(recogniser.classes)}
    for scene in shots.scenes:
        for name in scene.classes:
            if name not in place:
                what = f"the recogniser has no class {name!r}"
                raise UsageError(f"scene {scene.name}", what, f"It knows: {', '.join(place)}.")
    found = recogniser.found(shots.pixels).cpu()
    return [
        float(found[row, [place[name] for name in scene.classes]].float().mean())
        for row, scene in enumerate(shots.scenes)
    ]
