from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from torch import nn

from molecli.functional.fingerprint import fingerprint, same_base
from tests.helpers.tiny_pipelines import build_pipeline


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_loaded_in_another_dtype_is_the_same_base(make_tiny, kind, dtype):
    model = make_tiny(kind).model
    full = fingerprint(model)
    assert same_base(full, fingerprint(model.to(dtype)))
    assert same_base(full, full)


def test_other_weights_of_the_same_shape_are_another_base(make_tiny):
    assert not same_base(fingerprint(make_tiny("t5", seed=0).model), fingerprint(make_tiny("t5", seed=1).model))


def test_a_lightly_fine_tuned_base_is_another_base(tiny_llama):
    before = fingerprint(tiny_llama.model)
    for parameter in tiny_llama.model.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn(parameter.shape)
    assert not same_base(before, fingerprint(tiny_llama.model))


def test_another_structure_is_another_base(make_tiny):
    assert not same_base(fingerprint(make_tiny("llama").model), fingerprint(make_tiny("gpt2").model))


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_attached_peft_adapters_and_hooks_leave_it_as_it_was(make_tiny, kind):
    model = make_tiny(kind).model
    before = fingerprint(model)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    )
    model.register_forward_hook(lambda *_: None)
    assert fingerprint(model) == before
    assert fingerprint(adapted) == before
    assert fingerprint(adapted.base_model.model) == before


def test_a_skeleton_is_compared_by_structure_alone(tiny_t5, make_tiny):
    skeleton = fingerprint(copy.deepcopy(tiny_t5.model).to("meta"))
    assert json.loads(skeleton)["sample"] == ""
    assert same_base(skeleton, fingerprint(tiny_t5.model))
    assert not same_base(skeleton, fingerprint(make_tiny("bart").model))


def test_text_that_is_no_fingerprint_matches_nothing(tiny_t5):
    whole = fingerprint(tiny_t5.model)
    for other in ("", "[]", "{}", '{"structure": 3}', json.dumps({**json.loads(whole), "sample": "%%%"})):
        assert not same_base(whole, other)


def test_a_model_smaller_than_the_sample_has_one_too():
    model = nn.Linear(2, 3)
    assert same_base(fingerprint(model), fingerprint(copy.deepcopy(model)))
    assert not same_base(fingerprint(model), fingerprint(nn.Linear(2, 3)))


def test_fused_projections_are_no_other_base() -> None:
    pipe = build_pipeline("sd")
    before = fingerprint(pipe.unet)
    pipe.unet.fuse_qkv_projections()
    assert fingerprint(pipe.unet) == before
