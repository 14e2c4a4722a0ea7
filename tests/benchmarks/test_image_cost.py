"""The cost benchmark of diffusion pipelines runs at a tiny size, and what it compares is comparable."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_pipelines import close

from molecli.bases.pipeline import PipelineModules, pipeline_matrices

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import image_cost

    return image_cost


def test_one_run_times_methods_and_prints_the_steps_table_last(
    cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = (
        "base",
        "gated, layer, mean",
        "gated, block, mean",
        "switch",
        "composite of 3",
        "composite of 3, one at once",
    )
    result = cost.main(
        ["--smoke", "--device", "cpu", "--composite", "3", "--only", "; ".join(some), "--output", str(tmp_path)]
    )
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {*some, "one LoRA"}  # which the passes of the others are counted in
    assert json.loads((tmp_path / "image_cost-tiny-cpu.json").read_text()) == json.loads(json.dumps(result))
    assert {rows[name]["passes"] for name in ("switch", "composite of 3")} == {1, 3}
    assert all(len(row["times_s"]) == 1 for row in rows.values())
    assert rows["composite of 3"]["memory"]["denoising"] > rows["composite of 3, one at once"]["memory"]["denoising"]
    assert {(row["method"], row["checkpointed"]) for row in result["training"]} >= {("base", True), ("base", False)}
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "image_cost-tiny-cpu.md").read_text()
    last = printed.split("\n\n")[-1].splitlines()
    assert len(last) == 2 + len(rows)
    assert any(": PASS" in line or ": MISS" in line for line in last)


@pytest.mark.slow
def test_one_run_times_every_method_against_its_target(cost: ModuleType, tmp_path: Path) -> None:
    result = cost.main(["--smoke", "--device", "cpu", "--composite", "2,3", "--output", str(tmp_path)])
    rows = {row["method"]: row for row in result["rows"]}
    assert {"base", "one LoRA", "gated, layer, mean", "gated, block, token", "linear", "switch"} <= rows.keys()
    assert {"composite of 3", "composite of 3, one at once", "loratorio", "diffusers, fused"} <= rows.keys()
    assert {rows[name]["passes"] for name in ("switch", "composite of 3", "loratorio")} == {1, 3, 4}
    last = (tmp_path / "image_cost-tiny-cpu.md").read_text().split("\n\n")[-1].splitlines()
    assert sum(": PASS" in line or ": MISS" in line for line in last) == 9


def test_diffusers_adapters_draw_what_linear_does_and_no_host_changes_another(cost: ModuleType, tmp_path: Path) -> None:
    pipe = cost.build_pipeline(cost.SHAPES["tiny"], device="cpu", dtype=torch.float32, seed=0)
    work = cost.make_work(pipe, batch=1, pixels=64, encode=True, seed=0)
    experts = cost.make_experts(pipe, 3, rank=4, parts=tuple(cost.PARTS), seed=0)
    hosts = [cost.base_host(pipe), cost.mole_host(pipe, experts, "linear", mode="linear")]
    hosts += [cost.diffusers_host(pipe, experts, tmp_path, fused=fused) for fused in (False, True)]
    base, *others = [torch.as_tensor(host.draw(work, 2)) for host in hosts]
    assert torch.equal(cost.base_host(pipe).draw(work, 2), base)
    assert not close(others[0], base, 1e-2)
    for other in others[1:]:
        assert close(other, others[0], 1e-4)


def test_sd15_has_the_published_shape(cost: ModuleType) -> None:
    from image_pipelines import build_tokenizer

    with torch.device("meta"):
        unet, vae, clip, _ = cost.SHAPES["sd15"].parts(build_tokenizer(77))
    assert [sum(p.numel() for p in part.parameters()) for part in (unet, vae, clip)] == [
        859_520_964,
        83_653_863,
        123_060_480,
    ]
    matrices = pipeline_matrices(PipelineModules(unet=unet, text_encoder=clip))
    adapted = {name: sum(map(keep, matrices)) for name, keep in cost.PARTS.items()}
    assert adapted == {"attention": 128, "ff": 32, "conv": 60, "text": 72}
