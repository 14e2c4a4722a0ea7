"""The layers of the text encoder(s) that a composition's gates skipped when they learned: prompts are encoded alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from molecli.errors import UsageError
from molecli.files.composition import Composition


def use_clip_skip(backbone: Any, asked: int | None, compositions: Iterable[Composition]) -> None:
    """Sets the backbone's `clip_skip`: the one that is asked for, otherwise the compositions' own.

    Raises: UsageError if the compositions differ and none is asked for.
    """
    recorded = {_recorded(composition) for composition in compositions}
    if asked is None and len(recorded) > 1:
        said = ", ".join(sorted("none" if skip is None else str(skip) for skip in recorded))
        what = f"the compositions were made with different values ({said})"
        raise UsageError("--clip-skip", what, "Write the one to draw with.")
    backbone.clip_skip = asked if asked is not None else next(iter(recorded), None)


def _recorded(composition: Composition) -> int | None:
    recipe = yaml.safe_load(composition.recipe) or {}
    skip = (recipe.get("image") or {}).get("clip_skip")
    return skip if isinstance(skip, int) else None
