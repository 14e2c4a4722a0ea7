"""What a run would go through, counted before anything is loaded.

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
    """count: examples or pictures; sources: where examples come from, by what they are for; targets: the matrices that
    a new LoRA adapts; loras: those that are composed; passes: of the base."""

    count: int
    sources: Mapping[str, Sources] = field(default_factory=dict)
    targets: Sequence[str] = ()
    loras: Sequence[LoraLike] = ()
    passes: int = 0
