"""A base's matrices: dense in one layout whatever the layer stores, decomposed once, hashed to the last bit."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from molecli.bases import weights
from molecli.bases.weights import BaseWeights
from molecli.errors import UsageError
from molecli.mixture.layout import adaptable_matrices, host_of

Q = "model.layers.0.self_attn.q_proj"


def test_a_transposed_layer_is_turned_round(tiny_gpt2: Any) -> None:
    base, shapes = BaseWeights(tiny_gpt2.model), adaptable_matrices(tiny_gpt2.model)
    matrix = "transformer.h.0.mlp.c_fc"
    stored = tiny_gpt2.model.get_submodule(matrix).weight
    assert torch.equal(base.dense(matrix), stored.T)
    assert base.shape(matrix) == shapes[matrix] == (128, 32)
    assert base.spectrum(matrix).U.shape == (128, 32)


def test_a_convolution_is_a_matrix_of_its_patches(tiny_sd: Any) -> None:
    host = host_of(tiny_sd)
    base, shapes = BaseWeights(host), adaptable_matrices(host)
    matrix = next(name for name, shape in shapes.items() if len(shape) == 4 and shape[2] == 3)
    c_out, c_in, height, width = base.shape(matrix)
    assert base.shape(matrix) == shapes[matrix]
    assert base.dense(matrix).shape == (c_out, c_in * height * width)


def test_quantised_weights_are_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    base = BaseWeights(nn.ModuleDict({"q": Packed()}))
    with pytest.raises(UsageError) as caught:
        base.spectrum("q")
    assert str(caught.value) == (
        "q: its weights are quantised (uint8), and singular values can be computed only of unquantised ones. "
        "Load the unquantised base."
    )


def test_a_matrix_is_decomposed_once(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BaseWeights(tiny_llama.model).spectrum(Q)
    monkeypatch.setattr(weights, "decompose", lambda W: pytest.fail("decomposed again"))
    assert BaseWeights(tiny_llama.model).spectrum(Q) is first


@pytest.mark.parametrize("through", ["data", "parameter"])
def test_and_again_when_its_weight_has_changed(tiny_llama: Any, through: str) -> None:
    base = BaseWeights(tiny_llama.model)
    before, weight = base.spectrum(Q), tiny_llama.model.get_submodule(Q).weight
    with torch.no_grad():
        (weight.data if through == "data" else weight).mul_(2.0)
    torch.testing.assert_close(base.spectrum(Q).S, 2.0 * before.S)


def test_nothing_is_kept_of_a_model_that_is_gone(make_tiny: Any) -> None:
    model = make_tiny("llama", seed=7).model
    BaseWeights(model).spectrum(Q)
    held = len(weights._SPECTRA)
    del model
    gc.collect()
    assert len(weights._SPECTRA) == held - 1


def test_a_hash_tells_the_last_bit_and_not_the_type(tiny_llama: Any) -> None:
    base, weight = BaseWeights(tiny_llama.model), tiny_llama.model.get_submodule(Q).weight
    exact = base.digest(Q)
    weight.data = weight.data.bfloat16()
    rounded = base.digest(Q)
    assert rounded != exact
    weight.data = weight.data.float()
    assert base.digest(Q) == rounded
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
    assert base.digest(Q) != rounded


def test_a_fingerprint_is_the_whole_models(tiny_llama: Any) -> None:
    from molecli.functional.fingerprint import fingerprint

    assert BaseWeights(tiny_llama.model).fingerprint() == fingerprint(tiny_llama.model)
