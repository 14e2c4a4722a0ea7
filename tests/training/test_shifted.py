"""A base with shifted singular values: the base itself at 0, changed weights elsewhere, and only shifts that train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molecli.bases.weights import BaseWeights
from molecli.errors import UsageError
from molecli.mixture.layout import adaptable_matrices, host_of
from molecli.training.shifted import Shifted

KINDS = ("t5", "bart", "llama", "gpt2")


def shifted(model: nn.Module, matrices: list[str] | None = None) -> Shifted:
    return Shifted(BaseWeights(model), list(adaptable_matrices(model)) if matrices is None else matrices)


def randomise(adapter: Shifted, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> Tensor:
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = {"labels": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **labels).logits


def changed(model: nn.Module, adapter: Shifted) -> nn.Module:
    """A copy of the model, without hooks, whose weights are W' = U diag(ReLU(σ + δ)) Vᵀ."""
    fresh = copy.deepcopy(model)
    for matrix, moves in adapter.shifts().items():
        layer: Any = fresh.get_submodule(matrix)
        own = BaseWeights(model).spectrum(matrix)
        W = own.U @ torch.diag(torch.relu(own.S + moves[: len(own.S)])) @ own.Vt
        W = W.T if type(layer).__name__ == "Conv1D" else W.view_as(layer.weight)
        layer.weight = nn.Parameter(W)
    return fresh


@pytest.mark.parametrize("kind", KINDS)
def test_shifts_of_zero_are_the_base_to_the_last_bit(kind: str, make_tiny: Any) -> None:
    model = make_tiny(kind).model
    base = logits(model)
    with shifted(model) as adapter:
        assert torch.equal(logits(model), base)
        randomise(adapter)
        assert not torch.allclose(logits(model), base, atol=1e-2)
        with adapter.disable_adapter():
            assert torch.equal(logits(model), base)
        assert not torch.allclose(logits(model), base, atol=1e-2)
    assert torch.equal(logits(model), base)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_shifted_is_what_changed_weights_give(kind: str, make_tiny: Any) -> None:
    model = make_tiny(kind).model
    adapter = shifted(model)
    randomise(adapter, 2.0)
    assert any((moves == -BaseWeights(model).spectrum(m).S).any() for m, moves in adapter.shifts().items())  # the ReLU
    wanted = logits(changed(model, adapter))
    with adapter:
        for found in (logits(model), torch.no_grad()(logits)(model)):
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_convolutions_too(tiny_sd: Any) -> None:
    host = host_of(tiny_sd)
    matrices = [name for name in adaptable_matrices(host) if name.startswith("unet.")]
    assert {len(adaptable_matrices(host)[name]) for name in matrices} == {2, 4}
    adapter = shifted(host, matrices)
    randomise(adapter, 0.3)
    g = torch.Generator().manual_seed(0)
    width = tiny_sd.unet.config.cross_attention_dim
    inputs = (torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 500]), torch.randn(2, 5, width, generator=g))
    base = tiny_sd.unet(*inputs).sample
    wanted = changed(host, adapter).unet(*inputs).sample  # type: ignore[operator, union-attr]
    with adapter:
        found = tiny_sd.unet(*inputs).sample
        with torch.no_grad():
            still = tiny_sd.unet(*inputs).sample
    for x in (found, still):
        assert (x - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (base - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_gradients_are_those_of_the_changed_weights(tiny_llama: Any) -> None:
    """δ's gradient is u_kᵀ (∂loss/∂W') v_k, and nothing of a singular value that has been shifted below zero."""
    model, matrix = tiny_llama.model, "model.layers.1.mlp.down_proj"
    adapter = shifted(model, [matrix])
    own = BaseWeights(model).spectrum(matrix)
    delta = adapter.get_parameter(f"{matrix}.delta")
    delta.data = 0.1 * torch.randn(len(delta), generator=torch.Generator().manual_seed(2))
    delta.data[3] = -2 * own.S[3]
    with adapter:
        logits(model).square().mean().backward()
    reference = changed(model, adapter)
    layer: Any = reference.get_submodule(matrix)
    layer.weight.requires_grad_(True)
    logits(reference).square().mean().backward()
    wanted = torch.diagonal(own.U.T @ layer.weight.grad @ own.Vt.T).clone()
    wanted[3] = 0.0
    assert delta.grad is not None
    torch.testing.assert_close(delta.grad, wanted, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_are_named_after_their_matrices_and_in_float32(tiny_llama: Any) -> None:
    model = tiny_llama.model.bfloat16()
    told: list[tuple[int, int]] = []
    matrices = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    adapter = Shifted(BaseWeights(model), matrices, progress=lambda _, done, total: told.append((done, total)))
    parameters = dict(adapter.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {f"{m}.delta": (32,) for m in matrices}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert told == [(1, 2), (2, 2)]
    randomise(adapter)
    with adapter:
        y = logits(model)
        y.float().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in parameters.values())


def test_a_value_that_repeats_has_one_shift_and_zeros_none() -> None:
    torch.manual_seed(0)
    layer, nothing = nn.Linear(4, 4), nn.Linear(4, 3)
    layer.weight.data = torch.diag(torch.tensor([3.0, 2.0, 2.0, 0.0]))
    nn.init.zeros_(nothing.weight)
    model = nn.ModuleDict({"a": layer, "b": nothing})
    adapter = shifted(model, ["a", "b"])  # type: ignore[arg-type]
    parameters = dict(adapter.named_parameters())
    assert {name: len(p) for name, p in parameters.items()} == {"a.delta": 2}
    parameters["a.delta"].data = torch.tensor([1.0, -0.5])
    found = adapter.shifts()
    assert found["a"].tolist() == [1.0, -0.5, -0.5, 0.0]
    assert found["b"].tolist() == [0.0, 0.0, 0.0]
    x = torch.randn(5, 4)
    with adapter, torch.no_grad():
        torch.testing.assert_close(layer(x), x @ torch.diag(torch.tensor([4.0, 1.5, 1.5, 0.0])).T + layer.bias)
        assert torch.equal(nothing(x), nothing.bias.expand(5, 3))


@pytest.mark.parametrize(
    ("options", "kind"), [({"groups": 2}, "with groups"), ({"padding_mode": "circular"}, "with 'circular' padding")]
)
def test_a_convolution_that_shifts_cannot_follow(options: dict[str, Any], kind: str) -> None:
    model = nn.ModuleDict({"c": nn.Conv2d(4, 4, 3, padding=1, **options)})
    with pytest.raises(UsageError) as caught:
        shifted(model, ["c"])
    assert str(caught.value) == (
        f"c: it is a convolution {kind}, whose singular values cannot be shifted. Leave it out of adapter.targets."
    )
