"""The low-rank products: the formula, the gradient, and nothing written where autograd would notice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from molecli.functional.low_rank import add_expanded, project

ROWS, D_IN, D_OUT, RANKS = 6, 5, 7, 3


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(RANKS, D_IN, generator=generator)
    return A, torch.randn(RANKS, D_OUT, generator=generator)


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_rows(y: Tensor, u: Tensor, Bt: Tensor) -> Tensor:
    """y + u Bᵀ, one rank at a time, in float64."""
    out = y.double().reshape(-1, y.shape[-1]).clone()
    for rank in range(Bt.shape[0]):
        out += u.double()[:, rank : rank + 1] * Bt.double()[rank]
    return out.view(y.shape)


def test_projection_is_x_times_a_transposed(factors: tuple[Tensor, Tensor]) -> None:
    A, _ = factors
    x = draw(2, 3, D_IN)
    expected = torch.stack([(x * A[rank]).sum(-1) for rank in range(RANKS)], dim=-1)
    torch.testing.assert_close(project(x, A), expected)


def test_projection_takes_the_type_of_the_experts(factors: tuple[Tensor, Tensor]) -> None:
    A, _ = factors
    assert project(draw(2, D_IN).to(torch.bfloat16), A).dtype == torch.float32


@pytest.mark.parametrize("shape", [(ROWS, D_OUT), (2, 3, D_OUT), (1, 2, 3, D_OUT)])
def test_without_gradient_the_sum_is_written_into_y(factors: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> None:
    _, Bt = factors
    y, u = draw(*shape), draw(ROWS, RANKS, seed=2)
    expected, place = by_rows(y, u, Bt), y.data_ptr()
    with torch.no_grad():
        out = add_expanded(y, u, Bt)
    assert out is y
    assert out.data_ptr() == place
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_without_gradient_a_view_is_written_too(factors: tuple[Tensor, Tensor]) -> None:
    _, Bt = factors
    y, u = draw(ROWS, D_OUT).view(2, 3, D_OUT), draw(ROWS, RANKS, seed=2)
    expected = by_rows(y, u, Bt)
    with torch.no_grad():
        assert add_expanded(y, u, Bt) is y
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_with_gradient_on_but_none_wanted_the_sum_is_written_into_y(factors: tuple[Tensor, Tensor]) -> None:
    _, Bt = factors
    y, u = draw(ROWS, D_OUT), draw(ROWS, RANKS, seed=2)
    expected = by_rows(y, u, Bt)
    assert add_expanded(y, u, Bt) is y
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_with_gradient_an_activation_is_written_in_place(factors: tuple[Tensor, Tensor]) -> None:
    _, Bt = factors
    source = draw(ROWS, D_OUT).requires_grad_()
    y, u = source * 2, draw(ROWS, RANKS, seed=2).requires_grad_()
    expected, place = by_rows(y.detach(), u.detach(), Bt), y.data_ptr()
    out = add_expanded(y, u, Bt)
    assert out.data_ptr() == place
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["view", "leaf"])
def test_a_view_or_a_leaf_is_left_alone_under_autograd(factors: tuple[Tensor, Tensor], kind: str) -> None:
    _, Bt = factors
    y = (draw(ROWS, D_OUT).requires_grad_() * 2).view(2, 3, D_OUT) if kind == "view" else draw(2, 3, D_OUT)
    y = y.requires_grad_() if kind == "leaf" else y
    before, u = y.detach().clone(), draw(ROWS, RANKS, seed=2).requires_grad_()
    out = add_expanded(y, u, Bt)
    assert out.data_ptr() != y.data_ptr()
    assert torch.equal(y.detach(), before)
    torch.testing.assert_close(out.detach().double(), by_rows(before, u.detach(), Bt), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("viewed", [False, True])
def test_the_gradient_is_that_of_the_formula(viewed: bool) -> None:
    Bt = draw(RANKS, D_OUT, seed=3, dtype=torch.float64)
    y = draw(ROWS, D_OUT, dtype=torch.float64).requires_grad_()
    u = draw(ROWS, RANKS, seed=2, dtype=torch.float64).requires_grad_()

    def add(y: Tensor, u: Tensor) -> Tensor:
        activation = (y * 1.0).view(2, 3, D_OUT) if viewed else y * 1.0
        return add_expanded(activation, u, Bt)

    assert torch.autograd.gradcheck(add, (y, u))


def test_the_projection_gets_its_gradient_over_a_base_that_has_none() -> None:
    Bt, y = draw(RANKS, D_OUT, seed=3), draw(ROWS, D_OUT)
    u = draw(ROWS, RANKS, seed=2).requires_grad_()
    weight = draw(ROWS, D_OUT, seed=4)
    (add_expanded(y, u, Bt) * weight).sum().backward()
    torch.testing.assert_close(u.grad, weight @ Bt.T)


def test_writing_after_a_linear_layer_does_not_spoil_its_backward() -> None:
    layer, Bt = nn.Linear(D_IN, D_OUT), draw(RANKS, D_OUT, seed=3)
    x, u = draw(ROWS, D_IN), draw(ROWS, RANKS, seed=2)
    gradients = []
    for add in (add_expanded, lambda y, u, Bt: y + u @ Bt):
        layer.zero_grad()
        inside = x.clone().requires_grad_()
        add(layer(inside), u, Bt).square().sum().backward()
        gradients.append((inside.grad, layer.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("grad", [False, True])
def test_the_sum_keeps_the_type_of_y(grad: bool) -> None:
    Bt = draw(RANKS, D_OUT, seed=3)
    y, u = draw(ROWS, D_OUT).to(torch.bfloat16), draw(ROWS, RANKS, seed=2).requires_grad_(grad)
    expected = by_rows(y, u.detach(), Bt)
    out = add_expanded(y, u, Bt)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.detach().double(), expected, rtol=2e-2, atol=2e-2)
