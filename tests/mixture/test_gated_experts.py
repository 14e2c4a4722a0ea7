"""Gates at routed experts' fused weights and at routers, against a model whose weights have the gated update added."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import IDS, MOES, by_hand, moe, peft_logits, relative
from torch import Tensor, nn

from molecli.bases.fused import FusedPlace, fused_places
from molecli.config import GateConfig
from molecli.errors import RunError
from molecli.mixture.attach import attach
from molecli.mixture.gated_experts import by_row, with_entries
from molecli.protocols import Group, Site

KINDS = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "nemotron_h"]
Loras = dict[str, str]


@pytest.fixture
def loras(make_peft_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., Loras]:
    """`loras(kind, model)` -> two LoRAs on attention, experts and router."""

    def make(kind: str, model: Any, **more: Any) -> Loras:
        asked = {**MOES[kind][1], **more}
        if kind == "deepseek_v3":  # its kv_b_proj reads 4-D inputs
            asked = {"targets": ["q_b_proj", "gate", "gate_proj", "up_proj", "down_proj"]}
        for seed, name in enumerate("ab"):
            make_peft_adapter(model, tmp_path / name, seed=seed, rank=2 + 2 * seed, scale=0.2, **asked)
        return {name: str(tmp_path / name) for name in "ab"}

    return make


def gated(model: Any, made: Loras, **gate: Any) -> Any:
    """A mixture whose gates differ between inputs."""
    mixture = attach(model, loras=made, mode="gated", gate=GateConfig(**gate))
    torch.manual_seed(5)
    with torch.no_grad():
        for one in mixture.gate_modules().values():
            for parameter in one.parameters():
                parameter.normal_(0, 1)
    return mixture


def updates_at(mixture: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix's update with the gates [N] of its site."""
    found = {}
    for site in mixture.sites:
        for matrix in site.matrices:
            parts = zip(mixture.bank.experts, values[site.name].tolist(), strict=True)
            found[matrix] = sum(g * expert.factors[matrix].delta() for expert, g in parts if matrix in expert.factors)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_the_prompt_equal_their_update_added_to_the_weights(kind: str, loras: Any) -> None:
    model = moe(kind)
    mixture = gated(model, loras(kind, model))
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        with mixture:
            ours, gates = model(input_ids=IDS).logits, mixture.gates()
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert max(float((g[0] - g[1]).abs().max()) for g in gates.values()) > 0.02
    for row in range(2):
        updates = updates_at(mixture, {site: value[row] for site, value in gates.items()})
        assert relative(ours[row], by_hand(model, updates, IDS[row : row + 1])[0]) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gates_by_token_equal_another_model_for_every_token(kind: str, loras: Any) -> None:
    model = moe(kind)
    mixture = gated(model, loras(kind, model), pool="token")
    ids, hand = IDS[:1], copy.deepcopy(model)
    places, own = fused_places(hand), copy.deepcopy(hand.state_dict())
    with torch.no_grad():
        with mixture:
            ours = model(input_ids=ids).logits
            seen = []
            past = None
            for t in range(ids.shape[1]):
                past = model(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
                seen.append({site: value[0] for site, value in mixture.gates().items()})
        past, logits = None, []
        for t, values in enumerate(seen):
            hand.load_state_dict(own)
            for name, update in updates_at(mixture, values).items():
                weight = places[name].weight(hand) if name in places else hand.get_submodule(name).weight
                weight += update
            step = hand(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past = step.past_key_values
            logits.append(step.logits)
    assert relative(ours, torch.cat(logits, 1)) < 1e-5
    assert float((next(iter(seen[0].values())) - next(iter(seen[1].values()))).abs().max()) > 1e-3


@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
def test_a_batch_equals_one_by_one_and_generation_teacher_forcing(pool: str, loras: Any) -> None:
    model = moe("qwen3_moe")
    with torch.no_grad(), gated(model, loras("qwen3_moe", model), pool=pool):
        together = model(input_ids=IDS).logits
        alone = torch.cat([model(input_ids=IDS[i : i + 1]).logits for i in range(2)])
        assert relative(together, alone) < 1e-5
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(IDS, attention_mask=torch.ones_like(IDS), output_logits=True, **options)
        labels = out.sequences.clone()
        labels[:, : IDS.shape[1]] = -100
        taught = model(input_ids=out.sequences, labels=labels, use_cache=False).logits[:, IDS.shape[1] - 1 : -1]
        assert relative(torch.stack(out.logits, 1), taught) < 1e-4
        if pool != "running":  # which beam search is refused for
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, num_beams=2, do_sample=False)


@pytest.mark.parametrize("granularity", ["network", "block", "layer", "matrix"])
def test_masks_leave_one_lora_or_the_base(granularity: Any, loras: Any) -> None:
    model = moe("gpt_oss")
    made = loras("gpt_oss", model)
    wanted = {name: peft_logits(model, folder) for name, folder in made.items()}
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        with gated(model, made, granularity=granularity) as mixture:
            for name in made:
                mixture.only(name)
                assert relative(model(input_ids=IDS).logits, wanted[name]) < 1e-5
            mixture.mask(*made)
            assert torch.equal(model(input_ids=IDS).logits, base)


def test_the_loss_has_the_gates_gradient(loras: Any) -> None:
    model = moe("gpt_oss")
    made = loras("gpt_oss", model, targets=["o_proj"])
    with gated(model, made, granularity="network", pool="token") as mixture:

        def loss() -> Tensor:
            square: Tensor = model(input_ids=IDS).logits.square().mean()
            return square

        loss().backward()
        parameter = next(p for name, p in mixture.named_parameters().items() if name.endswith("head.weight"))
        assert parameter.grad is not None
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        with torch.no_grad():
            losses = []
            for step in (5e-3, -5e-3):
                parameter += step * direction
                losses.append(float(loss()))
                parameter -= step * direction
    assert (losses[0] - losses[1]) / 1e-2 == pytest.approx(float((parameter.grad * direction).sum()), rel=0.05)
    assert all(p.grad is None for p in model.parameters())


def test_experts_share_the_gate_of_the_layer_before_them(loras: Any) -> None:
    model = moe("qwen3_moe")
    mixture = gated(model, loras("qwen3_moe", model), granularity="layer")
    assert [site.name for site in mixture.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "model.layers.0.mlp.experts.3.down_proj" in mixture.sites[0].matrices
    assert mixture.sites[1].entry.matrices[0] == "model.layers.1.self_attn.q_proj"


def test_an_error_in_the_experts_leaves_their_configuration(loras: Any) -> None:
    model = moe("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    own = experts.config

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with gated(model, loras("qwen3_moe", model)):
        handle = experts.act_fn.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=IDS)
        handle.remove()
    assert experts.config is own


def test_without_a_layer_before_them_they_have_no_gate(loras: Any, explained: Any) -> None:
    model = moe("granitemoe")
    made = loras("granitemoe", model, targets=[])
    explained(
        lambda: gated(model, made),
        2,
        "model.layers.0.block_sparse_moe: the gate of model.layers.0.block_sparse_moe.router has nothing to read: "
        "the LoRAs adapt no linear layer before it. Use --mode linear, a merge, or gates that do not read the input.",
    )


@pytest.mark.parametrize(
    ("kind", "mode", "matrix"),
    [
        ("llama4_text", "gated", "model.layers.0.feed_forward.experts.down_proj"),
        ("jetmoe", "gated", "model.layers.0.mlp.input_linear.weight"),
        ("gpt_oss", "xlora", "model.layers.0.mlp.router"),
        ("gpt_oss", "arrow", "model.layers.0.mlp.router"),
    ],
)
def test_where_only_fixed_weights_are_exact_others_are_refused(
    kind: str, mode: str, matrix: str, loras: Any, explained: Any
) -> None:
    model = moe(kind)
    made = loras(kind, model)
    explained(
        lambda: attach(model, loras=made, mode=mode),
        2,
        f"--mode {mode}: its weights depend on the input, and a LoRA adapts {matrix}, which is no linear layer: there "
        "only weights that are the same for all tokens are possible. Use --mode linear, a merge, or gates that do not "
        "read the input (gate.input: none).",
    )


def test_a_router_that_uses_its_weight_otherwise_is_refused(loras: Any) -> None:
    model = moe("gpt_oss")
    made = loras("gpt_oss", model)
    router = model.model.layers[0].mlp.router

    class Otherwise(type(router)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Any:
            return nn.functional.linear(hidden_states, self.weight.softmax(0)), None, None

    router.__class__ = Otherwise
    mixture = gated(model, made)
    with torch.no_grad(), mixture, pytest.raises(RunError, match="Otherwise: it does not multiply its weight with its"):
        model(input_ids=IDS)


def test_rows_belong_to_sequences_and_tokens() -> None:
    value = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(by_row(value[0], 3, 6, "x"), value[:1].expand(3, -1))
    assert torch.equal(by_row(value, 6, 6, "x"), value.repeat_interleave(3, 0))
    assert torch.equal(by_row(value.view(1, 2, 2), 2, 2, "x"), value)
    with pytest.raises(RunError, match="x: its input has 4 rows and the pass 6 tokens, so a row's weights are unknown"):
        by_row(value, 4, 6, "x")


def test_experts_directly_in_a_block_have_the_gate_of_its_attention() -> None:
    place = FusedPlace("m.layers.0.experts", "gate_up_proj", 0, (4, 4), False)
    attention = Site("m.layers.0.self_attn", (Group(("m.layers.0.self_attn.q_proj",), "decoder"),))
    experts = Site("m.layers.0.experts", (Group(("m.layers.0.experts.0.gate_up_proj",), "decoder"),))
    dense = Site("m.layers.0.mlp", (Group(("m.layers.0.mlp.up_proj",), "decoder"),))
    sites = with_entries([attention, experts, dense], {"m.layers.0.experts.0.gate_up_proj": place})
    assert sites == [Site(attention.name, attention.groups + experts.groups), dense]
    whole = Site("m.layers.0", attention.groups + experts.groups + dense.groups)
    held = with_entries([whole], {"m.layers.0.experts.0.gate_up_proj": place})[0]
    assert held.entry == attention.entry
    assert set(held.groups) == set(whole.groups)


def test_a_copy_of_the_model_is_refused(loras: Any) -> None:
    model = moe("qwen3_moe")
    with torch.no_grad(), gated(model, loras("qwen3_moe", model)):
        experts = model.model.layers[0].mlp.experts
        model.model.layers[0].mlp.experts = copy.copy(experts)
        with pytest.raises(RunError, match="Qwen3MoeExperts: it runs in a copy of the module that the LoRAs were"):
            model(input_ids=IDS)
        model.model.layers[0].mlp.experts = experts
