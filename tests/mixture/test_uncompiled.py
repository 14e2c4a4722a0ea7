"""Compiled models: experts act on them, and the base is the same afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from molecli.mixture import uncompiled
from molecli.mixture.layout import host_of
from molecli.mixture.uncompiled import run_eagerly
from tests.helpers.language_bases import LLAMA, prompts, random_base, random_mixture

IDS, MASK = prompts()
ENDS = ("q_proj", "up_proj")
BACKEND = "eager"  # dynamo traces and guards, and needs no C++ compiler


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Nothing that an earlier test left attached counts."""
    for left in list(uncompiled._holders):
        left.remove()


@pytest.fixture
def _compiler() -> None:
    """Skips where something else in this process has switched torch.compile off for good."""
    calls: list[int] = []
    torch.compile(lambda x: x * 3, backend=lambda graph, _: calls.append(1) or graph.forward)(torch.ones(2))
    if not calls:
        pytest.skip("torch.compile is switched off in this process")


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend=BACKEND)


def in_place(model: Any) -> Any:
    model.compile(backend=BACKEND)
    return model


def its_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


def its_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place, its_forward, its_layers])
@pytest.mark.parametrize("how", [{"mode": "linear"}, {"pool": "prompt"}])
def test_a_model_compiled_before_gives_the_mixture_and_then_the_base(how: Any, compiled: Callable[[Any], Any]) -> None:
    plain = random_base("llama", **{**LLAMA, "num_hidden_layers": 1})
    model = compiled(copy.deepcopy(plain))
    with torch.no_grad():
        base = model(input_ids=IDS, attention_mask=MASK).logits  # compiles it
        with random_mixture(plain, ENDS, **how):
            expected = plain(input_ids=IDS, attention_mask=MASK).logits
        with random_mixture(host_of(model), ENDS, **how):
            mixed = model(input_ids=IDS, attention_mask=MASK).logits
        after = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(mixed, expected)
    assert not torch.allclose(mixed, base, atol=1e-2)
    assert torch.equal(after, base)


def test_a_model_compiled_while_attached_is_the_base_afterwards() -> None:
    model = random_base("llama", **{**LLAMA, "num_hidden_layers": 1})
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        with random_mixture(model, ENDS, mode="linear"):
            compiled = wrapped(model)
            assert not torch.allclose(compiled(input_ids=IDS).logits, base, atol=1e-2)
        torch.testing.assert_close(compiled(input_ids=IDS).logits, base, rtol=1e-6, atol=1e-6)


@pytest.mark.slow  # run apart: others in one process may switch torch.compile off
@pytest.mark.usefixtures("_compiler")
def test_the_last_to_leave_gives_the_stance_back() -> None:
    calls: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(1)
        return graph.forward

    def runs_compiled() -> bool:
        calls.clear()
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        return bool(calls)

    first, second = run_eagerly(), run_eagerly()
    assert not runs_compiled()
    first.remove()
    first.remove()  # which changes nothing
    assert not runs_compiled()
    second.remove()
    assert runs_compiled()


@pytest.mark.slow  # run apart: others in one process may switch torch.compile off
@pytest.mark.usefixtures("_compiler")
def test_an_error_on_entering_leaves_nothing_behind() -> None:
    model = random_base("llama", **{**LLAMA, "num_hidden_layers": 1})
    mixture = random_mixture(model, ENDS)
    mixture._modules = {}  # as if a matrix were gone
    with pytest.raises(KeyError):
        mixture.attach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "generate" not in vars(model)
    compiled: list[int] = []
    torch.compile(lambda x: x + 2, backend=lambda graph, _: compiled.append(1) or graph.forward)(torch.ones(2))
    assert compiled


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(2, 2)
    assert host_of(nn.DataParallel(model)) is model
    assert host_of(torch.compile(nn.DataParallel(model))) is model
