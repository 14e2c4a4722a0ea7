"""`mole export` on pipelines: diffusers (or PEFT) makes of the file what the composition was, to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import export_recipe, save_composed
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import attention_only, make_expert
from torch import Tensor

from molecli.adapters import write_diffusers
from molecli.bases.loading import load_backbone
from molecli.commands import export as exporting
from molecli.commands.export import run_export
from molecli.config import BaseConfig
from molecli.errors import UsageError
from molecli.mixture.attach import attach
from molecli.mixture.constant import fixed_mixture
from molecli.mixture.layout import adaptable_matrices, host_of

KINDS = ("sd", "sdxl")
LAYOUTS = ("diffusers", "kohya", "peft")
NAMES = ("cat", "hat")


class World:
    """A pipeline of one kind, saved, with two LoRAs of mixed ranks on other matrices, and their concepts' pictures."""

    def __init__(self, kind: str, folder: Path, base: Path, pipe: Any) -> None:
        self.folder, self.base, self.pipe = folder, base, pipe
        matrices = adaptable_matrices(host_of(pipe))
        whole = make_expert("cat", matrices, rank=3, seed=1)  # convolutions, times and text encoders too
        some = make_expert("hat", matrices, rank=2, alpha=1, seed=2, keep=attention_only)
        self.loras = {e.name: write_diffusers(folder / e.name, e.factors) for e in (whole, some)}
        self.concepts = {name: {"pictures": str(self._pictures(name)), "prompt": f"a {name}"} for name in NAMES}

    def _pictures(self, name: str) -> Path:
        (self.folder / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            colour = ("red", "green", "blue")[i]
            Image.new("RGB", (24, 24), colour).save(self.folder / "pictures" / name / f"{i}.png")
        return self.folder / "pictures" / name

    def composed(self, mode: str, **sections: Any) -> Path:
        return save_composed(
            self.folder / mode, self.base, self.pipe, self.loras, mode, concepts=self.concepts, **sections
        )

    def export(self, run: Path, name: str = "out", **changes: Any) -> tuple[dict[str, Any], Path]:
        few = {"image.steps": 2, "image.guidance": 2.0}
        report = run_export(export_recipe(run, self.folder / name, **few, **changes))
        return report, self.folder / name

    def backbone(self) -> Any:
        return load_backbone(BaseConfig(id=str(self.base)), "cpu")


@pytest.fixture
def world_of(
    tmp_path: Path, pipeline_folder: Callable[..., Path], make_pipeline: Callable[..., Any]
) -> Callable[[str], World]:
    return lambda kind: World(kind, tmp_path, pipeline_folder(kind), make_pipeline(kind))


@pytest.fixture
def world(world_of: Callable[[str], World]) -> World:
    return world_of("sd")


@torch.no_grad()
def drawn(pipe: Any) -> Tensor:
    """Latents by the pipeline's own call."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(
        ["a cat", "a hat"], num_inference_steps=2, guidance_scale=2.0, output_type="latent", generator=generators
    ).images


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_composition_draws_the_same_in_diffusers(
    world_of: Callable[[str], World], make_pipeline: Callable[..., Any], kind: str, layout: str
) -> None:
    world = world_of(kind)
    run = world.composed("linear", weights={"cat": 0.4, "hat": -0.7})
    report, folder = world.export(run, format=layout, verify=True)
    assert report["format"] == layout
    assert (report["rank"]["smallest"], report["rank"]["largest"]) == (3, 5)
    assert report["verification"]["delta"]["worst"] < 1e-6
    assert report["verification"]["output"] < 1e-5
    assert {path.name for path in folder.iterdir()} == {report["files"][0].partition("/")[0], "report.json"} | (
        {"text_encoder"} | ({"text_encoder_2"} if kind == "sdxl" else set()) | {"unet"} if layout == "peft" else set()
    )
    pipe = make_pipeline(kind)
    before = drawn(pipe)
    with attach(pipe, composition=run):
        expected = drawn(pipe)
    assert (expected - before).abs().max() > 0.1
    if layout != "peft":
        pipe.load_lora_weights(str(folder), weight_name=report["files"][0])
        torch.testing.assert_close(drawn(pipe), expected, rtol=1e-3, atol=1e-3)
        pipe.unload_lora_weights()
    with attach(pipe, loras={"x": str(folder)}, mode="linear"):  # and it is a LoRA again
        torch.testing.assert_close(drawn(pipe), expected, rtol=1e-3, atol=1e-3)


def test_kohyas_layout_has_its_names_and_one_alpha(world: World) -> None:
    _, folder = world.export(world.composed("linear"), format="kohya")
    with safe_open(folder / "lora.safetensors", "pt") as file:
        keys = set(file.keys())
        alphas = {float(file.get_tensor(key)) for key in keys if key.endswith(".alpha")}
        assert file.metadata()["base_model_name_or_path"] == str(world.base)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj") for key in keys)
    assert len(alphas) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_averaged_over_the_concepts_pictures(world_of: Callable[[str], World], kind: str) -> None:
    world = world_of(kind)
    run = world.composed("gated", **{"gate.granularity": "block", "gate.pool": "token"})
    report, folder = world.export(run, verify=True, **{"calibration.batch_size": 4})
    assert report["averaged_over"] == report["calibration"]["inputs"] == 6
    assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in report["weights"].values())
    assert any(site.startswith("text_encoder") for site in report["weights"])
    assert max(abs(weights[0] - 0.5) for weights in report["weights"].values()) > 0.05
    losses, difference = report["calibration"]["loss"], report["calibration"]["loss_difference"]
    assert losses.keys() == {"base", "gated", "export"}
    assert difference["difference"] == pytest.approx(losses["export"] - losses["gated"], abs=1e-6)
    assert difference["low"] <= difference["difference"] <= difference["high"]
    apart = report["calibration"]["latent_difference"]
    assert apart.keys() == {"base", "export"}
    assert min(apart.values()) > 1e-3
    assert report["calibration"]["pictures"] == 3  # a cat, a hat, and both
    assert report["verification"]["output"] < 1e-5
    # Against the averaged gates themselves, drawn.
    backbone = world.backbone()
    mixture = attach(backbone.pipe, composition=run)
    weights = {site: torch.tensor(values) for site, values in report["weights"].items()}
    with fixed_mixture(mixture, weights, renormalize=False):
        expected = drawn(backbone.pipe)
    backbone.pipe.load_lora_weights(str(folder))
    torch.testing.assert_close(drawn(backbone.pipe), expected, rtol=1e-3, atol=1e-3)


def test_the_mean_of_the_gates_is_that_of_every_pass(world: World) -> None:
    """One picture at a time, by the backbone's own parts."""
    run = world.composed("gated", **{"gate.granularity": "layer"})
    report, _ = world.export(run)
    backbone = world.backbone()
    pictures = [Path(world.concepts[name]["pictures"]) / f"{i}.png" for name in NAMES for i in range(3)]
    from molecli.images.denoising import all_latents
    from molecli.images.pictures import Album
    from molecli.protocols import Picture

    rows = [Picture(path.parent.name, f"a {path.parent.name}", str(path)) for path in pictures]
    latents = all_latents(backbone, Album(rows, backbone.resolution))
    gates, errors = [], []
    generator = torch.random.fork_rng(devices=[])
    with generator, attach(backbone.pipe, composition=run) as mixture, torch.no_grad():
        torch.manual_seed(0)
        for i in range(4):
            noise = torch.randn(latents.shape)
            torch.randint(1000, (len(rows),))  # the timesteps that a training step would draw
            for place, row in enumerate(rows):
                batch = {
                    "latents": latents[place : place + 1],
                    "noise": noise[place : place + 1],
                    "timesteps": torch.tensor([125 + 250 * i]),
                    "prompts": [row.prompt],
                }
                errors.append(float(backbone.example_losses(batch)))
                gates.append(mixture.gates())
    for site, weights in report["weights"].items():
        assert weights == pytest.approx(torch.cat([one[site] for one in gates]).mean(0).tolist(), abs=1e-4)
    assert report["calibration"]["loss"]["gated"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_prompts_to_draw_take_the_place_of_pictures(world: World) -> None:
    run = world.composed("gated", **{"gate.granularity": "block"})
    for name in NAMES:
        for path in Path(world.concepts[name]["pictures"]).iterdir():
            path.unlink()
    report, _ = world.export(run, verify=True, **{"calibration.prompts": ["a cat", "a hat", "a cat and a hat"]})
    assert report["averaged_over"] == report["calibration"]["pictures"] == 3
    assert report["calibration"]["loss"] == {}
    assert report["calibration"]["latent_difference"]["export"] > 0
    assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in report["weights"].values())
    assert report["verification"]["output"] < 1e-5


def test_a_limit_holds_for_each_concept_and_a_masked_one_is_not_looked_at(world: World) -> None:
    run = world.composed("gated", **{"gate.granularity": "block"})
    report, _ = world.export(run, **{"calibration.limit": 2})
    assert report["averaged_over"] == 4
    report, folder = world.export(run, "only", only="hat", format="kohya")
    assert report["averaged_over"] == 3
    assert set(report["calibration"]["by_task"]) == {"hat"}
    assert all(weights == pytest.approx([0, 1]) for weights in report["weights"].values())
    assert {t.shape[0] for key, t in load_file(folder / "lora.safetensors").items() if "lora_down" in key} == {2}


def test_a_rank_and_half_precision_together(world: World) -> None:
    report, folder = world.export(world.composed("linear"), rank=2, dtype="float16", verify=True)
    assert (report["rank"]["smallest"], report["rank"]["largest"]) == (2, 2)
    assert {t.dtype for t in load_file(folder / "pytorch_lora_weights.safetensors").values()} == {torch.float16}
    assert report["verification"]["file"] < 1e-6
    for name, entry in report["error"]["by_matrix"].items():
        assert report["verification"]["delta"]["by_matrix"][name] == pytest.approx(entry["error"], abs=3e-3)


@pytest.mark.parametrize("mode", ["switch", "composite"])
def test_what_acts_on_the_steps_is_refused_before_the_base_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    run = world.composed(mode)
    monkeypatch.setattr(exporting, "load_backbone", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UsageError) as caught:
        world.export(run)
    assert str(caught.value) == (
        f"{run}: mode {mode} composes the UNet's outputs step by step, which a single adapter cannot. "
        "Compose the LoRAs with --mode gated or linear, and export that."
    )


def test_gates_without_pictures_or_prompts_are_refused(world: World) -> None:
    run = world.composed("gated")
    pictures = Path(world.concepts["hat"]["pictures"])
    for path in pictures.iterdir():
        path.unlink()
    with pytest.raises(UsageError) as caught:
        world.export(run)
    assert str(caught.value).startswith(str(pictures))
    assert str(caught.value).endswith("Write --prompt TEXT, which is drawn instead.")


def test_the_report_is_written_and_nothing_stays_on_the_pipeline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = world.backbone()
    before = drawn(backbone.pipe)
    monkeypatch.setattr(exporting, "load_backbone", lambda *_: backbone)
    for layout in LAYOUTS:
        report, folder = world.export(world.composed("linear"), layout, format=layout, verify=True)
        assert json.loads((folder / "report.json").read_text()) == dict(report)
        assert torch.equal(drawn(backbone.pipe), before)
