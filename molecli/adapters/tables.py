"""The copies of a base's own embeddings and output head that PEFT stores beside a LoRA: compared, never used.

PEFT adds them where a LoRA adapts the output head, and where the vocabulary was resized. A copy that equals the base's
weight changes nothing; one that differs was trained, and a LoRA without it is not the one that was trained.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from molecli.adapters.info import AdapterInfo, Table
from molecli.adapters.settings import MERGE, unsupported
from molecli.adapters.weights import opened_lora
from molecli.errors import UsageError
from molecli.protocols import Matrices

_HALVES = (torch.bfloat16, torch.float16)


class Parameters(Protocol):
    """The weights of a base, by name."""

    def parameter(self, name: str) -> Tensor | None: ...


def base_tables(info: AdapterInfo, base: Matrices) -> list[tuple[str, Table]]:
    """(parameter of the base, its copy in the LoRA's file), by the last parts of their names.

    Raises: UsageError for a weight that is none of the base's tables, or has another number of rows.
    """
    leaves = {name.rpartition(".")[2]: name for name in base.tables}
    found = []
    for table in info.tables:
        module, _, part = table.parameter.rpartition(".")
        name = leaves.get(module.rpartition(".")[2])
        if name is None:
            raise unsupported(info.where, f"a LoRA that also has {table.key!r}")
        if table.shape[0] != base.tables[name][0]:
            raise grown(info, name, table.shape[0], base.tables[name][0])
        found.append((f"{name}.{part}", table))
    return found


def grown(info: AdapterInfo, name: str, there: int, here: int) -> UsageError:
    """The error for a LoRA whose vocabulary is not the base's."""
    what = f"its vocabulary was resized: its {name} has {there} rows, and this base's {here}"
    return UsageError(info.where, what, MERGE)


def check_tables(info: AdapterInfo, base: Matrices, weights: Parameters | None) -> None:
    """Raises: UsageError unless every copy equals the base's own weight."""
    for name, table in base_tables(info, base):
        if weights is None:
            raise unsupported(info.where, f"a LoRA that also has {table.key!r}")
        own = weights.parameter(name)
        if own is None:
            what = f"it repeats the base's {name} ({table.key!r}), which is quantised here and cannot be compared"
            raise UsageError(info.where, what, "Load the unquantised base.")
        with opened_lora(table.path) as file:
            copy = file.get_tensor(table.key)
        if not _equal(copy, own):
            what = f"it brings its own {name} ({table.key!r}), trained or of a resized vocabulary"
            raise UsageError(info.where, f"{what}: it is not the weight of this base", MERGE)


def _equal(copy: Tensor, own: Tensor) -> bool:
    """Whether the two are the same numbers, but for rounding to a type in which one of them was loaded."""
    own = own.to(copy.device)
    if copy.shape != own.shape:
        return False
    if torch.equal(copy.to(own.dtype), own) or torch.equal(own.to(copy.dtype), copy):
        return True
    return any(torch.equal(own.to(half).to(copy.dtype), copy) for half in _HALVES)
