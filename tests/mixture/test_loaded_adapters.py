"""Experts beside LoRAs that diffusers, transformers or PEFT have loaded already: both act, each as it would alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from gates import close, randomise
from pipeline_shapes import SHAPES
from tiny_pipelines import make_expert
from torch import Tensor

from molecli.adapters import write_diffusers, write_peft
from molecli.bases.pipeline import PipelineModules, pipeline_matrices
from molecli.bases.weights import BaseWeights
from molecli.errors import RunError, UsageError
from molecli.experts import Expert
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.attach import attach
from molecli.mixture.layout import adaptable_matrices, host_of

THEIRS = {"lcm": 0.7, "style": 0.4}


def written(pipe: Any, folder: Path) -> dict[str, str]:
    """Four LoRAs: two for diffusers to load, two of ours; theirs also adapt what ours do not, and the reverse."""
    matrices = pipeline_matrices(PipelineModules(pipe))
    parts = {"lcm": "attn", "style": "", "a": "", "b": "attn1"}
    return {
        name: str(
            write_diffusers(
                folder / name,
                make_expert(name, matrices, seed=i, scale=0.1, keep=lambda m, part=part: part in m).factors,
            )
        )
        for i, (name, part) in enumerate(parts.items())
    }


def loaded(shape: str, folders: Mapping[str, str], weights: Mapping[str, float]) -> Any:
    pipe, _ = SHAPES[shape]()
    for name in weights:
        pipe.load_lora_weights(folders[name], adapter_name=name)
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    return pipe


@pytest.mark.parametrize("shape", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_sum_beside_loaded_loras_is_the_sum_of_all(shape: str, tmp_path: Path) -> None:
    _, call = SHAPES[shape]()
    folders = written(SHAPES[shape]()[0], tmp_path)
    everything = loaded(shape, folders, {**THEIRS, "a": 1.0, "b": 0.5})
    pipe = loaded(shape, folders, THEIRS)
    theirs = call(pipe)
    with attach(pipe, loras={name: folders[name] for name in "ab"}, mode="linear", weights={"b": 0.5}) as mixture:
        assert not close(call(pipe), theirs, 1e-3)
        assert close(call(pipe), call(everything), 1e-5)
        scaled = {"cross_attention_kwargs": {"scale": 0.3}}
        assert close(call(pipe, **scaled), call(everything, **scaled), 1e-5)
        pipe.set_adapters(["style"], [0.9])
        everything.set_adapters(["style", "a", "b"], [0.9, 1.0, 0.5])
        assert close(call(pipe), call(everything), 1e-5)
        pipe.set_adapters(list(THEIRS), list(THEIRS.values()))
        mixture.mask("a", "b")
        assert torch.equal(call(pipe), theirs)
    assert torch.equal(call(pipe), theirs)


def test_loaded_loras_may_be_fused(tmp_path: Path) -> None:
    _, call = SHAPES["sd"]()
    folders = written(SHAPES["sd"]()[0], tmp_path)
    everything = loaded("sd", folders, {**THEIRS, "a": 1.0})
    pipe = loaded("sd", folders, THEIRS)
    pipe.fuse_lora(adapter_names=list(THEIRS))
    with attach(pipe, loras={"a": folders["a"]}, mode="linear"):
        assert close(call(pipe), call(everything), 1e-4)


def test_loras_can_be_loaded_after_ours(tmp_path: Path) -> None:
    _, call = SHAPES["sd"]()
    folders = written(SHAPES["sd"]()[0], tmp_path)
    everything = loaded("sd", folders, {**THEIRS, "a": 1.0})
    pipe = loaded("sd", folders, {})
    base = call(pipe)
    with attach(pipe, loras={"a": folders["a"]}, mode="linear"):
        for name in THEIRS:
            pipe.load_lora_weights(folders[name], adapter_name=name)
        pipe.set_adapters(list(THEIRS), list(THEIRS.values()))
        assert close(call(pipe), call(everything), 1e-5)
        pipe.unload_lora_weights()
    assert torch.equal(call(pipe), base)


def test_loras_that_were_unloaded_meanwhile_are_noticed(tmp_path: Path) -> None:
    _, call = SHAPES["sd"]()
    folders = written(SHAPES["sd"]()[0], tmp_path)
    pipe = loaded("sd", folders, THEIRS)
    with attach(pipe, loras={"a": folders["a"]}, mode="linear"):
        pipe.unload_lora_weights()
        with pytest.raises(RunError, match="without calling any of the"):
            call(pipe)


@pytest.mark.parametrize("mode", ["gated", "composite", "ties"])
def test_other_modes_beside_loaded_loras_are_those_on_the_fused_base(mode: str, tmp_path: Path) -> None:
    _, call = SHAPES["sd"]()
    folders = written(SHAPES["sd"]()[0], tmp_path)
    fused = loaded("sd", folders, THEIRS)
    fused.fuse_lora(adapter_names=list(THEIRS))
    fused.unload_lora_weights()
    pictures = []
    for pipe in (fused, loaded("sd", folders, THEIRS)):
        mixture = attach(pipe, loras={name: folders[name] for name in "ab"}, mode=mode)
        if mixture.named_parameters():
            randomise(mixture, sharpness=1.0)
        with mixture:
            pictures.append(call(pipe))
    assert close(pictures[1], pictures[0], 1e-4)


def test_the_base_is_still_known(tmp_path: Path) -> None:
    bare = PipelineModules(SHAPES["sd"]()[0])
    other = PipelineModules(loaded("sd", written(SHAPES["sd"]()[0], tmp_path), THEIRS))
    assert pipeline_matrices(other) == pipeline_matrices(bare)
    assert same_base(fingerprint(bare), fingerprint(other))
    matrix = next(iter(pipeline_matrices(bare)))
    assert torch.equal(BaseWeights(other).dense(matrix), BaseWeights(bare).dense(matrix))


# -- language models -------------------------------------------------------------------------------------------------


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def text_loras(tmp_path: Path) -> dict[str, str]:
    matrices = {name: shape for name, shape in adaptable_matrices(llama()).items() if "proj" in name}
    found: list[Expert] = [make_expert(name, matrices, seed=i) for i, name in enumerate(("own", "a", "b"))]
    return {one.name: str(write_peft(tmp_path / one.name, one.factors, base="llama")) for one in found}


IDS = {"input_ids": torch.tensor([[3, 7, 2, 8, 1], [4, 4, 9, 6, 5]]), "attention_mask": torch.ones(2, 5).long()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**IDS).logits


def by_peft(text_loras: Mapping[str, str], names: tuple[str, ...]) -> Any:
    model = peft.PeftModel.from_pretrained(llama(), text_loras[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(text_loras[name], adapter_name=name)
    model.base_model.set_adapter(list(names))
    return model.eval()


def test_a_model_with_an_adapter_of_transformers(text_loras: dict[str, str]) -> None:
    expected, model = logits(by_peft(text_loras, ("own", "a", "b"))), llama()
    model.load_adapter(text_loras["own"])
    before = logits(model)
    with attach(model, loras={name: text_loras[name] for name in "ab"}, mode="linear"):
        assert close(logits(model), expected, 1e-5)
    assert torch.equal(logits(model), before)
    assert same_base(fingerprint(model), fingerprint(llama()))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_peft_model_whatever_it_calls(kind: str, text_loras: dict[str, str]) -> None:
    targets = ["q_proj", "down_proj"]
    if kind == "ia3":
        config: Any = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False)
    else:
        config = peft.LoraConfig(target_modules=targets, r=4, use_dora=kind == "dora", init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    merged = peft.get_peft_model(llama(), config)
    merged.load_state_dict(model.state_dict())
    merged = merged.merge_and_unload().eval()
    before = logits(model)
    for mode in ("linear", "gated"):
        results = []
        for one in (model, merged):
            mixture = attach(one, loras={name: text_loras[name] for name in "ab"}, mode=mode)
            if mixture.named_parameters():
                randomise(mixture, sharpness=1.0)
            with mixture:
                done = one.generate(**IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
                results.append((logits(one), done))
        assert torch.equal(results[0][1], results[1][1])
        assert close(results[0][0], results[1][0], 1e-4)
    assert torch.equal(logits(model), before)
    assert "forward" not in vars(model.base_model)
    assert same_base(fingerprint(host_of(model)), fingerprint(llama()))


def test_learned_prompts_are_refused_by_name(text_loras: dict[str, str]) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(UsageError, match="learned tokens before the prompt"):
        attach(model, loras={"a": text_loras["a"]})
