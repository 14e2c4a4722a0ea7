"""How much of a LoRA some of its matrices are. Contents: share."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from molecli.adapters.info import AdapterInfo
from molecli.adapters.weights import opened_lora


def share(info: AdapterInfo, names: Collection[str]) -> float:
    """The share of the LoRA's weights in the matrices `names`: of its squared Frobenius norm ‖scaling·B·A‖², in [0, 1].

    These shares sum to 1 over the matrices. Of a LoRA that is zero it is the share of its matrices.
    """
    sizes: dict[str, float] = {}
    for path in dict.fromkeys(matrix.keys.path for matrix in info.adapted.values()):
        with opened_lora(path) as file:
            for name, matrix in info.adapted.items():
                if matrix.keys.path == path:
                    a, b = file.get_tensor(matrix.keys.A), file.get_tensor(matrix.keys.B)
                    sizes[name] = _squared(a) if info.origin is not None else matrix.scaling**2 * _product(a, b)
    total = sum(sizes.values())
    if not 0 < total < float("inf"):  # zero, or not finite: the reader says so
        return len(names) / len(sizes)
    return sum(sizes[name] for name in names) / total


def _product(a: Tensor, b: Tensor) -> float:
    """‖B A‖², from the two small Gram matrices."""
    wide_a, wide_b = a.double().flatten(1), b.double().reshape(-1, a.shape[0])
    return float(((wide_a @ wide_a.T) * (wide_b.T @ wide_b)).sum())


def _squared(shift: Tensor) -> float:
    return float(shift.double().square().sum())
