"""What lies behind a module, whoever has wrapped or offloaded it."""

from __future__ import annotations

import accelerate
import peft
import torch
from torch import nn

from molecli.functional.wrapped import device_of, held, is_managed, is_wrapper, layers_of, own_layer, there


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_a_peft_layer_stands_for_the_layer_it_wraps() -> None:
    model = small()
    first = model[0]  # type: ignore[index]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    assert [name for name, _ in layers_of(model)] == ["", "0", "1", "2"]
    assert is_wrapper(dict(layers_of(model))["0"])
    assert own_layer(dict(layers_of(model))["0"]) is first
    assert own_layer(first) is first
    assert is_managed(model)


def test_offloaded_weights_are_read_where_they_are() -> None:
    model, like = small(), small()
    assert not is_managed(model)
    assert there(model[0]) is model[0]  # type: ignore[index]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    for name in ("0", "2"):
        layer, expected = model.get_submodule(name), like.get_submodule(name)
        assert torch.equal(held(layer, "weight"), expected.weight)  # type: ignore[arg-type]
        assert torch.equal(there(layer).weight, expected.weight)  # type: ignore[arg-type]
        assert layer.weight.is_meta  # type: ignore[union-attr]
    assert is_managed(model)


def test_the_device_is_that_of_the_computation() -> None:
    assert device_of(small()) == torch.device("cpu")
    assert device_of(small().to("meta")) == torch.device("cpu")  # nothing says where it will be
    model = small()
    accelerate.cpu_offload_with_hook(model, "cuda:0" if torch.cuda.is_available() else "cpu")
    assert device_of(model).type == ("cuda" if torch.cuda.is_available() else "cpu")
