"""The amount of work of a run, counted before anything is loaded.

Contents: PlannedWork.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molecli.files.lora_spec import LoraLike
    from molecli.suites.origins import Sources


@dataclass(frozen=True)
class PlannedWork:
    """count: of examples or pictures; sources: where examples come from, by their use; targets: the matrices that a new
    LoRA adapts; loras: those that are needed; passes: of the base."""

    count: int
    sources: Mapping[str, Sources] = field(default_factory=dict)
    targets: Sequence[str] = ()
    loras: Sequence[LoraLike] = ()
    passes: int = 0
