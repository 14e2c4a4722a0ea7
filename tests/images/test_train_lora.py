"""`train-lora` on pictures: diffusers loads what it writes; the class, mixed precision, resuming, bad input."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from molecli.adapters import read_expert
from molecli.bases.loading import load_backbone
from molecli.commands.train_lora import run_train_lora
from molecli.config import AdapterConfig, PicturesConfig, TrainLoraRecipe, dump_recipe, load_recipe
from molecli.errors import MismatchError, UsageError
from molecli.files.concepts import read_concept
from molecli.files.lora_spec import DIFFUSERS_FILE, LoraSpec
from molecli.images.denoising import PictureLoss, checkpointed
from molecli.images.pictures import Album, Lesson, instance_pictures, lessons
from molecli.images.targets import picture_targets
from molecli.images.train_lora import concept_of
from molecli.training.adapter import adapted, trained_parameters
from molecli.training.checkpoints import newest_step
from molecli.training.ranks import StepContext, accelerator_for

PROMPT, CLASS_PROMPT = "a photo of sks", "a photo"
DREAMBOOTH = Path(__file__).parents[3] / "shared" / "data" / "dreambooth"


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    """Three pictures of 24x24 pixels: blobs of one colour."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for i in range(3):
        pixels = np.full((24, 24, 3), 40, np.uint8)
        pixels[4 * i : 4 * i + 12, 6:18] = (220, 180, 20)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, dog: Path, pipeline_folder: Callable[..., Path]) -> Callable[..., TrainLoraRecipe]:
    """`make_recipe(kind, output=..., pictures={...}, train={...})`: a few steps on a tiny pipeline."""

    def make(kind: str = "sd", *, output: str = "run", **sections: Any) -> TrainLoraRecipe:
        flags: dict[str, Any] = {
            "base": {"id": str(pipeline_folder(kind)), "dtype": sections.pop("dtype", "float32")},
            "pictures": {"instance_dir": str(dog), "instance_prompt": PROMPT, **sections.pop("pictures", {})},
            "train": {"steps": 3, "lr": 0.01, "checkpoint_every": 1, **sections.pop("train", {})},
            "output": str(tmp_path / output),
            "device": "cpu",
            **sections,
        }
        recipe = load_recipe(None, "train-lora", flags)
        assert isinstance(recipe, TrainLoraRecipe)
        return recipe

    return make


def weights_of(recipe: TrainLoraRecipe) -> bytes:
    return Path(recipe.output, DIFFUSERS_FILE).read_bytes()


def picture_of(pipe: Any, prompt: str = PROMPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "generator": generator, "output_type": "pt", "height": 16, "width": 16}
    return pipe(prompt, **options).images


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_diffusers_and_our_reader_take_the_result_alike(kind: str, make_recipe: Any) -> None:
    recipe = make_recipe(kind, pictures={"text_encoder": True}, adapter={"targets": "attention,conv"})
    run_train_lora(recipe)
    backbone: Any = load_backbone(recipe.base, "cpu")
    expert = read_expert(LoraSpec("dog", recipe.output), backbone.matrices())
    assert any(factor.A.ndim == 4 for factor in expert.factors.values())
    # SDXL reads its first encoder before that one's last layer, which nothing then trains.
    moved = {name for name, factor in expert.factors.items() if factor.B.abs().max() > 0}
    assert {name for name in expert.factors if ".layers.1." not in name} <= moved

    theirs = copy.deepcopy(backbone.pipe)
    before = picture_of(theirs)
    theirs.load_lora_weights(recipe.output)
    loaded = picture_of(theirs)
    with torch.no_grad():
        for name, factor in expert.factors.items():
            weight = backbone.model.get_submodule(name).weight
            weight.add_(factor.delta().view_as(weight))
    ours = picture_of(backbone.pipe)
    assert (before - loaded).abs().max() > 1e-4
    torch.testing.assert_close(ours, loaded, rtol=0, atol=1e-5)


def test_the_factors_written_are_those_that_were_trained(make_recipe: Any) -> None:
    recipe = make_recipe(adapter={"rank": 3, "alpha": 6, "rslora": True, "targets": "conv,to_q"})
    backbone: Any = load_backbone(recipe.base, "cpu")
    targets = picture_targets(recipe.adapter.targets, backbone.matrices(), text_encoder=False)
    run_train_lora(recipe)
    expert = read_expert(LoraSpec("dog", recipe.output), backbone.matrices())
    assert list(expert.factors) == targets
    assert {factor.rank for factor in expert.factors.values()} == {3}
    assert all(factor.scaling == pytest.approx(6 / 3**0.5, abs=1e-12) for factor in expert.factors.values())


def test_training_lowers_the_error_on_the_pictures(make_recipe: Any) -> None:
    recipe = make_recipe(train={"steps": 60, "lr": 0.02}, adapter={"targets": "all-linear", "rank": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run_train_lora(recipe)
    assert report["denoising"]["lora"] < 0.9 * report["denoising"]["base"]
    assert report["components"] == {"unet": report["matrices"]}
    assert (report["pictures"], report["class_pictures"], report["resolution"]) == (3, 0, 16)
    assert json.loads(Path(recipe.output, "report.json").read_text()) == report
    assert newest_step(Path(recipe.output)) is None


def test_the_concept_beside_the_lora_names_what_it_adds(make_recipe: Any, dog: Path) -> None:
    recipe = make_recipe(pictures={"kind": "character"})
    run_train_lora(recipe)
    concept = read_concept(recipe.output)
    assert concept is not None
    assert (concept.name, concept.prompt, concept.trigger, concept.kind) == ("dog", PROMPT, "sks", "character")
    assert concept.pictures == str(dog)


def test_the_prompt_of_a_concept_is_the_commonest_of_the_pictures_own(dog: Path) -> None:
    prompts = {"0.png": "sks in snow", "1.png": "a sks", "2.png": "a sks"}
    (dog / "prompts.json").write_text(json.dumps(prompts))
    config = PicturesConfig(instance_dir=str(dog))
    concept = concept_of(config, instance_pictures(config, "dog"))
    assert (concept.prompt, concept.trigger) == ("a sks", "sks")
    named = config.model_copy(update={"trigger": "my sks"})
    assert concept_of(named, instance_pictures(config, "dog")).trigger == "my sks"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_lora_trains_in_float32_on_a_base_of_any_precision(dtype: str, make_recipe: Any) -> None:
    recipe = make_recipe(dtype=dtype, pictures={"text_encoder": True}, output=dtype)
    report = run_train_lora(recipe)
    tensors = load_file(Path(recipe.output, DIFFUSERS_FILE))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    # Near the full-precision run, whose draws are the same.
    exact = run_train_lora(make_recipe(pictures={"text_encoder": True}, output="exact"))
    assert report["loss"]["first"] == pytest.approx(exact["loss"]["first"], rel=0.05)


def test_half_precision_gives_the_gradients_of_full_precision(make_recipe: Any) -> None:
    grads = {}
    for dtype in ("float32", "float16"):
        recipe = make_recipe(dtype=dtype, output=dtype, train={"steps": 1, "grad_clip": 0})
        run_train_lora(recipe)
        line = Path(recipe.output, "train_log.jsonl").read_text().splitlines()[0]
        grads[dtype] = json.loads(line)["grad_norm"]
    assert grads["float16"] == pytest.approx(grads["float32"], rel=0.05)


# -- one step --------------------------------------------------------------------------------------------------------


def one_step(
    recipe: TrainLoraRecipe, *, prior: bool = False, checkpointing: bool = False, **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients of every B) of the first step, the LoRA's B not zero, so that all of it counts."""
    backbone: Any = load_backbone(recipe.base, "cpu")
    assert recipe.pictures is not None
    pictures = instance_pictures(recipe.pictures, "dog")
    album = Album(pictures, backbone.resolution, flip=options.pop("flip", False))
    loss = PictureLoss(backbone, album, **{"prior_weight": 1.0, "text_encoder": True, **options})
    rows = [Lesson("dog", PROMPT, "", 0, 2 if prior else None), Lesson("dog", PROMPT, "", 1, 2 if prior else None)]
    targets = picture_targets("attention", backbone.matrices(), text_encoder=True)
    with (
        adapted(backbone, AdapterConfig(rank=4), seed=0, targets=targets) as model,
        checkpointed(backbone, checkpointing),
    ):
        parameters = trained_parameters(model)
        torch.manual_seed(1)
        for parameter in parameters.values():
            parameter.data.normal_(std=0.05)
        torch.manual_seed(2)
        found = loss(rows, StepContext(1, accelerator_for("cpu")))  # type: ignore[arg-type]
        found.sum.backward()
        grads = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    return float(found.sum.detach()), grads


def test_gradient_checkpointing_changes_no_gradient(make_recipe: Any) -> None:
    plain, saved = (one_step(make_recipe(), checkpointing=on) for on in (False, True))
    assert plain[0] == pytest.approx(saved[0], rel=1e-6)
    assert any("text_encoder" in name for name in plain[1])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(saved[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_gradient_checkpointing_computes_again_and_leaves_the_pipeline_as_it_was(kind: str, make_recipe: Any) -> None:
    backbone: Any = load_backbone(make_recipe(kind).base, "cpu")
    before = [module.training for module in backbone.model.modules()]
    calls = []
    names = [name for name, _ in backbone.model.named_modules()]
    layer = next(name for name in names if name.startswith("text_encoder.") and name.endswith("layers.0"))
    inside = (f"{layer}.layer_norm1", "unet.mid_block.resnets.1")
    for name in inside:
        # Before, not after: the second pass ends as soon as it has what the backward pass needs.
        backbone.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    weight = backbone.model.get_submodule(f"{layer}.mlp.fc1").weight.requires_grad_()
    with checkpointed(backbone, True):
        told = backbone.encode([PROMPT])
        backbone.predict(torch.zeros(1, 4, 8, 8), torch.tensor([3]), told).sum().backward()
    assert [calls.count(name) for name in inside] == [2, 2]
    assert weight.grad is not None
    assert [module.training for module in backbone.model.modules()] == before
    assert not backbone.pipe.unet.is_gradient_checkpointing


def test_kept_latents_and_prompts_give_the_loss_of_fresh_ones(make_recipe: Any) -> None:
    kept, _ = one_step(make_recipe(), text_encoder=False)
    fresh, _ = one_step(make_recipe(), text_encoder=True)
    # The encoder's LoRA is not in what was kept before it was put on.
    assert kept != fresh
    backbone: Any = load_backbone(make_recipe().base, "cpu")
    config = make_recipe().pictures
    album = Album(instance_pictures(config, "dog"), 16)
    losses = [PictureLoss(backbone, album, prior_weight=1.0, text_encoder=on) for on in (False, True)]
    losses[1].latents = None
    found = []
    for loss in losses:
        torch.manual_seed(5)
        rows: Any = lessons(album.pictures)
        found.append(float(loss(rows, StepContext(1, accelerator_for("cpu"))).sum))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_class_s_loss_is_weighted_and_as_many_of_it_are_seen(make_recipe: Any) -> None:
    backbone: Any = load_backbone(make_recipe().base, "cpu")
    album = Album(instance_pictures(make_recipe().pictures, "dog"), 16)
    rows: Any = [Lesson("dog", PROMPT, "", 0, 2), Lesson("dog", PROMPT, "", 1, 2)]
    totals, extras = {}, {}
    for weight in (0.0, 1.0, 3.0):
        loss = PictureLoss(backbone, album, prior_weight=weight, text_encoder=False)
        torch.manual_seed(0)
        found = loss(rows, StepContext(1, accelerator_for("cpu")))
        totals[weight], extras = float(found.sum), found.extras
        assert found.count == 2
    assert totals[0.0] == pytest.approx(2 * float(extras["instance_loss"]))
    assert totals[3.0] - totals[0.0] == pytest.approx(3 * (totals[1.0] - totals[0.0]), rel=1e-5)
    assert totals[1.0] - totals[0.0] == pytest.approx(2 * float(extras["class_loss"]), rel=1e-5)


def test_a_share_of_the_prompts_is_left_empty(make_recipe: Any) -> None:
    backbone: Any = load_backbone(make_recipe().base, "cpu")
    album = Album(instance_pictures(make_recipe().pictures, "dog"), 16)
    rows: Any = [Lesson("dog", PROMPT, "", 0)] * 40

    def of_a_step(prompt_dropout: float) -> tuple[list[str], float]:
        loss = PictureLoss(backbone, album, prior_weight=1.0, text_encoder=False, prompt_dropout=prompt_dropout)
        encode, asked = loss.conditioning.__call__, list[str]()
        loss.conditioning = lambda prompts: (asked.extend(prompts), encode(prompts))[1]  # type: ignore[assignment]
        torch.manual_seed(0)
        return asked, float(loss(rows, StepContext(1, accelerator_for("cpu"))).sum)

    never, some = of_a_step(0.0), of_a_step(0.25)
    assert never[0] == [PROMPT] * 40
    assert set(some[0]) == {PROMPT, ""}
    assert 4 <= some[0].count("") <= 16
    assert some[1] != pytest.approx(never[1], rel=1e-6)
    # The noise is the same: what else a step draws does not depend on the share.
    backbone.encode = lambda prompts, size: type(backbone).encode(backbone, [PROMPT] * len(prompts), size=size)
    assert of_a_step(0.25)[1] == pytest.approx(never[1], rel=1e-6)


def test_prompts_left_empty_are_the_same_again_and_are_not_probed(make_recipe: Any) -> None:
    settings = {"pictures": {"prompt_dropout": 0.5}}
    runs = [make_recipe(output=name, **copy.deepcopy(settings)) for name in ("a", "b")]
    reports = [run_train_lora(recipe) for recipe in (*runs, make_recipe(output="c"))]
    assert weights_of(runs[0]) == weights_of(runs[1])
    # Measured on the prompts themselves, whatever was learned.
    assert reports[0]["denoising"]["base"] == reports[2]["denoising"]["base"]
    assert reports[0]["denoising"]["lora"] != reports[2]["denoising"]["lora"]


def test_the_loss_of_a_picture_is_the_backbones_own(make_recipe: Any) -> None:
    recipe = make_recipe("sd2")
    backbone: Any = load_backbone(recipe.base, "cpu")
    pictures = instance_pictures(recipe.pictures, "dog")
    album = Album(pictures, backbone.resolution)
    rows: Any = lessons(pictures)
    torch.manual_seed(3)
    ours = PictureLoss(backbone, album, prior_weight=1.0, text_encoder=False)(
        rows, StepContext(1, accelerator_for("cpu"))
    )
    torch.manual_seed(3)
    total, count = backbone.denoise_loss(backbone.collate(pictures))
    assert float(ours.sum) == pytest.approx(float(total), rel=1e-5)
    assert ours.count == int(count)


# -- runs ------------------------------------------------------------------------------------------------------------


def test_the_same_recipe_writes_the_same_bytes_and_another_seed_does_not(make_recipe: Any) -> None:
    runs = [make_recipe(output=name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for recipe in runs:
        run_train_lora(recipe)
    a, b, c = map(weights_of, runs)
    assert a == b
    assert a != c


def test_an_interrupted_run_resumes_to_the_same_bytes(make_recipe: Any) -> None:
    settings = {"pictures": {"crop": "random", "flip": True, "text_encoder": True}, "train": {"steps": 5}}
    whole, cut = make_recipe(output="whole", **copy.deepcopy(settings)), make_recipe(output="cut", **settings)
    run_train_lora(whole)

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train_lora(cut, progress=interrupt)
    assert newest_step(Path(cut.output)) == 3
    assert not Path(cut.output, DIFFUSERS_FILE).exists()
    run_train_lora(cut, resume=True)
    assert weights_of(whole) == weights_of(cut)


def test_a_resumed_run_on_other_pictures_is_refused(make_recipe: Any, dog: Path) -> None:
    recipe = make_recipe(train={"steps": 5})

    def interrupt(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train_lora(recipe, progress=interrupt)
    Image.new("RGB", (24, 24), "green").save(dog / "1.png")
    with pytest.raises(UsageError, match="hash of the training data"):
        run_train_lora(recipe, resume=True)


def test_the_base_is_bit_identical_afterwards(make_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(pictures={"text_encoder": True, "gradient_checkpointing": True})
    backbone: Any = load_backbone(recipe.base, "cpu")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    monkeypatch.setattr("molecli.images.train_lora.load_backbone", lambda *_: backbone)
    run_train_lora(recipe)
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(make_recipe: Any, tmp_path: Path) -> None:
    whole, killed = (make_recipe(output=name, train={"steps": 200}) for name in ("whole", "killed"))
    run_train_lora(whole)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(killed))
    command = [sys.executable, "-m", "molecli", "train-lora", str(file), "--output", killed.output]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, "--overwrite"], env=env)
    while (newest_step(Path(killed.output)) or 0) < 3:
        assert process.poll() is None, "it finished before it could be killed"
    process.kill()
    process.wait()
    assert 3 <= (newest_step(Path(killed.output)) or 0) < 200
    subprocess.run([*command, "--resume"], env=env, check=True, timeout=300)
    assert weights_of(whole) == weights_of(killed)


@pytest.mark.slow
def test_two_processes_train_one_lora_and_draw_the_class_once(make_recipe: Any, tmp_path: Path) -> None:
    classes = {"class_prompt": CLASS_PROMPT, "class_pictures": 3}
    two = make_recipe(output="two", pictures=classes, train={"steps": 4, "batch_size": 4})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(two))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, "-m", "molecli", "train-lora", str(file), "--output", two.output]
    subprocess.run(command, env=env, check=True, timeout=300)
    one = make_recipe(output="one", pictures=classes)
    run_train_lora(one)
    drawn = [sorted(Path(recipe.output, "class_pictures").iterdir()) for recipe in (one, two)]
    assert [file.name for file in drawn[0]] == [file.name for file in drawn[1]]
    assert all(np.array_equal(Image.open(a), Image.open(b)) for a, b in zip(*drawn, strict=True))
    records = [json.loads(line) for line in Path(two.output, "train_log.jsonl").read_text().splitlines()]
    assert [record["count"] for record in records] == [4.0] * 4
    assert load_file(Path(two.output, DIFFUSERS_FILE))


@pytest.mark.slow
@pytest.mark.skipif(not DREAMBOOTH.is_dir(), reason="the shared photographs are not here")
def test_real_photographs_train(make_recipe: Any) -> None:
    pictures = {"instance_dir": str(DREAMBOOTH / "dog6"), "resolution": 64, "class_prompt": CLASS_PROMPT}
    report = run_train_lora(make_recipe(pictures={**pictures, "class_pictures": 2}, train={"steps": 2}))
    assert report["pictures"] == len(list((DREAMBOOTH / "dog6").iterdir()))
    assert report["resolution"] == 64


# -- the class -------------------------------------------------------------------------------------------------------


def test_missing_class_pictures_are_drawn_with_the_base_and_kept(make_recipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    classes = {"class_prompt": CLASS_PROMPT, "class_dir": str(folder), "class_pictures": 3}
    told: list[tuple[str, int, int]] = []
    recipe = make_recipe(pictures=classes, output="a")
    report = run_train_lora(recipe, progress=lambda *told_of: told.append(told_of))
    assert report["class_pictures"] == 3
    assert [entry for entry in told if entry[0] == "class pictures"] == [("class pictures", i, 3) for i in (1, 2, 3)]
    drawn = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(drawn) == ["00000.png", "00001.png", "00002.png"]
    backbone: Any = load_backbone(recipe.base, "cpu")
    (again,) = backbone.generate([CLASS_PROMPT], seeds=[1], steps=25, height=16, width=16)
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(folder / "00001.png")))
    log = Path(recipe.output, "train_log.jsonl").read_text().splitlines()[0]
    assert {"instance_loss", "class_loss"} <= set(json.loads(log))

    (folder / "00001.png").unlink()
    run_train_lora(make_recipe(pictures=classes, output="b"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == drawn


def test_ones_own_class_pictures_are_taken_first(make_recipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "mine.jpg")
    classes = {"class_prompt": CLASS_PROMPT, "class_dir": str(folder), "class_pictures": 2}
    run_train_lora(make_recipe(pictures=classes))
    assert sorted(file.name for file in folder.iterdir()) == ["00000.png", "mine.jpg"]


def test_interrupted_drawing_keeps_what_is_drawn(make_recipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    classes = {"class_prompt": CLASS_PROMPT, "class_dir": str(folder), "class_pictures": 3}

    def interrupt(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train_lora(make_recipe(pictures=classes, train={"batch_size": 1}), progress=interrupt)
    assert [file.name for file in folder.iterdir()] == ["00000.png"]


def test_class_pictures_drawn_for_another_prompt_are_refused(make_recipe: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "class")
    run_train_lora(make_recipe(pictures={"class_prompt": CLASS_PROMPT, "class_dir": folder, "class_pictures": 1}))
    other = {"class_prompt": "a cat", "class_dir": folder, "class_pictures": 1}
    with pytest.raises(UsageError) as caught:
        run_train_lora(make_recipe(pictures=other, output="b"))
    assert str(caught.value) == (
        f"{folder}/00000.png: it was drawn for the prompt 'a photo', and this run's prompt is 'a cat'. Name another "
        "--class-dir."
    )


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pictures": {"class_pictures": 4}},
            "pictures.class_pictures: the class has no prompt, and it is not learned without one. "
            'Write --class-prompt "a photo of a dog".',
        ),
        (
            {"pictures": {"class_dir": "x"}},
            "pictures.class_dir: the class has no prompt, and it is not learned without one. "
            'Write --class-prompt "a photo of a dog".',
        ),
        (
            {"pictures": {"class_prompt": PROMPT}},
            "pictures.class_prompt: it is the same as the instance prompt, so the class would hide the subject. "
            'Leave the rare token out: "a photo of a dog".',
        ),
        (
            {"pictures": {"class_prompt": " "}},
            'pictures.class_prompt: it is empty. Write for example "a photo of a dog".',
        ),
        (
            {"data": {"suite": "bbh"}},
            "data.suite: a suite's tasks train a language model, and pictures a diffusion pipeline. "
            "Leave it out, or leave out --instance-dir.",
        ),
        (
            {"data": {"limit": 3}},
            "data.limit: a suite's tasks train a language model, and pictures a diffusion pipeline. "
            "Leave it out, or leave out --instance-dir.",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_the_base_loads(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, changes: Any, message: str
) -> None:
    monkeypatch.setattr("molecli.images.train_lora.load_backbone", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UsageError) as caught:
        run_train_lora(make_recipe(**changes))
    assert str(caught.value) == message


def test_the_class_s_folder_is_not_the_subject_s(make_recipe: Any, dog: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_train_lora(make_recipe(pictures={"class_prompt": CLASS_PROMPT, "class_dir": str(dog)}))
    message = "it is the folder of the subject's own pictures. Name another folder; it may be empty."
    assert str(caught.value) == f"pictures.class_dir: {message}"


def test_a_broken_picture_is_named_before_the_base_loads(
    make_recipe: Any, dog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molecli.images.train_lora.load_backbone", lambda *_: pytest.fail("loaded"))
    (dog / "2.png").write_bytes((dog / "1.png").read_bytes()[:50])
    with pytest.raises(MismatchError, match=r"2\.png: "):
        run_train_lora(make_recipe())


def test_pictures_on_a_language_model_and_a_pipeline_without_pictures(
    make_recipe: Any, tiny_folder: Callable[..., Path]
) -> None:
    text = tiny_folder("t5")
    with pytest.raises(UsageError) as caught:
        run_train_lora(make_recipe(base={"id": str(text)}))
    assert str(caught.value) == (
        f"base {text}: it is a language model, and pictures train a diffusion pipeline. "
        "Name a pipeline with --base, or leave out --instance-dir."
    )
    recipe = make_recipe().model_copy(update={"pictures": None})
    with pytest.raises(UsageError) as caught:
        run_train_lora(recipe)
    assert str(caught.value) == (
        f"base {recipe.base.id}: a diffusion pipeline learns from pictures, and none are given. "
        'Write --instance-dir DIR --instance-prompt "a photo of sks".'
    )


def test_what_is_cut_of_a_long_prompt_is_said_once(make_recipe: Any) -> None:
    recipe = make_recipe(pictures={"instance_prompt": "a photo of sks in the snow", "text_encoder": True})
    said: list[str] = []
    run_train_lora(recipe, note=said.append)
    assert said == ["the text encoder reads only 16 tokens, and the prompt is longer. Left out: 'he snow'"]


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"])
def test_a_broken_picture_of_the_class_is_named(make_recipe: Any, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "a.png").write_bytes(content)
    with pytest.raises(MismatchError, match=r"a\.png: "):
        run_train_lora(
            make_recipe(pictures={"class_prompt": CLASS_PROMPT, "class_dir": str(folder), "class_pictures": 1})
        )
