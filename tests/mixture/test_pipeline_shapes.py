"""Every shape of diffusers pipeline: fixed modes equal diffusers, output modes equal one branch at a time by diffusers,
gates do not mix rows, and what cannot be known of a pipeline is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gates import close, randomise
from pipeline_loras import WEIGHTS, experts, in_unet, one_at_a_time, summed, written
from pipeline_shapes import SHAPES, load_ip_adapter
from torch import Tensor

from molecli.bases.pipeline import PipelineModules
from molecli.config import GateConfig
from molecli.errors import RunError
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture
from molecli.mixture.unet_rows import repeated

SPREAD = ("sdxl_controlnet", "sdxl_t2i_adapter", "sd_ip_adapter", "sd_pag", "animatediff")
EVERY = pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=() if name in SPREAD else pytest.mark.slow) for name in SHAPES]
)
PERTURBED = [name for name in SHAPES if "pag" in name]
# Their rows are other than halves, or not known.
PARTS = [*PERTURBED, "sd_pix2pix", "sdxl_pix2pix", "sd_upscale"]
# diffusers cannot load LoRAs into it at all.
WITHOUT_LORAS = ("sd_t2i_adapter",)


@EVERY
@pytest.mark.parametrize("scale", [None, 0.4])
def test_a_sum_equals_diffusers_also_with_a_scale_of_the_call(shape: str, scale: float | None, tmp_path: Path) -> None:
    if shape in WITHOUT_LORAS:
        pytest.skip("diffusers' pipeline takes no LoRAs")
    pipe, call = SHAPES[shape]()
    base, folders = call(pipe), written(experts(pipe), tmp_path)
    inputs = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    expected = call(summed(SHAPES[shape]()[0], folders), **inputs)
    assert not close(expected, base, 1e-3)
    with attach(pipe, loras=folders, mode="linear", weights=WEIGHTS):
        assert close(call(pipe, **inputs), expected, 1e-5)
    assert torch.equal(call(pipe), base)


@EVERY
def test_composite_equals_one_lora_at_a_time_by_diffusers(shape: str, tmp_path: Path) -> None:
    if shape in WITHOUT_LORAS:
        pytest.skip("diffusers' pipeline takes no LoRAs")
    pipe, call = SHAPES[shape]()
    folders = written(experts(pipe, in_unet), tmp_path)
    expected = call(one_at_a_time(SHAPES[shape]()[0], folders))
    with attach(pipe, loras=folders, mode="composite") as mixture:
        assert close(call(pipe), expected, 1e-5)
        mixture.branches_at_once = 1  # type: ignore[attr-defined]
        assert close(call(pipe), expected, 1e-5)


@EVERY
def test_gates_and_loratorio_are_right_or_refused_by_name(shape: str) -> None:
    pipe, call = SHAPES[shape]()
    base, found = call(pipe), experts(pipe)
    mixture = build_mixture(PipelineModules(pipe), found, mode="gated")
    randomise(mixture, sharpness=1.0)
    with mixture:
        if shape in PERTURBED:
            with pytest.raises(RunError, match="rows are split"):
                call(pipe)
        else:
            assert not close(call(pipe), base, 1e-3)
        mixture.mask("a", "b")
        assert torch.equal(call(pipe), base)
    with build_mixture(PipelineModules(pipe), found, mode="loratorio") as mixture:
        if shape in PARTS:
            with pytest.raises(RunError, match="not known which those are"):
                call(pipe)
        else:
            at_once = call(pipe)
            mixture.branches_at_once = 1  # type: ignore[attr-defined]
            assert close(call(pipe), at_once, 1e-5)
    assert torch.equal(call(pipe), base)


FILMS = [
    {"granularity": "network", "input": "hidden", "pool": "mean"},
    {"granularity": "block", "input": "hidden", "pool": "mean"},
    {"granularity": "layer", "input": "experts", "pool": "mean"},
    {"granularity": "layer", "input": "hidden", "pool": "token"},
    {"granularity": "matrix", "input": "hidden", "pool": "token"},
]


@pytest.mark.parametrize("config", FILMS, ids=lambda config: "-".join(config.values()))
@torch.no_grad()
def test_a_gate_of_a_film_reads_all_its_frames_and_no_other_film(config: dict[str, Any]) -> None:
    pipe, _ = SHAPES["animatediff"]()
    mixture = build_mixture(PipelineModules(pipe), experts(pipe), mode="gated", gate=GateConfig(**config))
    randomise(mixture, sharpness=1.0)
    random = torch.Generator().manual_seed(0)
    # As many frames as positions at the lowest resolution: their rows must still be told apart.
    sample, text = torch.randn(2, 4, 4, 4, 4, generator=random), torch.randn(2, 4, 5, 16, generator=random)

    def predicted(films: slice) -> Tensor:
        return pipe.unet(sample[films], 7, encoder_hidden_states=text[films].flatten(0, 1)).sample

    with mixture:
        both, gates = predicted(slice(0, 2)), mixture.gates()
        apart = torch.cat([predicted(slice(0, 1)), predicted(slice(1, 2))])
    assert close(both, apart, 1e-5)
    unet = [gate for name, gate in gates.items() if name.startswith("unet")]
    assert unet
    assert all(len(gate) == 2 for gate in unet)
    assert any(not close(gate[0], gate[1], 1e-3) for gate in unet)


def test_an_input_whose_entries_are_not_rows_is_refused_by_name() -> None:
    inputs = {"sample": torch.zeros(4, 2), "timestep": torch.tensor(3), "class_labels": torch.zeros(1), "note": "x"}
    made = repeated(inputs, 3, 4)
    assert made["sample"].shape == (12, 2)
    assert made["timestep"].dim() == 0
    assert len(made["class_labels"]) == 1
    assert made["note"] == "x"
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.zeros(1, 1, 8, 8)]}}
    assert repeated(masks, 3, 1)["cross_attention_kwargs"]["ip_adapter_masks"][0].shape == (1, 1, 8, 8)
    with pytest.raises(RunError, match="its input mine has 3 entries, and the call has 4 rows"):
        repeated({"cross_attention_kwargs": {"mine": torch.zeros(3, 2)}}, 2, 4)


def test_chunks_of_rows_are_refused_for_gates_and_exact_for_branches() -> None:
    pipe, call = SHAPES["sd"]()
    found = experts(pipe)
    with build_mixture(PipelineModules(pipe), found, mode="composite"):
        expected = call(pipe)
        for module in pipe.unet.modules():
            if hasattr(module, "set_chunk_feed_forward"):
                module.set_chunk_feed_forward(1, 0)
        assert close(call(pipe), expected, 1e-5)
    mixture = build_mixture(PipelineModules(pipe), found, mode="gated")
    randomise(mixture, sharpness=1.0)
    with mixture, pytest.raises(RunError, match="is called with 1 rows, and the call has 2"):
        call(pipe)


def test_a_scale_reaches_every_kind_of_mode_and_only_its_own_call() -> None:
    pipe, call = SHAPES["sdxl"]()
    found = experts(pipe)

    def drawn(mixture: Mixture, scale: float | None) -> Tensor:
        randomise(mixture, sharpness=1.0) if mixture.named_parameters() else None
        with mixture:
            before = call(pipe)
            scaled = call(pipe, **({} if scale is None else {"cross_attention_kwargs": {"scale": scale}}))
            assert torch.equal(call(pipe), before)
        return scaled

    base, half = call(pipe), {"a": 0.5, "b": 0.5}
    for mode in ("linear", "switch", "composite"):
        wanted = drawn(build_mixture(PipelineModules(pipe), found, mode=mode, weights=half), None)
        assert close(drawn(build_mixture(PipelineModules(pipe), found, mode=mode), 0.5), wanted, 1e-5)
    for mode in ("gated", "ties", "loratorio"):
        assert not close(drawn(build_mixture(PipelineModules(pipe), found, mode=mode), 0.5), base, 1e-3)
        assert close(drawn(build_mixture(PipelineModules(pipe), found, mode=mode), 0.0), base, 1e-6)


def test_the_pipeline_has_its_own_encode_prompt_again() -> None:
    pipe, call = SHAPES["sd"]()
    found = experts(pipe)
    one, two = (build_mixture(PipelineModules(pipe), [expert], mode="linear") for expert in found)
    with one, two:
        both = call(pipe, cross_attention_kwargs={"scale": 0.3})
    assert "encode_prompt" not in vars(pipe)
    with build_mixture(PipelineModules(pipe), found, mode="linear"):
        assert close(call(pipe, cross_attention_kwargs={"scale": 0.3}), both, 1e-5)
    one.attach()
    two.attach()
    one.detach()
    two.detach()
    assert torch.equal(call(pipe, cross_attention_kwargs={"scale": 0.3}), call(pipe))


def test_a_composition_knows_its_base_beside_an_ip_adapter() -> None:
    pipe, _ = SHAPES["sd"]()
    before = fingerprint(PipelineModules(pipe))
    load_ip_adapter(pipe)
    assert same_base(before, fingerprint(PipelineModules(pipe)))
