"""The methods on the UNet's outputs as tensors: schedules, shares and means against their formulas, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from molecli.catalog.methods import get_method
from molecli.config import MethodConfig
from molecli.errors import RunError, UsageError
from molecli.methods.outputs.composite import Composite
from molecli.methods.outputs.loratorio import Loratorio, patch_cosine
from molecli.methods.outputs.switch import Switch
from molecli.methods.outputs.triggers import likeness, without
from molecli.methods.outputs.w_composite import WComposite
from molecli.methods.outputs.w_switch import WSwitch
from molecli.protocols import Moment

WORDS = ("cat", "hat", "sea")


def moment(index: int, total: int = 100, *, guided: bool = True) -> Moment:
    return Moment(index, total, 1000.0 - index, guided)


def encode(texts: Sequence[str]) -> Tensor:
    """[P, 3, 4]: a text is the sum of a vector for each of its words, the same at every position."""
    table = {"cat": [1.0, 0, 0, 0], "hat": [0, 0.5, 0, 0], "sea": [0, 0, 0.25, 0]}
    rows = [sum((torch.tensor(table.get(w, [0, 0, 0, 0.1])) for w in t.split()), torch.zeros(4)) for t in texts]
    return torch.stack(rows).unsqueeze(1).expand(-1, 3, -1)


def whose(branches: Tensor) -> list[int]:
    assert (branches != 0).sum(1).tolist() == [1] * len(branches)
    return branches.abs().argmax(1).tolist()


# switch --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "tau"), [(1, 5), (2, 5), (3, 5), (5, 1), (4, 7)])
def test_switch_follows_the_papers_formula(count: int, tau: int) -> None:
    method = Switch(torch.ones(count), tau=tau)
    for t in range(1, 101):  # the paper's steps and experts count from 1
        expected = ((t - 1) % (count * tau)) // tau + 1
        assert whose(method.branches(moment(t - 1), None)) == [expected - 1]


def test_switch_keeps_weights_and_the_given_order_and_skips_the_masked() -> None:
    method = Switch(torch.tensor([0.5, 0.75, 1.5]), turns=[2, 0, 1], tau=1)
    rows = [method.branches(moment(i), None).tolist() for i in range(3)]
    assert rows == [[[0, 0, 1.5]], [[0.5, 0, 0]], [[0, 0.75, 0]]]
    keep = torch.tensor([1.0, 1.0, 0.0])
    assert [whose(method.branches(moment(i), keep)) for i in range(3)] == [[0], [1], [0]]
    assert method.branches(moment(0), torch.zeros(3)).tolist() == [[0, 0, 0]]


# composite -----------------------------------------------------------------------------------------------------------


def test_composite_guided_is_the_papers_formula() -> None:
    u, c = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 2, 4, 8, 8)
    g = 7.0
    mean = Composite(torch.ones(3)).combine(torch.cat([u, c], dim=1), moment(0), None)
    free, conditional = mean.chunk(2)
    assert torch.allclose(free + g * (conditional - free), u.mean(0) + g * (c - u).mean(0), atol=1e-4)


def test_composite_has_a_branch_for_each_kept_lora_with_its_own_weight() -> None:
    method = Composite(torch.tensor([0.5, 2.0, 1.0]))
    assert torch.equal(method.branches(moment(0), None), torch.diag(method.weights))
    assert whose(method.branches(moment(0), torch.tensor([1.0, 0.0, 1.0]))) == [0, 2]
    assert torch.allclose(method.text_weights(torch.tensor([1.0, 0.0, 1.0])), torch.tensor([0.25, 0.0, 0.5]))


# triggers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "trigger", "left"),
    [
        ("a cat, a hat", "cat", "a, a hat"),
        ("Cat, hat, sea", "cat, sea", "hat"),
        ("an owl and a bowl", "owl", "an and a bowl"),
        ("cat", "cat", ""),
        ("a  big   cat", "big cat", "a"),
        ("a dog", "cat", "a dog"),
    ],
)
def test_a_prompt_without_a_trigger(prompt: str, trigger: str, left: str) -> None:
    assert without(prompt, trigger) == left


def test_likeness_is_the_cosine_of_means_over_positions() -> None:
    found = likeness("cat hat", ["cat", "hat", "dog"], encode)
    length = math.hypot(1, 0.5)
    assert torch.allclose(found, torch.tensor([1 / length, 0.5 / length, 0.0]), atol=1e-6)


# prompt-aware --------------------------------------------------------------------------------------------------------


def test_w_composite_weighs_by_likeness() -> None:
    method = WComposite(torch.ones(3), WORDS)
    method.prepare("cat hat sea", encode)
    outputs = torch.randn(3, 2, 4, 4, 4)
    shares = likeness("cat hat sea", WORDS, encode)
    expected = torch.einsum("k,k...->...", shares / shares.sum(), outputs)
    assert torch.allclose(method.combine(outputs, moment(0), None), expected, atol=1e-5)
    kept = method.combine(outputs[1:], moment(0), torch.tensor([0.0, 1.0, 1.0]))
    assert torch.allclose(kept, torch.einsum("k,k...->...", shares[1:] / shares[1:].sum(), outputs[1:]), atol=1e-5)


def test_w_composite_with_equal_triggers_is_composite() -> None:
    method = WComposite(torch.ones(2), ("cat", "cat"))
    method.prepare("a cat", encode)
    outputs = torch.randn(2, 2, 4, 4, 4)
    assert torch.allclose(method.combine(outputs, moment(0), None), outputs.mean(0), atol=1e-6)


def test_w_composite_without_any_likeness_is_composite() -> None:
    method = WComposite(torch.ones(2), ("cat", "hat"))
    method.prepare("sea", encode)
    outputs = torch.randn(2, 1, 4, 4, 4)
    assert torch.allclose(method.combine(outputs, moment(0), None), outputs.mean(0), atol=1e-6)


def test_w_composite_leaves_out_a_trigger_that_is_unlike_the_prompt() -> None:
    method = WComposite(torch.ones(2), ("cat", "hat"))
    method.prepare("cat", lambda texts: torch.stack([torch.tensor([[-1.0 if t == "hat" else 1.0]]) for t in texts]))
    outputs = torch.randn(2, 1, 4, 4, 4)
    assert torch.equal(method.combine(outputs, moment(0), None), outputs[0])


def test_w_switch_gives_steps_by_what_the_prompt_loses() -> None:
    method = WSwitch(torch.ones(3), WORDS, tau=5)
    method.prepare("cat hat sea", encode)
    rests = ["hat sea", "cat sea", "cat hat"]
    lost = (1 - likeness("cat hat sea", rests, encode)).clamp_min(0.05)
    blocks = [max(1, round(5 * float(w / lost.max()))) for w in lost]
    assert method.blocks([0, 1, 2]) == blocks
    assert blocks[0] == 5
    assert blocks[2] < 5
    order = [whose(method.branches(moment(i), None))[0] for i in range(sum(blocks))]
    assert order == [expert for expert, steps in enumerate(blocks) for _ in range(steps)]


def test_w_switch_with_equal_shares_is_switch_until_the_characters_last_steps() -> None:
    method, plain = WSwitch(torch.ones(2), ("cat", "cat"), tau=4, characters=[1]), Switch(torch.ones(2), tau=4)
    method.prepare("a cat", encode)
    for i in range(20):
        expected = [1] if i >= 15 else whose(plain.branches(moment(i, 20), None))
        assert whose(method.branches(moment(i, 20), None)) == expected


def test_w_switch_warns_of_a_trigger_that_the_prompt_lacks() -> None:
    method = WSwitch(torch.ones(2), ("cat", "hat"))
    with pytest.warns(UserWarning, match="lacks the trigger 'hat'; its LoRA gets the fewest steps"):
        method.prepare("a cat", encode)
    assert method.blocks([0, 1])[1] == 1


def test_nothing_is_weighed_before_a_prompt() -> None:
    with pytest.raises(RunError, match="Call prepare"):
        WSwitch(torch.ones(2), WORDS[:2]).branches(moment(0), None)
    with pytest.raises(RunError, match="Call prepare"):
        WComposite(torch.ones(2), WORDS[:2]).combine(torch.randn(2, 1, 4, 4, 4), moment(0), None)


# loratorio -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "patch"), [(8, 4), (8, 3), (5, 4), (4, 1)])
def test_patch_cosine_equals_a_loop(size: int, patch: int) -> None:
    a, b = torch.randn(2, 2, 4, size, size), torch.randn(1, 2, 4, size, size)
    found = patch_cosine(a, b.expand_as(a), patch)
    for k in range(2):
        for i, top in enumerate(range(0, size, patch)):
            for j, left in enumerate(range(0, size, patch)):
                cut = (..., slice(top, top + patch), slice(left, left + patch))
                one, other = a[k][cut].flatten(1), b[0][cut].flatten(1)
                assert torch.allclose(found[k, :, i, j], F.cosine_similarity(one, other), atol=1e-5)


def test_loratorio_guided_is_its_formula() -> None:
    method = Loratorio(torch.ones(2), base_share=0.5, patch=4)
    u, c = torch.randn(3, 1, 4, 8, 8), torch.randn(3, 1, 4, 8, 8)  # the base first
    free, conditional = method.combine(torch.cat([u, c], dim=1), moment(0), None).chunk(2)
    omega = patch_cosine(c[1:], c[:1].expand_as(c[1:]), 4)
    shares = (-omega).softmax(0).repeat_interleave(4, -1).repeat_interleave(4, -2).unsqueeze(2)
    assert torch.allclose(conditional, (shares * c[1:]).sum(0), atol=1e-5)
    assert torch.allclose(free, 0.5 * u[0] + 0.5 * (shares * u[1:]).sum(0), atol=1e-5)


def output_method(
    mode: str, names: Any, weights: Tensor, config: MethodConfig, triggers: Any = None, kinds: Any = None
) -> Any:
    return get_method(mode).load()(names, weights, config, triggers=triggers or {}, kinds=kinds or {})


# all -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["composite", "w_composite", "loratorio"])
def test_permuting_experts_changes_nothing(mode: str) -> None:
    outputs = {name: torch.randn(2, 4, 8, 8) for name in (*WORDS, "base")}
    results = []
    for names in permutations(WORDS):
        method = output_method(mode, names, torch.ones(3), MethodConfig(), triggers={n: n for n in WORDS})
        method.prepare("cat hat sea", encode)
        first = [outputs["base"]] if mode == "loratorio" else []
        results.append(method.combine(torch.stack(first + [outputs[n] for n in names]), moment(0), None))
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-5)


def test_orders_and_triggers_are_checked_by_name() -> None:
    with pytest.raises(UsageError, match=r"there is no LoRA 'cot'.*cat"):
        output_method("switch", WORDS, torch.ones(3), MethodConfig(order=("cot",)))
    with pytest.raises(UsageError, match="it leaves out sea"):
        output_method("switch", WORDS, torch.ones(3), MethodConfig(order=("hat", "cat")))
    with pytest.raises(UsageError, match="it names a LoRA twice"):
        output_method("switch", WORDS, torch.ones(3), MethodConfig(order=("hat", "cat", "sea", "cat")))
    with pytest.raises(UsageError, match="mode w_composite needs the LoRA's trigger words"):
        output_method("w_composite", WORDS, torch.ones(3), MethodConfig(), triggers={"cat": "cat"})


def test_the_character_has_the_last_steps_of_w_switch() -> None:
    config = MethodConfig(order=("sea", "hat", "cat"))
    kinds = {"cat": "character", "hat": "clothing", "sea": "background"}
    method = output_method("w_switch", WORDS, torch.ones(3), config, triggers={n: n for n in WORDS}, kinds=kinds)
    method.prepare("cat hat sea", encode)
    assert whose(method.branches(moment(99), None)) == [0]
    assert whose(method.branches(moment(0), None)) == [2]
    assert whose(method.branches(moment(99), torch.tensor([0.0, 1.0, 1.0]))) != [0]
