"""A stamp changes exactly when a tensor does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from molecli.functional.tensor_version import stamp


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return nn.Parameter(torch.ones(3)), torch.zeros(2)


def swap(tensor: Tensor) -> None:
    tensor.data = torch.full((2,), 5.0)


@pytest.mark.parametrize("write", [lambda t: t.add_(1), lambda t: t.copy_(torch.ones(2)), swap])
def test_it_changes_when_one_of_the_tensors_is_written_to(
    pair: tuple[Tensor, Tensor], write: Callable[[Tensor], None]
) -> None:
    before = stamp(pair)
    write(pair[1])
    assert stamp(pair) != before


def test_it_changes_with_an_optimizer_step() -> None:
    weight = nn.Parameter(torch.ones(3))
    before, optimizer = stamp([weight]), torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert stamp([weight]) != before


def test_it_stays_while_the_tensors_are_read(pair: tuple[Tensor, Tensor]) -> None:
    before = stamp(pair)
    (pair[0].sum() + pair[1].sum()).backward()
    assert stamp(pair) == before


def test_tensors_of_inference_mode_have_one_too() -> None:
    with torch.inference_mode():
        assert stamp([torch.ones(2)])[0][1] == 0
