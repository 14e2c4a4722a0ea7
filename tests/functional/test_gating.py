"""Pools, softmax with temperature, top-k, masks, entropy: each against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from molecli.functional.gating import entropy, gate_values, mean_pool, rescale, running_mean, span, unit

BATCH, TOKENS, WIDTH = 3, 6, 4
VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


# -- pools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_pool_is_the_mean_of_the_tokens_that_count(x: Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    pooled = mean_pool(x, *span(VALID, dtype))
    expected = torch.stack([x[i].float()[VALID[i].bool()].mean(0) for i in range(BATCH)])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_pool_ignores_what_padding_holds(x: Tensor) -> None:
    changed = torch.where(VALID[..., None].bool(), x, x + 100.0)
    torch.testing.assert_close(mean_pool(changed, *span(VALID, x.dtype)), mean_pool(x, *span(VALID, x.dtype)))


def test_a_sequence_without_tokens_pools_to_zero(x: Tensor) -> None:
    assert torch.equal(mean_pool(x, *span(torch.zeros(BATCH, TOKENS), x.dtype)), torch.zeros(BATCH, WIDTH))


def test_the_mean_of_thousands_of_bfloat16_tokens_is_summed_in_float32() -> None:
    x = torch.ones(1, 5000, 2, dtype=torch.bfloat16)
    assert torch.equal(mean_pool(x, *span(torch.ones(1, 5000), x.dtype)), torch.ones(1, 2))


def test_the_running_mean_is_the_mean_up_to_each_token(x: Tensor) -> None:
    pooled, _ = running_mean(x, VALID)
    for i in range(BATCH):
        for t in range(TOKENS):
            seen = x[i, : t + 1][VALID[i, : t + 1].bool()]
            expected = seen.mean(0) if len(seen) else torch.zeros(WIDTH)
            torch.testing.assert_close(pooled[i, t], expected, rtol=1e-5, atol=1e-6)


def test_the_running_mean_goes_on_where_a_chunk_ended(x: Tensor) -> None:
    whole, (total, count) = running_mean(x, VALID)
    state, parts = None, []
    for chunk in (slice(0, 2), slice(2, 5), slice(5, 6)):
        part, state = running_mean(x[:, chunk], VALID[:, chunk], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, (total, count), rtol=1e-5, atol=1e-6)
    assert torch.equal(count, VALID.sum(1).float())


def test_unit_divides_by_the_norm_and_leaves_zero_alone(x: Tensor) -> None:
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(BATCH, TOKENS))
    torch.testing.assert_close(unit(x) * x.norm(dim=-1, keepdim=True), x)
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


# -- values ------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[1.0, 3.0, -2.0, 0.5], [0.0, -0.3, 4.0, 1.0]])


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_values_are_the_softmax_of_the_logits_over_the_temperature(temperature: float) -> None:
    values = gate_values(LOGITS, torch.tensor(math.log(temperature)))
    expected = torch.tensor([softmax(row, temperature) for row in LOGITS.tolist()])
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gate_values(LOGITS, temperature), expected)  # a number is the temperature itself


def test_the_temperature_carries_gradient_unless_the_logits_are_equal() -> None:
    for logits, moves in ((LOGITS, True), (torch.zeros(2, 4), False)):
        log_temperature = torch.zeros((), requires_grad=True)
        gate_values(logits, log_temperature)[:, 0].sum().backward()
        assert log_temperature.grad is not None
        assert bool(log_temperature.grad != 0) == moves


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 9])
def test_top_k_keeps_the_largest_and_rescales_them(top_k: int) -> None:
    values = gate_values(LOGITS, 1.0, top_k=top_k)
    for row, logits in zip(values.tolist(), LOGITS.tolist(), strict=True):
        dense = softmax(logits)
        chosen = sorted(range(4), key=lambda i: -dense[i])[:top_k]
        total = sum(dense[i] for i in chosen)
        assert row == pytest.approx([dense[i] / total if i in chosen else 0.0 for i in range(4)], abs=1e-6)


def test_one_kept_gate_learns_as_the_dense_gate_would() -> None:
    target = torch.tensor([0.3, -1.0, 2.0, 0.5])
    gradients = []
    for top_k in (1, None):
        logits = LOGITS.clone().requires_grad_()
        values = gate_values(logits, 1.0, top_k=top_k)
        (values * target).sum().backward()
        gradients.append(logits.grad)
        assert top_k is None or values.detach().amax(-1).tolist() == pytest.approx([1.0, 1.0])
    assert float(gradients[0].abs().max()) > 0.01
    torch.testing.assert_close(gradients[0], gradients[1])


def test_masked_experts_are_off_and_the_others_keep_their_proportions() -> None:
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
    values, dense = gate_values(LOGITS, 1.0, keep=keep), gate_values(LOGITS, 1.0)
    assert torch.equal(values[:, 1], torch.zeros(2))
    torch.testing.assert_close(values.sum(-1), torch.ones(2))
    torch.testing.assert_close(values[:, 0] / values[:, 3], dense[:, 0] / dense[:, 3])
    torch.testing.assert_close(values, rescale(dense, keep))


def test_top_k_chooses_among_the_experts_that_are_on() -> None:
    values = gate_values(LOGITS, 1.0, top_k=1, keep=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert values.argmax(-1).tolist() == [0, 2]
    torch.testing.assert_close(values.amax(-1), torch.ones(2))


def test_experts_whose_values_underflow_still_share_out_the_mask_exactly() -> None:
    logits = torch.tensor([500.0, 1.0, 0.0])
    keep = torch.tensor([0.0, 1.0, 1.0])
    assert float(gate_values(logits, 1.0)[1]) == 0.0  # so rescaling the values would have nothing to rescale
    values = gate_values(logits, 1.0, keep=keep)
    assert values.tolist() == pytest.approx([0.0, *softmax([1.0, 0.0])])


def test_rescaled_values_sum_to_one_and_nothing_kept_is_nothing() -> None:
    values = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(rescale(values, torch.tensor([1.0, 1.0, 0.0])), torch.tensor([0.4, 0.6, 0.0]))
    assert torch.equal(rescale(values, torch.zeros(3)), torch.zeros(3))


def test_entropy_is_log_n_at_uniform_and_zero_at_one_expert() -> None:
    values = torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(entropy(values), torch.tensor([math.log(4), 0.0, math.log(2)]), rtol=0, atol=1e-6)
