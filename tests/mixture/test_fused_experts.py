"""LoRAs on routed experts' fused weights and on routers: sums and merges against PEFT; the base afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import IDS, MOES, by_hand, moe, peft_logits, relative

from molecli.bases.fused import fused_places
from molecli.bases.weights import BaseWeights
from molecli.config import GateConfig, MethodConfig
from molecli.mixture import gated_experts
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.fused_experts import StackedUpdate
from molecli.mixture.merged import MergedMixture

Loras = dict[str, str]


@pytest.fixture
def loras(make_peft_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., Loras]:
    """`loras(kind, model)` -> two LoRAs of different ranks that PEFT wrote."""

    def make(kind: str, model: Any) -> Loras:
        asked = MOES[kind][1]
        for seed, name in enumerate("ab"):
            make_peft_adapter(model, tmp_path / name, seed=seed, rank=2 + 2 * seed, scale=0.2, **asked)
        return {name: str(tmp_path / name) for name in "ab"}

    return make


def state_of(model: Any) -> list[tuple[str, int, int, Any]]:
    """Every parameter's name, identity, memory and a copy, in order."""
    return [(name, id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters()]


def assert_as_before(model: Any, before: list[tuple[str, int, int, Any]]) -> None:
    now = state_of(model)
    assert [entry[:3] for entry in now] == [entry[:3] for entry in before]
    assert all(torch.equal(new[3], old[3]) for new, old in zip(now, before, strict=True))


@pytest.mark.parametrize("kind", MOES)
def test_each_lora_equals_peft_and_the_base_comes_back_bit_for_bit(kind: str, loras: Any) -> None:
    model = moe(kind)
    made, before = loras(kind, model), state_of(model)
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        wanted = {name: peft_logits(model, folder) for name, folder in made.items()}
        assert all(relative(base, logits) > 0.1 for logits in wanted.values())
        with attach(model, loras=made, mode="linear") as mixture:
            for name in made:
                mixture.only(name)
                assert relative(model(input_ids=IDS).logits, wanted[name]) < 1e-5
            mixture.mask(*made)
            assert torch.equal(model(input_ids=IDS).logits, base)
            mixture.mask()
            assert_as_before(model, before)  # also between two passes
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert_as_before(model, before)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("mode", ["linear", "nla", "soup"])
def test_weighted_sums_equal_the_sum_of_the_updates(kind: str, mode: str, loras: Any) -> None:
    model = moe(kind)
    made = loras(kind, model)
    options: dict[str, Any] = {"weights": {"a": 0.7, "b": -0.4}} if mode == "linear" else {}
    mixture = attach(model, loras=made, mode=mode, **options)
    weights = [0.7, -0.4] if mode == "linear" else [0.5, 0.5]
    updates: dict[str, Any] = {}
    for expert, weight in zip(mixture.bank.experts, weights, strict=True):
        for name, factor in expert.factors.items():
            updates[name] = updates.get(name, 0.0) + weight * factor.delta()
    wanted = by_hand(model, updates)
    with torch.no_grad(), mixture:
        assert relative(model(input_ids=IDS).logits, wanted) < 1e-5


@pytest.mark.parametrize("mode", ["ties", "dare", "knots", "svd", "tsv", "iso", "svdiff"])
def test_a_merge_equals_its_updates_added_to_the_weights(mode: str, loras: Any) -> None:
    model = moe("gpt_oss")
    mixture = attach(model, loras=loras("gpt_oss", model), mode=mode)
    assert isinstance(mixture, MergedMixture)
    updates = {name: factor.delta() for name, factor in mixture.merged().factors.items()}
    wanted = by_hand(model, updates)
    with torch.no_grad(), mixture:
        ours = model(input_ids=IDS).logits
        assert relative(ours, wanted) < 1e-5
        mixture.only("a")
        assert relative(model(input_ids=IDS).logits, ours) > 0.01


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_reads_the_sum(implementation: str, loras: Any) -> None:
    model = moe("mixtral")
    made = loras("mixtral", model)
    wanted = peft_logits(model, made["a"])
    model.set_experts_implementation(implementation)
    with torch.no_grad(), attach(model, loras=made, mode="single", only="a"):
        assert relative(model(input_ids=IDS).logits, wanted) < 1e-5
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]


def test_large_sums_are_computed_in_every_pass(loras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe("qwen3_moe")
    made = loras("qwen3_moe", model)
    wanted = peft_logits(model, made["a"])
    monkeypatch.setattr(gated_experts, "KEPT_BYTES", 1000)
    calls = []
    added = StackedUpdate.added
    monkeypatch.setattr(StackedUpdate, "added", lambda *args, **more: calls.append(1) or added(*args, **more))
    with torch.no_grad(), attach(model, loras=made, mode="single", only="a"):
        for _ in range(2):
            assert relative(model(input_ids=IDS).logits, wanted) < 1e-5
    assert len(calls) == 2 * 2 * 3


def test_bfloat16_stays_near_float32(loras: Any) -> None:
    model = moe("qwen3_moe")
    made = loras("qwen3_moe", model)
    wanted = peft_logits(model, made["a"])
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        theirs = peft_logits(half, made["a"]).float()
        with attach(half, loras=made, mode="single", only="a"):
            ours = half(input_ids=IDS).logits.float()
    assert relative(ours, wanted) < 1.2 * relative(theirs, wanted) + 0.01


def test_an_error_inside_the_experts_leaves_the_base(loras: Any) -> None:
    model = moe("qwen3_moe")
    made, before = loras("qwen3_moe", model), state_of(model)
    experts = model.model.layers[1].mlp.experts

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    peft_b = peft_logits(model, made["b"])
    with attach(model, loras=made, mode="linear") as mixture:
        handle = experts.act_fn.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=IDS)
        handle.remove()
        mixture.only("b")
        with torch.no_grad():
            assert relative(model(input_ids=IDS).logits, peft_b) < 1e-5
    assert_as_before(model, before)
    wanted = peft_logits(model, made["a"])
    with torch.no_grad(), attach(model, loras=made, mode="single", only="a"):
        assert relative(model(input_ids=IDS).logits, wanted) < 1e-5


def test_after_inference_mode_gradients_pass_through(loras: Any) -> None:
    model = moe("jetmoe")
    made = loras("jetmoe", model)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with attach(model, loras=made, mode="linear"):
        with torch.inference_mode():
            model(input_ids=IDS)
        model(inputs_embeds=embedded).logits.square().mean().backward()
    assert float(embedded.grad.norm()) > 0


def test_a_base_that_changes_is_not_served_from_before(loras: Any) -> None:
    model = moe("qwen3_moe")
    made = loras("qwen3_moe", model)
    changed = copy.deepcopy(model)
    changed.model.layers[0].mlp.experts.down_proj.data *= 2
    wanted = peft_logits(changed, made["a"])
    with torch.no_grad(), attach(model, loras=made, mode="single", only="a"):
        model(input_ids=IDS)
        model.model.layers[0].mlp.experts.down_proj.mul_(2)
        assert relative(model(input_ids=IDS).logits, wanted) < 1e-5


def test_gates_that_do_not_read_the_input_learn_there(loras: Any) -> None:
    model = moe("gpt_oss")
    with attach(model, loras=loras("gpt_oss", model), mode="gated", gate=GateConfig(input="none")) as mixture:
        model(input_ids=IDS).logits.square().mean().backward()
        inside = {n: p.grad for n, p in mixture.named_parameters().items() if ".mlp/logits" in n}
        step = 1e-3
        name, gradient = next(iter(inside.items()))
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                mixture.named_parameters()[name][0] += sign * step
                losses.append(model(input_ids=IDS).logits.square().mean())
                mixture.named_parameters()[name][0] -= sign * step
    assert gradient is not None
    assert float(gradient[0]) == pytest.approx(float(losses[0] - losses[1]) / (2 * step), rel=0.05)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_absent_experts_leave_their_share_to_the_others(loras: Any) -> None:
    model = moe("qwen3_moe")
    made = attach(model, loras=loras("qwen3_moe", model)).bank.experts
    lacking = "model.layers.0.mlp.experts.2.down_proj"
    fewer = copy.copy(dict(made[0].factors))
    del fewer[lacking]
    experts = [type(made[0])("a", fewer), made[1]]
    gate = GateConfig(input="none", absent="renormalize")
    mixture = build_mixture(model, experts, mode="gated", gate=gate)
    updates = {n: 0.5 * sum(e.factors[n].delta() for e in experts if n in e.factors) for n in made[1].factors}
    updates[lacking] *= 2
    wanted = by_hand(model, updates)
    with torch.no_grad(), mixture:
        assert relative(model(input_ids=IDS).logits, wanted) < 1e-5


def test_the_matrices_of_experts_have_their_weights(loras: Any) -> None:
    model = moe("gpt_oss")
    base, places = BaseWeights(model), fused_places(model)
    name = "model.layers.1.mlp.experts.3.gate_up_proj"
    own = model.model.layers[1].mlp.experts.gate_up_proj[3].T
    assert places[name].shape == tuple(own.shape) == base.shape(name)
    assert torch.equal(base.dense(name), own)
    spectrum = base.spectrum(name)
    torch.testing.assert_close(spectrum.U * spectrum.S @ spectrum.Vt, own, rtol=1e-4, atol=1e-5)
    assert not torch.equal(base.spectrum(name.replace("3.gate", "0.gate")).S, spectrum.S)


def test_offloaded_experts_are_refused_by_name(loras: Any, explained: Any) -> None:
    model = moe("qwen3_moe")
    made = loras("qwen3_moe", model)
    model.model.layers[0].mlp.experts.to("meta")
    explained(
        lambda: attach(model, loras=made, mode="linear").attach(),
        2,
        "model.layers.0.mlp.experts.0.gate_up_proj: a LoRA adapts this weight, which is offloaded and not in memory "
        "before the model runs. Load the base without offloading it to the CPU or to disk.",
    )


def test_layers_of_a_share_hold_the_experts_too(loras: Any) -> None:
    model = moe("qwen3_moe")
    mixture = attach(model, loras=loras("qwen3_moe", model), mode="linear", method=MethodConfig(layers="50-100"))
    assert all(".layers.1." in name for name in mixture.bank.matrices)
    assert any(".experts.3." in name for name in mixture.bank.matrices)
