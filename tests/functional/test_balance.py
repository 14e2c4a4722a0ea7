"""The balance loss: smallest where the experts are used alike, and with a gradient that leads there."""

from __future__ import annotations

import math

import pytest
import torch

from molecli.functional.gating import balance_loss


@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_the_minimum_is_n_log_n_at_uniform_use(count: int) -> None:
    uniform = torch.full((count,), 1 / count)
    assert float(balance_loss(uniform)) == pytest.approx(count * math.log(count), abs=1e-4)
    torch.manual_seed(0)
    for _ in range(20):
        assert balance_loss(torch.randn(count).softmax(0)) >= balance_loss(uniform) - 1e-5


def test_it_is_minus_the_sum_of_the_logarithms() -> None:
    assert float(balance_loss(torch.tensor([0.5, 0.25, 0.25]))) == pytest.approx(-math.log(0.5 * 0.25 * 0.25))


def test_the_gradient_pulls_towards_the_expert_used_least() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0], requires_grad=True)
    balance_loss(logits.softmax(0)).backward()
    assert logits.grad is not None
    assert torch.all(logits.grad.abs() > 1e-3)
    assert logits.grad[0] > 0 > logits.grad[2]


def test_the_gradient_vanishes_at_uniform_use() -> None:
    logits = torch.zeros(4, requires_grad=True)
    balance_loss(logits.softmax(0)).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_descending_it_makes_the_use_uniform() -> None:
    logits = torch.tensor([3.0, 0.0, -2.0], requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(balance_loss(logits.softmax(0)), logits)
        logits = (logits - 0.2 * gradient).detach().requires_grad_()
    torch.testing.assert_close(logits.softmax(0), torch.full((3,), 1 / 3), rtol=0, atol=1e-3)


def test_an_expert_that_is_not_used_leaves_the_loss_finite() -> None:
    assert float(balance_loss(torch.tensor([1.0, 0.0]))) == pytest.approx(-math.log(1e-8), rel=1e-5)
