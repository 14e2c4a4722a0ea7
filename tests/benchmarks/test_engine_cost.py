"""The engine's cost benchmark runs at tiny sizes, and what it compares is comparable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from molecli.config import GateConfig
from molecli.mixture.build import build_mixture

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import engine_cost

    return engine_cost


@pytest.fixture
def hosts(cost: ModuleType) -> ModuleType:
    import engine_hosts

    return engine_hosts


def test_one_run_times_every_method_and_prints_one_table(
    cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--shape", "tiny", "--experts", "2", "--rounds", "1", "--warmup", "0", "--device", "cpu", "--output"]
    result = cost.main([*flags, str(tmp_path)])
    assert json.loads((tmp_path / "engine_cost-tiny-cpu.json").read_text()) == json.loads(json.dumps(result))
    timed = {(row["host"], row["work"]) for row in result["rows"] if "times_base" in row}
    assert {work for host, work in timed if host == "mole, layer"} == {"forward", "step", "decode"}
    assert {work for host, work in timed if host == "PEFT X-LoRA"} == {"forward", "step"}
    assert ("PEFT, all adapters active", "forward") in timed
    assert all(len(row["times_s"]) == 1 for row in result["rows"] if "times_base" in row)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result["rows"])


def test_peft_with_all_adapters_computes_what_the_linear_mode_does(hosts: ModuleType) -> None:
    shape = hosts.SHAPES["tiny"]
    model = hosts.make_model(shape, device="cpu", dtype=torch.float32, seed=0)
    batch = hosts.make_batch(shape, device="cpu", seed=0)
    experts = hosts.make_experts(shape, 3, dtype=torch.float32, seed=0)
    base = hosts.base_host(model, batch).forward()
    expected = hosts.peft_host(model, batch, experts).forward()
    with build_mixture(model, experts, mode="linear"), torch.no_grad():
        summed = model(input_ids=batch["input_ids"]).logits
    assert torch.allclose(summed, expected, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)


def test_what_a_training_step_keeps_does_not_grow_as_experts_times_tokens_times_width(
    cost: ModuleType, hosts: ModuleType
) -> None:
    shape = replace(hosts.SHAPES["tiny"], width=128, ffn=256, tokens=32)
    model = hosts.make_model(shape, device="cpu", dtype=torch.float32, seed=0)
    batch = hosts.make_batch(shape, device="cpu", seed=0)
    experts = hosts.make_experts(shape, 16, dtype=torch.float32, seed=0)

    def memory(count: int) -> dict[str, int]:
        host = hosts.mole_host(model, batch, experts[:count], GateConfig(granularity="block"), "mole")
        return cost._cpu_memory(host)

    few, many = memory(1), memory(16)
    outputs = shape.layers * sum(d_out for d_out, _ in shape.matrices.values())
    materialised = 15 * shape.batch * shape.tokens * outputs * 4
    assert 0 < many["kept"] - few["kept"] < materialised / 10
    assert 0 < many["beyond"] - few["beyond"] < materialised / 10


def test_live_bytes_count_what_is_made_and_not_what_was_there(cost: ModuleType) -> None:
    old = torch.ones(1000)
    with cost.LiveBytes() as live:
        seen = old.view(10, 100)
        made = seen + 1
        assert live.now == 4000
        made.mul_(2)
        other = made.t() * 3
        assert live.now == 8000
        del other
        assert live.now == 4000
    assert live.peak == 8000
    assert made.sum() == 4000
