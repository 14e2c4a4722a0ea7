"""Three LoRAs on a tiny pipeline, and prompts that call them."""

from __future__ import annotations

from collections.abc import Callable

from tiny_pipelines import make_expert

from molecli.bases.diffusion import Diffusion
from molecli.experts import Expert

PROMPTS = ["a cat", "two dogs"]
TRIGGERS = {"a": "cat", "b": "dog", "c": "sea"}


def trio(backbone: Diffusion, keep: Callable[[str], bool] = lambda matrix: True) -> list[Expert]:
    """Three LoRAs of different rank and alpha; the last leaves the queries alone."""
    matrices = backbone.matrices()

    def some(matrix: str) -> bool:
        return keep(matrix) and not matrix.endswith("to_q")

    return [
        make_expert("a", matrices, rank=4, alpha=8, seed=0, keep=keep),
        make_expert("b", matrices, rank=2, alpha=3, seed=1, keep=keep),
        make_expert("c", matrices, rank=5, alpha=4, seed=2, keep=some),
    ]
