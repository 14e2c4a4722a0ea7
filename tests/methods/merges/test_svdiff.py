"""SVDiff's composition at one matrix: shifts added inside one ReLU, held to the formula written out in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from molecli.config import MethodConfig
from molecli.experts import Expert, LowRank
from molecli.functional.spectral import decompose, factored_shift, moved
from molecli.methods.merges.svdiff import lost, merge
from molecli.methods.merges.updates import Updates

D_OUT, D_IN = 9, 7


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W = random(D_OUT, D_IN, seed=0)
OWN = decompose(W)
Pair = tuple[Tensor, Tensor]


def lora(seed: int, rank: int = 2) -> Pair:
    return random(rank, D_IN, seed=seed), random(D_OUT, rank, seed=seed + 50)


def adapter(shift: Tensor) -> Pair:
    """What an SVDiff adapter with these shifts is read as."""
    A, B, _ = factored_shift(moved(shift, OWN), OWN)
    return A, B


def merged(pairs: Sequence[Pair], weights: Sequence[float], **config: float) -> Tensor:
    given = Updates("m", tuple(pairs), tuple(weights), tuple(range(len(pairs))), lambda: OWN)
    settings = MethodConfig.model_validate(config)
    A, B, _ = merge(given, settings)
    return settings.scale * (B @ A)  # as `mixture.merged` does


def by_hand(pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    """The composed matrix less the base's."""
    U, S, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    total = np.zeros_like(S)
    for (A, B), weight in zip(pairs, weights, strict=True):
        delta = (B.double() @ A.double()).numpy()
        total += weight * np.array([U[:, k] @ delta @ Vt[k] for k in range(len(S))])
    return torch.from_numpy(U @ np.diag(np.maximum(S + total, 0)) @ Vt).float() - W


def close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((x - y).norm() <= tolerance * y.norm())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.6, -1.4), (2.0, 3.0)])
def test_it_is_its_formula_for_loras_and_adapters_alike(weights: tuple[float, float]) -> None:
    pairs = [lora(1), adapter(0.3 * random(len(OWN.S), seed=2))]
    assert close(merged(pairs, weights), by_hand(pairs, weights))


def test_one_adapter_is_itself() -> None:
    A, B = adapter(random(len(OWN.S), seed=3))
    assert close(merged([(A, B)], [1.0]), B @ A)


def test_adapters_add_their_shifts() -> None:
    a, b = (0.1 * random(len(OWN.S), seed=seed) for seed in (4, 5))
    A, B = adapter(a + b)
    assert close(merged([adapter(a), adapter(b)], [1.0, 1.0]), B @ A)


def test_the_relu_is_one_around_the_sum() -> None:
    """Two shifts that each stop short of zero go below it together, and there they end; the sum of updates goes on."""
    half = -0.8 * OWN.S
    found = merged([adapter(half)] * 2, [1.0, 1.0])
    assert close(found, -W)
    A, B = adapter(half)
    assert close(2 * B @ A, -1.6 * W)


def test_the_scale_is_inside_the_relu_too() -> None:
    shift = -0.8 * OWN.S
    assert close(merged([adapter(shift)], [1.0], scale=2.0), -W)
    assert close(merged([adapter(shift)], [1.0], scale=0.5), -0.4 * W)


def test_a_rank_keeps_the_largest_moves() -> None:
    shift = random(len(OWN.S), seed=6)
    given = Updates("m", (adapter(shift),), (1.0,), (0,), lambda: OWN)
    A, _, error = merge(given, MethodConfig(rank=3))
    moves = moved(shift, OWN).abs().sort().values
    assert len(A) == 3
    assert error == pytest.approx(float(moves[:-3].norm() / moves.norm()), rel=1e-4)


def test_what_no_shift_says_of_a_lora_is_known() -> None:
    A, B = lora(7)
    shift = (OWN.U.T @ B * (OWN.Vt @ A.T)).sum(1)
    other = adapter(random(len(OWN.S), seed=8))
    both = Expert("x", {"a": LowRank(A, B / 3, 3.0), "b": LowRank(*other, 1.0)})
    wanted = ((B @ A).square().sum() - shift.square().sum()) / (
        (B @ A).square().sum() + (other[1] @ other[0]).norm() ** 2
    )
    assert lost(both, lambda matrix: OWN) == pytest.approx(float(wanted) ** 0.5, rel=1e-4)
    assert lost(Expert("y", {"b": LowRank(*other, 1.0)}), lambda matrix: OWN) < 1e-5
    assert lost(Expert("z", {"b": LowRank(0 * A, B, 1.0)}), lambda matrix: OWN) == 0.0


def test_updates_without_a_base_cannot_be_shifts() -> None:
    with pytest.raises(ValueError, match="without their base"):
        merge(Updates("m", (lora(1),), (1.0,), (0,)), MethodConfig())
