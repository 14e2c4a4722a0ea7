"""Low-rank algebra: sums, spectra and truncation agree with the dense matrices that they never build."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molecli.functional.factors import balanced, cat, difference, factored, norm, svd, truncated

D_IN, D_OUT = 12, 9
Pair = tuple[Tensor, Tensor]


def pair(rank: int, seed: int = 0, *, d_in: int = D_IN, d_out: int = D_OUT) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rank, d_in, **shape), torch.randn(d_out, rank, **shape)


def dense(factors: Pair) -> Tensor:
    A, B = factors
    return B.double() @ A.double()


def test_cat_is_the_weighted_sum_of_mixed_ranks() -> None:
    pairs = [pair(2, 1), pair(5, 2), pair(1, 3)]
    A, B = cat(pairs, [0.5, -2.0, 1.0])
    assert A.shape == (8, D_IN)
    assert B.shape == (D_OUT, 8)
    expected = 0.5 * dense(pairs[0]) - 2.0 * dense(pairs[1]) + dense(pairs[2])
    torch.testing.assert_close(dense((A, B)), expected)


def test_cat_takes_a_tensor_of_weights_and_sums_without_any() -> None:
    pairs = [pair(2, 1), pair(3, 2)]
    torch.testing.assert_close(dense(cat(pairs)), dense(pairs[0]) + dense(pairs[1]))
    by_tensor = cat(pairs, torch.tensor([0.25, 3.0]))
    torch.testing.assert_close(dense(by_tensor), 0.25 * dense(pairs[0]) + 3.0 * dense(pairs[1]))


def test_cat_refuses_a_missing_weight() -> None:
    with pytest.raises(ValueError, match="zip"):
        cat([pair(2), pair(2)], [1.0])


@pytest.mark.parametrize("rank", [1, 4, 9, 15])
def test_svd_is_that_of_the_dense_product(rank: int) -> None:
    factors = pair(rank)
    U, S, Vt = svd(*factors)
    k = min(rank, D_IN, D_OUT)
    assert (U.shape, S.shape, Vt.shape) == ((D_OUT, k), (k,), (k, D_IN))
    torch.testing.assert_close(S, torch.linalg.svdvals(dense(factors))[:k])
    torch.testing.assert_close(U @ torch.diag(S) @ Vt, dense(factors))
    torch.testing.assert_close(U.T @ U, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(k, dtype=torch.float64))


def test_balanced_factors_have_equal_norms_and_the_product() -> None:
    factors = pair(4)
    A, B = balanced(*svd(*factors))
    torch.testing.assert_close(dense((A, B)), dense(factors))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_norm_is_frobenius_also_where_factors_cancel() -> None:
    factors = pair(3)
    assert norm(*factors) == pytest.approx(dense(factors).norm().item(), rel=1e-12)
    # Through AAᵀ and BᵀB the square of this would drown in rounding: √ε ≈ 1e-8 relative would remain.
    assert norm(*difference(factors, factors)) < 1e-13 * norm(*factors)


def test_difference_is_exact() -> None:
    first, second = pair(3, 1), pair(2, 2)
    torch.testing.assert_close(dense(difference(first, second)), dense(first) - dense(second))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_best_of_its_rank_and_says_its_error(rank: int) -> None:
    factors = pair(6)
    A, B, error = truncated(*factors, rank)
    assert A.shape[0] == B.shape[1] == rank
    W = dense(factors)
    measured = (W - dense((A, B))).norm() / W.norm()
    spectrum = torch.linalg.svdvals(W)
    assert error == pytest.approx((spectrum[rank:].norm() / W.norm()).item(), abs=1e-12)
    assert error == pytest.approx(measured.item(), abs=1e-12)


def test_truncation_above_the_rank_is_exact_and_no_wider_than_needed() -> None:
    factors = pair(3)
    A, B, error = truncated(*factors, 8)
    assert A.shape[0] == 3
    assert error == 0.0
    torch.testing.assert_close(dense((A, B)), dense(factors))


def test_truncation_finds_that_copies_add_no_rank() -> None:
    one = pair(2)
    A, B, error = truncated(*cat([one, one, one]), 2)
    assert error < 1e-15
    torch.testing.assert_close(dense((A, B)), 3 * dense(one))


def test_truncation_keeps_the_type_and_decomposes_in_double() -> None:
    A, B = (x.to(torch.bfloat16) for x in pair(4))
    low_A, low_B, error = truncated(A, B, 4)
    assert low_A.dtype == low_B.dtype == torch.bfloat16
    assert error == 0.0
    torch.testing.assert_close(dense((low_A, low_B)), dense((A, B)), rtol=0.02, atol=0.1)


def test_a_zero_update_has_no_error() -> None:
    A, _ = pair(3)
    low_A, low_B, error = truncated(A, torch.zeros(D_OUT, 3, dtype=torch.float64), 1)
    assert error == 0.0
    assert dense((low_A, low_B)).abs().max() == 0


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 is below 1"):
        truncated(*pair(3), 0)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_a_rank_that_loses_nothing_keeps_every_bit_of_the_update(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    A, B, error = factored(update, 5)
    assert torch.equal(B @ A, update)
    assert (A.shape[0], B.shape[1], error) == (min(shape), min(shape), 0.0)
