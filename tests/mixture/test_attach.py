"""`molecli.attach`, the Python API: what each way of calling it puts on a live model, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import molecli
from molecli.config import GateConfig
from molecli.errors import MismatchError, RunError, UsageError
from molecli.experts import ExpertBank
from molecli.files.composition import Composition, load_composition, record_of, save_composition
from molecli.functional.fingerprint import fingerprint
from molecli.mixture.attach import attach
from molecli.mixture.language_layout import TextStreams
from molecli.mixture.mixture import Mixture

IDS = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
GATE = GateConfig(granularity="block", input="hidden", pool="prompt", head="full", normalize="unit")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Any], make_peft_adapter: Callable[..., Path]
) -> dict[str, str]:
    """Two LoRAs, `a` and `b`, of different rank."""
    root, model = tmp_path_factory.mktemp("loras"), make_tiny("llama").model
    ranks = {"a": 4, "b": 2}
    return {n: str(make_peft_adapter(model, root / n, rank=r, seed=r, scale=0.15)) for n, r in ranks.items()}


@pytest.fixture
def model(tiny_llama: Any) -> nn.Module:
    return tiny_llama.model


@pytest.fixture
def composed(model: nn.Module, folders: dict[str, str], tmp_path: Path) -> Path:
    """A composition folder of both LoRAs, with gates that are far from uniform."""
    mixture = attach(model, loras=folders, mode="gated", gate=GATE)
    torch.manual_seed(1)
    for parameter in mixture.named_parameters().values():
        parameter.data += 2 * torch.randn(parameter.shape)
    return save(mixture, model, tmp_path / "ab")


def save(mixture: Mixture, model: nn.Module, folder: Path, settings: GateConfig = GATE) -> Path:
    records = tuple(record_of(expert) for expert in mixture.bank.experts)
    gate = settings.model_dump(mode="json")
    tensors = mixture.state_dict()
    composition = Composition("gated", "site", "BASE", fingerprint(model), records, gate, {}, "a: 1\n", tensors)
    save_composition(folder, composition)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def merged(model: nn.Module, folders: dict[str, str], weights: dict[str, float]) -> Tensor:
    """The logits of PEFT's own sum of the LoRAs with these weights, on a copy that has none of the hooks."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    first, *others = weights
    adapted: Any = peft.PeftModel.from_pretrained(fresh, folders[first], adapter_name=first)  # type: ignore[arg-type]
    for name in others:
        adapted.load_adapter(folders[name], adapter_name=name)
    adapted.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    adapted.set_adapter("sum")
    return logits(adapted)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


# -- what it puts on the model -----------------------------------------------------------------------------------------


def test_it_is_what_the_package_exports() -> None:
    assert molecli.attach is attach


def test_without_a_mode_the_loras_are_summed(model: nn.Module, folders: dict[str, str]) -> None:
    expected = merged(model, folders, {"a": 1.0, "b": 1.0})
    with attach(model, loras=folders) as mixture:
        assert mixture.names == ("a", "b")
        assert close(logits(model), expected)
    assert not close(logits(model), expected)


def test_weights_are_coefficients_and_one_where_not_given(model: nn.Module, folders: dict[str, str]) -> None:
    expected = merged(model, folders, {"a": 0.7, "b": 1.0})
    with attach(model, loras=folders, mode="linear", weights={"a": 0.7}):
        assert close(logits(model), expected)


def test_loras_may_be_texts_with_weights_and_weights_win(model: nn.Module, folders: dict[str, str]) -> None:
    texts = [f"a={folders['a']}@0.5", f"b={folders['b']}@-0.25"]
    with attach(model, loras=texts):
        assert close(logits(model), merged(model, folders, {"a": 0.5, "b": -0.25}))
    with attach(model, loras=texts, weights={"b": 2.0}):
        assert close(logits(model), merged(model, folders, {"a": 0.5, "b": 2.0}))


def test_nla_divides_by_the_sum_of_the_weights(model: nn.Module, folders: dict[str, str]) -> None:
    with attach(model, loras=folders, mode="nla", weights={"a": 3.0}):
        assert close(logits(model), merged(model, folders, {"a": 0.75, "b": 0.25}))


def test_single_is_one_lora(model: nn.Module, folders: dict[str, str]) -> None:
    expected = merged(model, folders, {"b": 1.0})
    with attach(model, loras=folders, mode="single", only="b"):
        assert close(logits(model), expected)
    with attach(model, loras={"b": folders["b"]}, mode="single"):
        assert close(logits(model), expected)


def test_fresh_gates_are_even(model: nn.Module, folders: dict[str, str]) -> None:
    with attach(model, loras=folders, mode="gated", gate=GATE) as mixture:
        assert close(logits(model), merged(model, folders, {"a": 0.5, "b": 0.5}))
        assert list(mixture.gates()) == ["model.layers.0", "model.layers.1"]
        assert all(torch.equal(g, torch.full((2, 2), 0.5)) for g in mixture.gates().values())


@pytest.mark.parametrize("given", [False, True])
def test_a_composition_brings_its_loras_or_takes_those_named(
    given: bool, model: nn.Module, folders: dict[str, str], composed: Path
) -> None:
    base, even = logits(model), merged(model, folders, {"a": 0.5, "b": 0.5})
    with attach(model, loras=folders if given else None, composition=composed) as mixture:
        values = logits(model)
        gates = mixture.gates()
        # The model's own API runs the mixture, and the gates are those of its last pass.
        model.generate(input_ids=IDS[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        assert all(gate.shape == (1, 2) for gate in mixture.gates().values())
    assert not close(values, base)
    assert not close(values, even)
    assert all(gate.shape == (2, 2) and float((gate - 0.5).abs().max()) > 0.05 for gate in gates.values())
    stored = load_file(composed / "composition.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in mixture.state_dict().items())


@pytest.mark.parametrize("head", ["full", "low_rank"])
def test_gates_that_start_at_random_are_loaded_as_saved_and_draw_nothing(
    head: str, model: nn.Module, folders: dict[str, str], tmp_path: Path
) -> None:
    settings = GATE.model_copy(update={"init_std": 3.0, "head": head})
    with attach(model, loras=folders, mode="gated", gate=settings) as mixture:
        made = logits(model)
        assert all(float((gate - 0.5).abs().max()) > 1e-3 for gate in mixture.gates().values())
    folder = save(mixture, model, tmp_path / "ab", settings)
    before = torch.get_rng_state()
    with attach(model, composition=folder):
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(logits(model), made)


def test_a_composition_from_before_gates_had_a_start_is_loaded(
    model: nn.Module, folders: dict[str, str], composed: Path
) -> None:
    made = load_composition(composed)
    assert made.gate is not None
    older = replace(made, gate={key: value for key, value in made.gate.items() if key != "init_std"})
    assert older != made
    save_composition(composed.parent / "older", older)
    seen = []
    for folder in (composed, composed.parent / "older"):
        with attach(model, composition=folder):
            seen.append(logits(model))
    assert torch.equal(*seen)


def test_a_composition_may_be_named_by_its_file(model: nn.Module, composed: Path) -> None:
    seen = []
    for path in (composed, str(composed / "composition.safetensors")):
        with attach(model, composition=path):
            seen.append(logits(model))
    assert torch.equal(*seen)
    assert not close(seen[0], logits(model))


# -- switching ---------------------------------------------------------------------------------------------------------


def test_masks_switch_exactly_the_named_ones_and_leaving_restores_the_base(
    model: nn.Module, folders: dict[str, str], composed: Path
) -> None:
    base, weights = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    with attach(model, composition=composed) as mixture:
        both = logits(model)
        mixture.mask("b")
        assert close(logits(model), merged(model, folders, {"a": 1.0}))
        assert all(torch.equal(g[:, 1], torch.zeros(2)) for g in mixture.gates().values())
        mixture.mask("a")  # b is on again
        assert close(logits(model), merged(model, folders, {"b": 1.0}))
        mixture.only("a")
        assert close(logits(model), merged(model, folders, {"a": 1.0}))
        mixture.mask("a", "b")
        assert torch.equal(logits(model), base)
        mixture.mask()
        assert torch.equal(logits(model), both)
    assert not close(both, base)
    assert torch.equal(logits(model), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_leaves_the_base_as_it_was(model: nn.Module, folders: dict[str, str]) -> None:
    base = logits(model)
    with pytest.raises(IndexError, match="index out of range"), attach(model, loras=folders):
        model(input_ids=IDS + 10_000)
    assert torch.equal(logits(model), base)


def test_attaching_twice_is_refused(model: nn.Module, folders: dict[str, str]) -> None:
    with attach(model, loras=folders) as mixture, pytest.raises(RunError) as caught:
        mixture.attach()
    assert str(caught.value) == "mixture: it is attached already. Leave its context first."


def test_a_mixture_can_be_entered_again(model: nn.Module, folders: dict[str, str]) -> None:
    mixture, seen = attach(model, loras=folders), []
    for _ in range(2):
        with mixture:
            seen.append(logits(model))
    assert torch.equal(*seen)
    assert not close(seen[0], logits(model))


@pytest.mark.parametrize("switch", ["mask", "only"])
def test_an_unknown_name_is_refused_and_switches_nothing(
    switch: str, model: nn.Module, folders: dict[str, str]
) -> None:
    base = logits(model)
    with attach(model, loras=folders) as mixture:
        before = logits(model)
        assert not close(before, base)
        with pytest.raises(UsageError) as caught:
            getattr(mixture, switch)("a", "c")
        assert str(caught.value) == "c: no such LoRA in this composition. Known: a, b."
        assert torch.equal(logits(model), before)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "attach: no LoRA is named. Write loras={'a': 'path/to/a'}."),
        ({"loras": []}, "attach: no LoRA is named. Write loras={'a': 'path/to/a'}."),
        ({"weights": {"c": 1.0}}, "c: no such LoRA in this composition. Known: a, b."),
        ({"mode": "lineal"}, "--mode: there is no composition method 'lineal'. Did you mean linear?"),
        ({"mode": "single"}, "--mode single: 2 LoRAs are given. Name one of them with --only NAME."),
        ({"mode": "single", "only": "c"}, "c: no such LoRA in this composition. Known: a, b."),
        ({"mode": "linear", "only": "a"}, "attach: only= has an effect only in mode 'single'. Write mode='single'."),
        ({"gate": GATE}, "attach: gate= has an effect only in mode 'gated'. Write mode='gated'."),
        (
            {"mode": "gated", "weights": {"a": 1.0}},
            "attach: the gates learn the weights in mode 'gated'. Leave weights= out.",
        ),
        (
            {"mode": "nla", "weights": {"a": 1.0, "b": -1.0}},
            "--loras: the weights sum to 0, and `nla` divides by their sum. Change a weight or use --mode linear.",
        ),
        (
            {"mode": "gated", "gate": GateConfig(pool="mean")},
            "gate.pool: 'mean' would let a causal model see later tokens. Use prompt, running or token.",
        ),
    ],
)
def test_a_call_that_makes_no_sense_is_explained(
    arguments: dict[str, Any], message: str, model: nn.Module, folders: dict[str, str]
) -> None:
    loras = arguments.get("loras", folders) if arguments else None
    with pytest.raises(UsageError) as caught:
        attach(model, **{"loras": loras, **arguments})
    assert (str(caught.value), caught.value.exit_code) == (message, 2)


@pytest.mark.parametrize("extra", [{"mode": "gated"}, {"weights": {"a": 1.0}}, {"gate": GATE}, {"only": "a"}])
def test_a_composition_is_not_mixed_with_other_settings(
    extra: dict[str, Any], model: nn.Module, composed: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        attach(model, composition=composed, **extra)
    assert str(caught.value) == "attach: a composition brings its own mode, weights and gates. Leave those out."


def refused(model: nn.Module, **arguments: Any) -> str:
    base = logits(model)
    with pytest.raises(MismatchError) as caught:
        attach(model, **arguments)
    assert caught.value.exit_code == 3
    assert torch.equal(logits(model), base)
    return str(caught.value)


def test_a_composition_on_another_base_is_refused(make_tiny: Callable[..., Any], composed: Path) -> None:
    assert refused(make_tiny("llama", seed=1).model, composition=composed) == (
        "--base: the composition was made on BASE, whose weights differ from this base's. "
        "Give --base BASE, or compose again."
    )


def test_a_base_that_was_tuned_further_is_another(model: nn.Module, composed: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert refused(model, composition=composed).startswith("--base: the composition was made on BASE, whose weights")


def test_a_lora_trained_further_is_refused(
    model: nn.Module, folders: dict[str, str], composed: Path, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_peft_adapter(model, tmp_path / "other", rank=2, seed=9)
    known = {record.name: record.sha256 for record in load_composition(composed).experts}
    now = {e.name: e.sha256 for e in attach(model, loras={"b": str(other)}).bank.experts}
    assert refused(model, composition=composed, loras={"a": folders["a"], "b": str(other)}) == (
        f"b: its weights differ from those in the composition ({now['b'][:12]}, not {known['b'][:12]}). "
        f"Give the LoRA from {folders['b']}, or compose again."
    )


def test_loras_in_another_order_are_refused(model: nn.Module, folders: dict[str, str], composed: Path) -> None:
    assert refused(model, composition=composed, loras={"b": folders["b"], "a": folders["a"]}) == (
        "--loras: the order is b, a. Give them in this order: a, b."
    )


def test_loras_under_other_names_are_refused(model: nn.Module, folders: dict[str, str], composed: Path) -> None:
    assert refused(model, composition=composed, loras={"a": folders["a"], "c": folders["b"]}) == (
        "c: the composition has 'b' in this place. Give them in this order: a, b."
    )


def test_a_lora_too_few_is_refused(model: nn.Module, folders: dict[str, str], composed: Path) -> None:
    assert refused(model, composition=composed, loras={"a": folders["a"]}) == (
        "--loras: 1 LoRAs are given, and the composition was made with 2. Give them in this order: a, b."
    )


def test_a_lora_whose_alpha_was_edited_is_refused(
    model: nn.Module, folders: dict[str, str], composed: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "edited"
    edited.mkdir()
    for file in Path(folders["a"]).iterdir():
        (edited / file.name).write_bytes(file.read_bytes())
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    assert refused(model, composition=composed, loras={"a": str(edited), "b": folders["b"]}) == (
        "a: its alpha is 16, and the composition was made with 8. Restore its adapter_config.json, or compose again."
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("site/model.layers.1/head.bias"),
            "site/model.layers.1/head.bias: the gate tensor is missing. "
            "The composition was made for another base or other LoRAs.",
        ),
        (
            lambda t: t.update({"site/model.layers.7/head.bias": torch.zeros(2)}),
            "site/model.layers.7/head.bias: the gate tensor belongs to no site of this model. "
            "The composition was made for another base or other LoRAs.",
        ),
        (
            lambda t: t.update({"site/model.layers.0/head.bias": torch.zeros(3)}),
            "site/model.layers.0/head.bias: the gate tensor has shape (3,), and the model needs (2,).",
        ),
    ],
)
def test_gate_tensors_that_do_not_fit_are_named(
    edit: Callable[[dict[str, Tensor]], Any], message: str, model: nn.Module, composed: Path
) -> None:
    from safetensors import safe_open

    file = composed / "composition.safetensors"
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata)
    assert refused(model, composition=composed) == message


def test_a_matrix_that_the_base_lacks_is_named(model: nn.Module, folders: dict[str, str]) -> None:
    bank = ExpertBank(attach(model, loras=folders).bank.experts)
    lacking = copy.deepcopy(model)
    del lacking.model.layers[1].mlp.down_proj  # type: ignore[union-attr, operator, index]
    with pytest.raises(MismatchError) as caught:
        Mixture(lacking, bank, [], {}, streams=TextStreams(lacking, seq2seq=False))
    assert str(caught.value) == (
        "model.layers.1.mlp.down_proj: the LoRAs adapt this matrix, but the base has no matrix of that name."
    )
