"""Shifts of singular values: the published formula, projections by least squares, and what repeats or vanishes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molecli.functional.spectral import Spectrum, decompose, factored_shift, moved, projected, residual, shared, spread

SHAPES = [(12, 10), (10, 12), (9, 9), (1, 7)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(rank: int, d_out: int, d_in: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return random(rank, d_in, seed=seed), random(d_out, rank, seed=seed + 100)


def dense(own: Spectrum, diagonal: Tensor) -> Tensor:
    return own.U @ torch.diag(diagonal) @ own.Vt


def close(x: Tensor, y: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((x - y).norm() <= tolerance * y.norm().clamp_min(1e-12))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=seed).double())[0]


def with_values(values: list[float], d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """(W, U, V) of these singular values, float64."""
    U, V = orthogonal(d_out, 3)[:, : len(values)], orthogonal(d_in, 4)[:, : len(values)]
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T, U, V


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spectrum_is_the_matrix(shape: tuple[int, int]) -> None:
    W = random(*shape)
    own = decompose(W)
    k = min(shape)
    assert (own.U.shape, own.S.shape, own.Vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert {x.dtype for x in (own.U, own.S, own.Vt)} == {torch.float32}
    assert (own.width, own.distinct) == (k, k)
    assert close(dense(own, own.S), W)
    assert close(own.U.T @ own.U, torch.eye(k))
    assert close(own.Vt @ own.Vt.T, torch.eye(k))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shift_of_nothing_is_the_matrix_to_the_last_bit(shape: tuple[int, int]) -> None:
    own = decompose(random(*shape))
    moves = moved(torch.zeros_like(own.S), own)
    A, B, error = factored_shift(moves, own)
    assert not moves.any()
    assert not (B @ A).any()
    assert (A.shape, B.shape, error) == ((1, shape[1]), (shape[0], 1), 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_the_published_formula(shape: tuple[int, int]) -> None:
    W = random(*shape)
    own = decompose(W)
    shift = 2.0 * random(len(own.S), seed=5)
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    wanted = U @ torch.diag(torch.relu(S + shift)) @ Vt
    A, B, error = factored_shift(moved(shift, own), own)
    assert close(W + B @ A, wanted.float())
    assert error == 0.0


def test_below_zero_a_singular_value_is_zero() -> None:
    own = decompose(random(6, 5))
    moves = moved(torch.full((5,), -100.0), own)
    assert torch.equal(moves, -own.S)
    A, B, _ = factored_shift(moves, own)
    assert close(B @ A, -dense(own, own.S))


def test_a_small_shift_of_a_large_value_keeps_its_digits() -> None:
    own = decompose(1e4 * random(6, 6))
    shift = torch.full((6,), 1e-5)
    assert torch.equal(moved(shift, own), shift)
    assert not torch.equal(torch.relu(own.S + shift) - own.S, shift)  # what the formula read literally would leave


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_that_is_shifts_gives_them_and_leaves_nothing(shape: tuple[int, int]) -> None:
    own = decompose(random(*shape))
    shift = random(len(own.S), seed=6)
    A, B, _ = factored_shift(shift, own)
    found = projected(A, B, own)
    assert close(found, shift)
    assert residual(A, B, found, own) <= 1e-6 * float(shift.norm())


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (9, 9)])
def test_a_projection_is_the_least_squares_one(shape: tuple[int, int]) -> None:
    own = decompose(random(*shape))
    A, B = pair(3, *shape)
    found = projected(A, B, own)
    columns = torch.stack([torch.outer(own.U[:, k], own.Vt[k]).flatten() for k in range(len(own.S))], dim=1)
    wanted = torch.linalg.lstsq(columns.double(), (B @ A).flatten().double()[:, None]).solution[:, 0]
    assert close(found, wanted.float(), 1e-5)
    lost = residual(A, B, found, own)
    assert lost**2 == pytest.approx(float((B @ A).square().sum() - found.square().sum()), rel=1e-4)
    assert lost < residual(A, B, found + 0.1, own)


def test_a_rank_keeps_the_largest_moves_and_says_what_it_costs() -> None:
    own = decompose(random(8, 6))
    moves = torch.tensor([0.1, -3.0, 0.2, 0.0, 2.0, -0.5])
    A, B, error = factored_shift(moves, own, 2)
    assert len(A) == 2
    assert close(B @ A, dense(own, torch.tensor([0.0, -3.0, 0.0, 0.0, 2.0, 0.0])))
    assert error == pytest.approx(float((dense(own, moves) - B @ A).norm() / moves.norm()), rel=1e-5)
    assert len(factored_shift(moves, own)[0]) == 5  # a move that is 0 needs no rank
    assert len(factored_shift(moves, own, 100)[0]) == 5


def test_values_that_repeat_share_one_shift() -> None:
    W, _, _ = with_values([5.0, 3.0, 3.0, 3.0, 1.0], 7, 6)
    own = decompose(W)
    assert own.owner.tolist() == [0, 1, 1, 1, 2]
    assert torch.equal(spread(torch.tensor([1.0, 2.0, 3.0]), own), torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0]))
    assert close(shared(torch.tensor([1.0, 0.0, 3.0, 6.0, 4.0]), own), torch.tensor([1.0, 3.0, 3.0, 3.0, 4.0]))


def test_no_choice_of_vectors_for_a_repeated_value_changes_an_update() -> None:
    W, U, V = with_values([5.0, 3.0, 3.0, 3.0, 1.0], 7, 6)
    own, turn = decompose(W), orthogonal(3, 8)
    other_U, other_V = U.clone(), V.clone()
    other_U[:, 1:4], other_V[:, 1:4] = U[:, 1:4] @ turn, V[:, 1:4] @ turn
    assert close(other_U @ torch.diag(own.S.double()) @ other_V.T, W)
    other = Spectrum(other_U.float(), own.S, other_V.T.float(), own.owner)
    A, B = pair(2, 7, 6)
    shifts = [projected(A, B, s) for s in (own, other)]
    assert close(shifts[0], shifts[1], 1e-5)
    assert close(dense(own, shifts[0]), dense(other, shifts[1]), 1e-5)
    # A shift for each alone would be another update in the other basis.
    alone = [((s.U.T @ B) * (s.Vt @ A.T)).sum(1) for s in (own, other)]
    assert not close(dense(own, alone[0]), dense(other, alone[1]), 0.05)


def test_a_projection_onto_shared_shifts_is_the_nearest_too() -> None:
    W, _, _ = with_values([5.0, 3.0, 3.0, 3.0, 1.0], 7, 6)
    own = decompose(W)
    A, B = pair(2, 7, 6)
    found = projected(A, B, own)
    wanted = (B @ A).square().sum() - found.square().sum()
    assert residual(A, B, found, own) ** 2 == pytest.approx(float(wanted), rel=1e-4)


def test_what_is_zero_has_no_shift() -> None:
    W, _, _ = with_values([4.0, 2.0, 1.0], 7, 6)
    own = decompose(W.float())  # the zeros are rounding now
    assert (len(own.S), own.distinct, own.width) == (3, 3, 6)
    assert close(dense(own, own.S), W.float())


def test_a_matrix_of_zeros_has_no_singular_values() -> None:
    own = decompose(torch.zeros(4, 3))
    assert (len(own.S), own.distinct, own.width) == (0, 0, 3)
    A, B, error = factored_shift(projected(*pair(2, 4, 3), own), own)
    assert (A.shape, B.shape, error) == ((1, 3), (4, 1), 0.0)
    assert not (B @ A).any()
