"""The bank of experts: moving it."""

from __future__ import annotations

import torch

from molecli.experts import Expert, ExpertBank, LowRank


def test_a_bank_that_is_moved_holds_the_same_numbers_in_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    line = LowRank(torch.randn(2, 3, generator=draw), torch.randn(4, 2, generator=draw).bfloat16(), 0.5)
    fold = LowRank(torch.randn(1, 3, 3, 3, generator=draw), torch.randn(5, 1, generator=draw), 2.0)
    bank = ExpertBank(
        [Expert("a", {"line": line, "fold": fold}, sha256="x"), Expert("b", {}), Expert("c", {"line": line})]
    )
    moved = bank.to("cpu")
    assert moved.names == bank.names
    assert moved.experts[0].sha256 == "x"
    assert moved.experts[1].factors == {}
    for before, after in zip(bank.experts, moved.experts, strict=True):
        for matrix, factor in before.factors.items():
            there = after.factors[matrix]
            assert there.scaling == factor.scaling
            assert there.A.dtype == there.B.dtype == torch.float32
            assert torch.equal(there.A, factor.A.float())
            assert torch.equal(there.B, factor.B.float())
