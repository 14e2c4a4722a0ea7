"""A folder that `write_peft` wrote is loaded by PEFT to the same updates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_parity import SETTINGS, assert_same_deltas, matrices_of, peft_deltas

from molecli.adapters import LoraSpec, read_expert, write_peft
from molecli.experts import LowRank


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_was_read_is_written_back_and_loaded_by_peft(
    settings: dict[str, Any], make_tiny: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    matrices = matrices_of(make_tiny("t5").model)
    folder = make_peft_adapter(make_tiny("t5").model, tmp_path / "x", rank=4, alpha=8, **settings)
    expert = read_expert(LoraSpec("x", str(folder)), matrices)
    written = write_peft(tmp_path / "y", expert.factors, "some/base", task_type="SEQ_2_SEQ_LM")
    assert_same_deltas(peft_deltas(make_tiny("t5").model, written), peft_deltas(make_tiny("t5").model, folder))
    again = read_expert(LoraSpec("x", str(written)), matrices)
    for name, low_rank in expert.factors.items():
        assert torch.equal(low_rank.A, again.factors[name].A)
        assert torch.equal(low_rank.B, again.factors[name].B)
        assert low_rank.scaling == again.factors[name].scaling


def test_a_transposed_base_loads_it_too(make_tiny: Any, make_peft_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_peft_adapter(make_tiny("gpt2").model, tmp_path / "x", rank=3, alpha=5)
    expert = read_expert(LoraSpec("x", str(folder)), matrices_of(make_tiny("gpt2").model))
    written = write_peft(tmp_path / "y", expert.factors, "gpt2", task_type="CAUSAL_LM", fan_in_fan_out=True)
    assert_same_deltas(peft_deltas(make_tiny("gpt2").model, written), peft_deltas(make_tiny("gpt2").model, folder))


def test_a_pattern_means_one_matrix_only(tmp_path: Path) -> None:
    def factors(rank: int) -> LowRank:
        return LowRank(torch.ones(rank, 4), torch.ones(4, rank), 0.3)

    names = ["q", "encoder.q", "x.encoder.q", "encoder_q"]
    expert = {name: factors(rank) for name, rank in zip(names, [2, 3, 2, 2], strict=True)}
    folder = write_peft(tmp_path / "y", expert, "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 0.6)
    assert config["rank_pattern"] == {r"^encoder\.q": 3}
    read = read_expert(LoraSpec("y", str(folder)), dict.fromkeys(names, (4, 4)))
    assert {name: f.rank for name, f in read.factors.items()} == dict(zip(names, [2, 3, 2, 2], strict=True))
    assert {f.scaling for f in read.factors.values()} == {0.3}
