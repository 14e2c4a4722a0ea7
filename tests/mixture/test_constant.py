"""A composition that is the same for every input: its weights, its updates, and what a rank leaves of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gates import randomise
from torch import Tensor, nn

from molecli.config import GateConfig, MethodConfig
from molecli.errors import RunError
from molecli.experts import Expert, LowRank
from molecli.mixture.build import build_mixture
from molecli.mixture.constant import constant_weights, fixed_mixture, limited, mean_weights, updates

WEIGHTS = {"a": 0.5, "b": -2.0, "c": 1.0}


@pytest.fixture
def model(tiny_llama: Any) -> nn.Module:
    return tiny_llama.model


@pytest.fixture
def experts(model: nn.Module) -> list[Expert]:
    """Three of ranks 3, 2 and 4 and other scalings; the last adapts the queries alone, half as the type."""
    g = torch.Generator().manual_seed(0)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))}

    def factor(name: str, rank: int, scaling: float, kind: torch.dtype = torch.float32) -> LowRank:
        d_out, d_in = shapes[name]
        A, B = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g)
        return LowRank(A.to(kind), B.to(kind), scaling)

    queries = [name for name in shapes if name.endswith("q_proj")]
    return [
        Expert("a", {name: factor(name, 3, 2.0) for name in shapes}),
        Expert("b", {name: factor(name, 2, 0.3) for name in shapes}),
        Expert("c", {name: factor(name, 4, 1.0, torch.bfloat16) for name in queries}),
    ]


def summed(experts: list[Expert], matrix: str, weights: dict[str, float]) -> Tensor:
    present = [e for e in experts if matrix in e.factors]
    parts = [LowRank(f.A.double(), f.B.double(), f.scaling) for f in (e.factors[matrix] for e in present)]
    return torch.stack([weights[e.name] * f.delta() for e, f in zip(present, parts, strict=True)]).sum(0)


@pytest.mark.parametrize("mode", ["linear", "nla"])
def test_the_updates_of_a_fixed_mode_are_the_weighted_sum(model: nn.Module, experts: list[Expert], mode: str) -> None:
    mixture = build_mixture(model, experts, mode=mode, weights=WEIGHTS)
    weights = constant_weights(mixture)
    assert weights is not None
    found = updates(mixture, weights, renormalize=False)
    total = sum(WEIGHTS.values()) if mode == "nla" else 1.0
    assert set(found) == set(experts[0].factors)
    for name, low_rank in found.items():
        assert low_rank.rank == (9 if name.endswith("q_proj") else 5)
        torch.testing.assert_close(low_rank.delta(), summed(experts, name, WEIGHTS) / total, rtol=1e-6, atol=1e-6)


def test_a_masked_expert_takes_no_rank_and_what_nothing_adapts_is_left_out(
    model: nn.Module, experts: list[Expert]
) -> None:
    mixture = build_mixture(model, experts, mode="linear")
    weights = constant_weights(mixture, off=("a", "b"))
    assert weights is not None
    found = updates(mixture, weights, renormalize=False)
    assert set(found) == set(experts[2].factors)
    assert {low_rank.rank for low_rank in found.values()} == {4}


def test_masking_rescales_weights_that_add_up_to_one(model: nn.Module, experts: list[Expert]) -> None:
    weights = constant_weights(build_mixture(model, experts, mode="nla"), off=("b",))
    assert weights is not None
    torch.testing.assert_close(weights["network"], torch.tensor([0.5, 0.0, 0.5]))


def test_learned_weights_without_an_input_are_constant(model: nn.Module, experts: list[Expert]) -> None:
    mixture = build_mixture(model, experts, mode="gated", gate=GateConfig(input="none", granularity="block"))
    randomise(mixture)
    weights = constant_weights(mixture)
    assert weights is not None
    assert list(weights) == [site.name for site in mixture.sites]
    for values in weights.values():
        assert values.sum() == pytest.approx(1)
        assert values.std() > 0.1


def test_gates_that_look_are_not_constant_and_are_averaged(model: nn.Module, experts: list[Expert]) -> None:
    mixture = build_mixture(model, experts, mode="gated", gate=GateConfig(granularity="network"))
    assert constant_weights(mixture) is None
    observed = {"network": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])}
    torch.testing.assert_close(mean_weights(mixture, observed)["network"], torch.tensor([0.5, 0.25, 0.25]))


def test_a_site_that_no_input_reached_is_named(model: nn.Module, experts: list[Expert]) -> None:
    mixture = build_mixture(model, experts, mode="gated", gate=GateConfig(granularity="network"))
    with pytest.raises(RunError, match="no input reached the gate at network"):
        mean_weights(mixture, {})


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_fixed_mixture_computes_the_updates(model: nn.Module, experts: list[Expert], renormalize: bool) -> None:
    config = GateConfig(granularity="matrix", absent="renormalize" if renormalize else "zero")
    mixture = build_mixture(model, experts, mode="gated", gate=config)
    g = torch.Generator().manual_seed(1)
    weights = {site.name: torch.randn(3, generator=g).softmax(0) for site in mixture.sites}
    ids = torch.tensor([[5, 9, 4, 20]])
    with fixed_mixture(mixture, weights, renormalize=renormalize), torch.no_grad():
        expected = model(ids).logits
    with torch.no_grad():
        for name, low_rank in updates(mixture, weights, renormalize=renormalize).items():
            module = model.get_submodule(name)
            module.weight += low_rank.delta().float()  # type: ignore[operator]
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_share_of_absent_experts_is_handed_on(model: nn.Module, experts: list[Expert]) -> None:
    mixture = build_mixture(model, experts, mode="gated", gate=GateConfig(granularity="network"))
    weights = {"network": torch.tensor([0.25, 0.25, 0.5])}
    down = next(name for name in experts[0].factors if name.endswith("down_proj"))
    kept = updates(mixture, weights, renormalize=False)[down].delta()
    torch.testing.assert_close(updates(mixture, weights, renormalize=True)[down].delta(), 2 * kept)


def test_a_merged_mixture_has_its_own_updates(model: nn.Module, experts: list[Expert]) -> None:
    mixture = build_mixture(model, experts, mode="ties", method=MethodConfig())
    weights = constant_weights(mixture)
    assert weights is not None
    found = updates(mixture, weights, renormalize=False)
    for name, low_rank in mixture.merged().factors.items():  # type: ignore[attr-defined]
        torch.testing.assert_close(found[name].delta().float(), low_rank.delta(), rtol=1e-5, atol=1e-6)


def test_what_adds_nothing_is_left_out(model: nn.Module, experts: list[Expert]) -> None:
    first = next(iter(experts[0].factors))
    silent = dict(experts[0].factors)
    silent[first] = LowRank(silent[first].A, torch.zeros_like(silent[first].B), 1.0)
    mixture = build_mixture(model, [Expert("a", silent)], mode="linear")
    weights = constant_weights(mixture)
    assert weights is not None
    assert set(updates(mixture, weights, renormalize=False)) == set(silent) - {first}


def factors_of(rank: int, *shape: int) -> LowRank:
    g = torch.Generator().manual_seed(rank)
    A = torch.randn(rank, *shape[1:], generator=g, dtype=torch.float64)
    return LowRank(A, torch.randn(shape[0], rank, generator=g, dtype=torch.float64), 1.0)


def test_a_limit_gives_the_best_factors_and_their_errors_convolutions_too() -> None:
    factors = {"linear": factors_of(6, 12, 10), "conv": factors_of(6, 12, 4, 3, 3), "small": factors_of(2, 12, 10)}
    done: list[tuple[int, int]] = []
    found, errors = limited(factors, 3, progress=lambda _, i, n: done.append((i, n)))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert (found["small"].rank, errors["small"]) == (2, 0.0)
    assert found["conv"].A.shape == (3, 4, 3, 3)
    for name in ("linear", "conv"):
        full = factors[name].delta()
        spectrum = torch.linalg.svdvals(full.flatten(1))
        assert errors[name] == pytest.approx(float(spectrum[3:].norm() / spectrum.norm()))
        assert float((found[name].delta() - full).norm() / full.norm()) == pytest.approx(errors[name])


def test_without_a_limit_nothing_changes_but_what_is_wider_than_its_matrix() -> None:
    narrow, wide = factors_of(6, 12, 10), factors_of(30, 12, 10)
    found, errors = limited({"narrow": narrow, "wide": wide})
    assert errors == {"narrow": 0.0, "wide": 0.0}
    assert torch.equal(found["narrow"].A, narrow.A)
    assert found["wide"].rank == 10
    torch.testing.assert_close(found["wide"].delta(), wide.delta())
