"""`run_compose` whole on a tiny pipeline: gates learn from the concepts' pictures; every mode is written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from molecli.bases.loading import load_backbone
from molecli.catalog.methods import get_method
from molecli.commands import compose
from molecli.commands.compose import run_compose
from molecli.config import ComposeRecipe, load_recipe
from molecli.files.composition import load_composition
from molecli.mixture.attach import attach, attach_composition
from molecli.training.checkpoints import newest_step

COLOURS = {"cat": "red", "hat": "green", "sea": "blue"}
PROMPT = "a cat and a hat, sea"
OUTPUT_MODES = ("switch", "composite", "w_switch", "w_composite", "loratorio")


@pytest.fixture
def make_recipe(picture_world: Any, tmp_path: Path) -> Callable[..., ComposeRecipe]:
    """`make_recipe(output="run", **changes)` -> a short compose recipe on the tiny base; two pictures a concept."""
    concepts = {}
    for name, colour in COLOURS.items():
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (24, 24), colour).rotate(5 * i).save(folder / f"{i}.png")
        kind = {"sea": "background"}.get(name, "object")
        concepts[name] = {"pictures": str(folder), "prompt": f"a {name}", "kind": kind}

    def make(output: str = "run", **changes: Any) -> ComposeRecipe:
        tree = {
            "base.id": str(picture_world.base),
            "loras": [f"{name}={path}" for name, path in picture_world.loras.items()],
            "concepts": concepts,
            "gate.granularity": "block",
            "train": {"steps": 4, "batch_size": 2, "warmup_steps": 0},
            "image": {"steps": 2, "guidance": 2.0},
            "preview": [],
            "device": "cpu",
            "output": str(tmp_path / output),
        }
        recipe = load_recipe(None, "compose", {**tree, **changes})
        assert isinstance(recipe, ComposeRecipe)
        return recipe

    return make


def latents(backbone: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(3)]
    return backbone.pipe(PROMPT, num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="latent")[
        0
    ]


def log_of(recipe: ComposeRecipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(recipe.output, "train_log.jsonl").read_text().splitlines()]


# -- gated -----------------------------------------------------------------------------------------------------------


def test_gates_learn_and_each_step_is_logged(make_recipe: Any) -> None:
    recipe = make_recipe()
    report = run_compose(recipe)
    assert report["steps"] == 4
    assert report["trained_parameters"] > 0
    first = log_of(recipe)[0]
    assert {"loss", "denoise", "entropy", "regulariser", "gate/cat", "gate/hat", "gate/sea"} <= set(first)
    assert first["denoise"] == pytest.approx(first["loss"], rel=1e-5)
    assert first["entropy"] == pytest.approx(math.log(3), rel=1e-4)
    tensors = load_file(Path(recipe.output, "composition.safetensors"))
    assert any(name.startswith("site/text_encoder.") for name in tensors)
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith("head.bias"))


def test_only_the_gates_change(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Any] = {}
    load, build = compose.load_backbone, compose.build_mixture

    def loaded(*arguments: Any) -> Any:
        held["backbone"] = load(*arguments)
        held["before"] = {n: t.clone() for n, t in weights(held["backbone"]).items()}
        return held["backbone"]

    def built(*arguments: Any, **options: Any) -> Any:
        held["mixture"] = build(*arguments, **options)
        held["factors"] = [(f.A.clone(), f.B.clone()) for f in factors(held["mixture"])]
        return held["mixture"]

    monkeypatch.setattr(compose, "load_backbone", loaded)
    monkeypatch.setattr(compose, "build_mixture", built)
    run_compose(make_recipe())
    assert all(torch.equal(t, held["before"][n]) for n, t in weights(held["backbone"]).items())
    for (A, B), now in zip(held["factors"], factors(held["mixture"]), strict=True):
        assert torch.equal(A, now.A)
        assert torch.equal(B, now.B)


def weights(backbone: Any) -> dict[str, Tensor]:
    parts = {"model": backbone.model, "vae": backbone.pipe.vae}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def factors(mixture: Any) -> list[Any]:
    return [factor for expert in mixture.bank.experts for factor in expert.factors.values()]


def test_an_interrupted_run_resumes_to_the_same_bytes(make_recipe: Any) -> None:
    settings = {"objective.collage": 0.5}
    whole, cut = make_recipe("whole", **settings), make_recipe("cut", **settings)
    run_compose(whole)

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_compose(cut, progress=interrupt)
    assert newest_step(Path(cut.output)) == 2
    assert run_compose(cut, resume=True)["steps"] == 4
    assert log_of(whole) == log_of(cut)
    a, b = (load_file(Path(recipe.output, "composition.safetensors")) for recipe in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert run_compose(cut, resume=True)["steps"] == 4  # finished: as it is


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gates_learn_on_a_base_in_half_precision(make_recipe: Any, dtype: str) -> None:
    norms = []
    for kind in ("float32", dtype):
        recipe = make_recipe(kind, **{"base.dtype": kind, "train.steps": 1, "train.balance": 0.5})
        run_compose(recipe)
        norms.append(log_of(recipe)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


# -- every mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gated", "linear", "merge", "nla", "single", *OUTPUT_MODES])
def test_a_composition_of_each_mode_draws_the_same_bits_again(
    make_recipe: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"mode": mode, "train.steps": 1, "train.lr": 0.1}
    method = {"scale": 0.8, "tau": 1, "order": ["sea", "cat", "hat"]}
    changes |= {f"method.{key}": value for key, value in method.items() if key in get_method(mode).reads}
    if mode == "single":
        changes["only"] = ["hat"]
    recipe = make_recipe(**changes)
    held: list[Tensor] = []
    write = compose._composition

    def watched(recipe: Any, backbone: Any, experts: Any, mixture: Any) -> Any:
        with mixture:
            if getattr(mixture, "reads_prompt", False):
                mixture.prepare(PROMPT)
            held.append(latents(backbone))
        return write(recipe, backbone, experts, mixture)

    monkeypatch.setattr(compose, "_composition", watched)
    run_compose(recipe)
    backbone: Any = load_backbone(recipe.base, "cpu")
    base = latents(backbone)
    mixture = attach_composition(backbone.model, load_composition(recipe.output))
    with mixture:
        if getattr(mixture, "reads_prompt", False):
            mixture.prepare(PROMPT)
        assert torch.equal(latents(backbone), held[0])
    assert torch.equal(latents(backbone), base)
    assert float((held[0] - base).abs().max()) > 0.01


def test_settings_of_a_method_are_kept_with_it(make_recipe: Any) -> None:
    recipe = make_recipe(mode="switch", **{"method.tau": 2, "method.scale": 0.8})
    run_compose(recipe)
    composition = load_composition(recipe.output)
    assert composition.level == "output"
    assert composition.settings["method"]["tau"] == 2
    assert composition.settings["triggers"] == {"cat": "cat", "hat": "hat", "sea": "sea"}
    assert composition.settings["kinds"] == {"cat": "object", "hat": "object", "sea": "background"}
    backbone: Any = load_backbone(recipe.base, "cpu")
    with attach(backbone.pipe, composition=recipe.output) as mixture:
        assert mixture.state_dict()


# -- preview ---------------------------------------------------------------------------------------------------------


def test_the_preview_shows_the_composition_beside_the_sum_and_what_its_gates_did(make_recipe: Any) -> None:
    recipe = make_recipe(preview=["linear"])
    run_compose(recipe)
    folder = Path(recipe.output)
    rows = [json.loads(line) for line in (folder / "preview/samples.jsonl").read_text().splitlines()]
    prompts = ["a cat", "a hat", "a sea", PROMPT]
    assert [(row["prompt"], row["method"]) for row in rows] == [(p, m) for p in prompts for m in ("linear", "gated")]
    with Image.open(folder / "preview/sheet.png") as sheet:
        assert sheet.size[1] > 4 * 192
    assert json.loads((folder / "gates.json").read_text())["tasks"] == prompts
    assert (folder / "gates.png").is_file()
    assert (folder / "entropy.png").is_file()


def test_a_fixed_mode_stands_on_the_sheet_once(make_recipe: Any) -> None:
    recipe = make_recipe(mode="merge", preview=["base", "linear", "switch"])
    run_compose(recipe)
    rows = [json.loads(line) for line in Path(recipe.output, "preview/samples.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows[:3]] == ["base", "switch", "merge"]
    assert not Path(recipe.output, "gates.png").exists()
