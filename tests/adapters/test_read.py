"""A LoRA that PEFT wrote is read to the updates that PEFT computes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_parity import SETTINGS, assert_same_deltas, matrices_of, peft_deltas
from safetensors.torch import load_file, save_file

from molecli.adapters import LoraSpec, read_expert, read_info


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_delta_equals_pefts_on_t5(
    settings: dict[str, Any], tiny_t5: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_peft_adapter(tiny_t5.model, tmp_path / "x", rank=4, alpha=8, **settings)
    expert = read_expert(LoraSpec("x", str(folder)), matrices_of(tiny_t5.model))
    assert_same_deltas({m: f.delta() for m, f in expert.factors.items()}, peft_deltas(tiny_t5.model, folder))


@pytest.mark.parametrize("kind", ["bart", "llama", "gpt2"])
def test_every_delta_equals_pefts_on_other_bases(
    kind: str, make_tiny: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_tiny(kind).model
    folder = make_peft_adapter(model, tmp_path / "x", rank=3, alpha=5)
    expert = read_expert(LoraSpec("x", str(folder)), matrices_of(model))
    assert_same_deltas({m: f.delta() for m, f in expert.factors.items()}, peft_deltas(model, folder))


def test_the_patterns_change_what_is_read(tiny_t5: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_peft_adapter(tiny_t5.model, tmp_path / "x", rank=4, alpha=8, **SETTINGS["both patterns, rslora"])
    info = read_info(LoraSpec("x", str(folder)))
    first = "encoder.block.0.layer.0.SelfAttention"
    assert (info.rank, info.alpha) == (4, 8.0)
    assert [info.ranks[f"{first}.{m}"] for m in "qkv"] == [3, 5, 4]
    assert [info.alphas[f"{first}.{m}"] for m in "qkv"] == [1.0, 20.0, 8.0]
    assert info.scalings[f"{first}.q"] == pytest.approx(1 / 3**0.5)
    assert info.matrices[f"{first}.q"] == (32, 32)


def test_an_expert_knows_where_it_came_from(adapter: Path, matrices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter.parent)
    expert = read_expert(LoraSpec("x", "lora"), matrices)
    assert (expert.name, expert.source, expert.rank, expert.alpha) == ("x", str(adapter.resolve()), 4, 8.0)
    info = read_info(LoraSpec("x", "lora"))
    assert expert.sha256 == info.sha256
    assert len(expert.sha256) == 64


def test_factors_come_in_the_bases_order(adapter: Path, matrices: Any) -> None:
    expert = read_expert(LoraSpec("x", str(adapter)), matrices)
    assert list(expert.matrices) == [name for name in matrices if name in expert.factors]


def test_a_single_file_uses_the_configuration_beside_it(adapter: Path, matrices: Any) -> None:
    whole = read_expert(LoraSpec("x", str(adapter)), matrices)
    single = read_expert(LoraSpec("x", str(adapter / "adapter_model.safetensors")), matrices)
    assert_same_factors(whole, single)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_single_file_uses_the_configuration_in_its_metadata(
    prefix: str, adapter: Path, matrices: Any, alone: Any
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    text = json.dumps({prefix + key: value for key, value in config.items()})
    file = alone(adapter)
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})
    assert_same_factors(
        read_expert(LoraSpec("x", str(adapter)), matrices), read_expert(LoraSpec("x", str(file)), matrices)
    )


def test_a_single_file_uses_the_alphas_beside_its_factors(adapter: Path, matrices: Any, alone: Any) -> None:
    file = alone(adapter)
    tensors = load_file(file)
    alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(8.0) for k in tensors if "lora_A" in k}
    save_file({**tensors, **alphas}, file)
    assert_same_factors(
        read_expert(LoraSpec("x", str(adapter)), matrices), read_expert(LoraSpec("x", str(file)), matrices)
    )


def test_keys_that_carry_the_adapters_name_are_read(adapter: Path, matrices: Any, rewrite: Any) -> None:
    before = read_expert(LoraSpec("x", str(adapter)), matrices)
    rewrite(adapter, lambda tensors: {k.replace(".weight", ".default.weight"): t for k, t in tensors.items()})
    assert_same_factors(before, read_expert(LoraSpec("x", str(adapter)), matrices))


def assert_same_factors(one: Any, other: Any) -> None:
    assert one.factors.keys() == other.factors.keys()
    for name, low_rank in one.factors.items():
        assert torch.equal(low_rank.A, other.factors[name].A)
        assert torch.equal(low_rank.B, other.factors[name].B)
        assert low_rank.scaling == other.factors[name].scaling


def test_stored_types_are_kept(adapter: Path, matrices: Any, rewrite: Any) -> None:
    rewrite(adapter, lambda tensors: {k: t.bfloat16() for k, t in tensors.items()})
    expert = read_expert(LoraSpec("x", str(adapter)), matrices)
    assert {f.A.dtype for f in expert.factors.values()} == {torch.bfloat16}


def test_thirty_two_small_loras_load_in_under_two_seconds(
    tiny_t5: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    matrices = matrices_of(tiny_t5.model)
    folders = [make_peft_adapter(tiny_t5.model, tmp_path / f"lora{i}", rank=8, seed=i) for i in range(4)]
    start = time.process_time()  # the work itself: a busy machine must not fail it
    experts = [read_expert(LoraSpec(f"e{i}", str(folders[i % 4])), matrices) for i in range(32)]
    assert time.process_time() - start < 2.0
    assert len(experts) == 32
