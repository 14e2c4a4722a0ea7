"""What a layer computes, however it stores its weight: true shapes, compute types, dense weights, or None."""

from __future__ import annotations

import pytest
import torch
from packed import KINDS, READABLE, unpacked
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molecli.functional.layers import compute_dtype, dense_weight, is_packed, kernel_shape, linear_shape


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_has_the_shape_and_type_of_the_linear_one(kind: str) -> None:
    layer = KINDS[kind](linear())
    assert linear_shape(layer) == (48, 32)
    assert compute_dtype(layer) is torch.float32
    assert is_packed(layer) == (kind != "Scaled")


@pytest.mark.parametrize("kind", KINDS)
def test_its_dense_weight_is_what_it_multiplies_with_or_unknown(kind: str) -> None:
    layer = KINDS[kind](linear())
    found = dense_weight(layer)
    if kind in READABLE:
        assert found is not None
        torch.testing.assert_close(found, unpacked(layer), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, linear().weight)
    else:
        assert found is None


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.full((48, 1), 0.5), torch.full((1, 48), 0.5)])
def test_float8_is_multiplied_by_its_scale(scale: Tensor) -> None:
    layer = linear()
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    plain = layer.weight.float()
    # Rounded only, as diffusers' layerwise casting does.
    assert torch.equal(dense_weight(layer), plain)  # type: ignore[arg-type]
    layer.weight_scale = nn.Parameter(scale)
    assert torch.equal(dense_weight(layer), plain / 2)  # type: ignore[arg-type]
    layer.weight_scale = nn.Parameter(torch.ones(3, 5, 7))
    assert dense_weight(layer) is None


def test_a_class_that_only_changes_names_is_a_plain_layer() -> None:
    class Renamed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    layer = Renamed(32, 48)
    assert dense_weight(layer) is layer.weight
    assert not is_packed(layer)


def test_plain_layers_keep_their_shapes() -> None:
    conv = nn.Conv2d(6, 8, (3, 1), groups=2)
    assert (linear_shape(conv), kernel_shape(conv)) == (None, (8, 3, 3, 1))
    assert dense_weight(conv) is conv.weight
    turned = Conv1D(48, 32)
    assert linear_shape(turned) == (48, 32)
    assert torch.equal(dense_weight(turned), turned.weight.T)  # type: ignore[arg-type]
    assert linear_shape(nn.Linear(4, 5, device="meta")) == (5, 4)


@pytest.mark.parametrize("module", [nn.Embedding(4, 5), nn.LayerNorm(4), nn.Bilinear(2, 3, 4), nn.Identity()])
def test_other_modules_are_no_linear_layers(module: nn.Module) -> None:
    assert linear_shape(module) is None
    assert not is_packed(module)


def test_a_wrapper_is_none_but_the_layer_in_it_is() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.in_features, self.out_features = linear(), 32, 48

    wrapper = Wrapper()
    assert linear_shape(wrapper) is None
    assert linear_shape(wrapper.base_layer) == (48, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compute_type_is_never_the_packed_one(dtype: torch.dtype) -> None:
    for kind in KINDS:
        packed = KINDS[kind](linear())
        assert compute_dtype(packed.to(dtype)).itemsize > 1
    stated = KINDS["Columns"](linear().to(dtype))
    assert compute_dtype(stated) is dtype
