"""A pipeline's weights are found in every form in which they are published, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from original_checkpoint import assert_same_weights, write_checkpoint
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_pipelines import build_pipeline, build_unet

from molecli.bases.pipeline_loading import load_pipeline, load_pipeline_skeleton
from molecli.bases.weight_files import variant_of, variants
from molecli.files.base_source import BaseSource


def base(path: Path) -> Any:
    return SimpleNamespace(id=str(path), gguf_file=None, dtype="auto", chat_template=True, revision=None)


def loaded(path: Path) -> Any:
    return load_pipeline(base(path), "cpu", torch.float32)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build_pipeline("sd")


@pytest.fixture
def folder(pipe: Any, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("model-00001-of-00002.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model.safetensors.index.json", None),
        ("model.safetensors.index.bf16.json", "bf16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
    ],
)
def test_the_variant_in_a_name(name: str, variant: str | None) -> None:
    assert variants([name, "config.json", "flax_model.msgpack"]) == {variant}


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "40KB"}, {"safe_serialization": False}])
def test_what_save_pretrained_writes(options: dict[str, Any], pipe: Any, tmp_path: Path) -> None:
    if options.get("safe_serialization") is False:
        pipe.save_pretrained(tmp_path / "base")
        pipe.unet.save_pretrained(tmp_path / "base" / "unet", **options)
        (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    else:
        pipe.save_pretrained(tmp_path / "base", **options)
    files = [file.name for file in (tmp_path / "base" / "unet").iterdir()]
    assert not any(name == "diffusion_pytorch_model.safetensors" for name in files)
    assert_same_weights(loaded(tmp_path / "base").pipe, pipe)


def test_a_folder_in_which_only_some_parts_are_a_variant(pipe: Any, folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(folder / "unet", variant="fp16")
    assert_same_weights(loaded(folder).pipe, pipe)


def test_several_variants_are_not_chosen_from(pipe: Any, folder: Path) -> None:
    for variant in ("fp16", "non_ema"):
        pipe.unet.save_pretrained(folder / "unet", variant=variant)
    assert_same_weights(loaded(folder).pipe, pipe)  # the plain ones are there
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(lambda: loaded(folder), 2, "its unet has only weights of the variants fp16, non_ema", "Keep the files")


@pytest.mark.parametrize("listed", [True, False])
def test_a_variant_on_the_hub_and_in_its_cache(listed: bool, tmp_path: Path, monkeypatch: Any) -> None:
    names = ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"]

    def files(self: Any, repository: str, revision: str | None = None) -> list[str]:
        if not listed:
            raise ConnectionError
        return names

    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    source = BaseSource("org/base", "org/base", local=False, pipeline=True)
    assert [variant_of(source, part) for part in ("unet", "vae", "text_encoder")] == ["fp16", None, None]


@pytest.mark.parametrize(
    "kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"]
)
def test_pipelines_of_the_same_parts(kind: str, pipe: Any, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    assert_same_weights(loaded(folder).pipe, pipe)


def test_an_inpainting_unet_is_named(folder: Path) -> None:
    build_unet("sd").from_config(build_unet("sd").config, in_channels=9).save_pretrained(folder / "unet")
    for load in (lambda: loaded(folder), lambda: load_pipeline_skeleton(base(folder))):
        refused(load, 2, "it is an inpainting model (its UNet reads 9 channels", "mole sample --mask-image")


def test_the_refiner_is_named(tmp_path: Path) -> None:
    build_pipeline("sdxl").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(lambda: loaded(tmp_path), 2, "it is the SDXL refiner")


# One file


@pytest.fixture
def settings(pipe: Any, tmp_path: Path) -> Path:
    return settings_of(pipe, tmp_path / "x")


def settings_of(pipe: Any, folder: Path) -> Path:
    """The folder with the pipeline's tokenizer and configurations, and no weights."""
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def test_a_checkpoint_of_sdxl(tmp_path: Path) -> None:
    pipe = build_pipeline("sdxl")
    settings_of(pipe, tmp_path / "x")
    assert_same_weights(loaded(write_checkpoint(pipe, tmp_path / "x.safetensors")).pipe, pipe)


def test_a_checkpoint_beside_its_settings(pipe: Any, settings: Path) -> None:
    file = write_checkpoint(pipe, settings.with_suffix(".safetensors"))
    backbone = loaded(file)
    assert_same_weights(backbone.pipe, pipe)
    skeleton = load_pipeline_skeleton(base(file))
    assert set(dict(skeleton.named_parameters())) == set(dict(backbone.model.named_parameters()))
    (ours,) = backbone.generate(["a cat"], seeds=[1], steps=2, guidance=4.0, latent=True)
    (theirs,) = type(backbone)(pipe).generate(["a cat"], seeds=[1], steps=2, guidance=4.0, latent=True)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("said", [{"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, "metadata"])
def test_what_the_file_says_of_its_prediction_counts(said: Any, pipe: Any, settings: Path) -> None:
    metadata = {"modelspec.prediction_type": "v"} if said == "metadata" else None
    file = write_checkpoint(
        pipe, settings.with_suffix(".safetensors"), metadata=metadata, **({} if said == "metadata" else said)
    )
    config = loaded(file).pipe.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr == (said != "metadata")


def test_without_its_settings_it_says_how_to_convert(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = write_checkpoint(pipe, tmp_path / "style.safetensors")
    what = "its tokenizer and configuration are those of stable-diffusion-v1-5/stable-diffusion-v1-5"
    remedy = f"P.from_single_file('{file}').save_pretrained('{tmp_path / 'style'}')"
    for load in (lambda: loaded(file), lambda: load_pipeline_skeleton(base(file))):
        refused(load, 1, what, remedy, f"Then write --base {tmp_path / 'style'}.")


def renamed(file: Path, old: str, new: str) -> None:
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)


def test_a_file_of_stable_diffusion_2_must_say_what_it_predicts(pipe: Any, tmp_path: Path) -> None:
    file = write_checkpoint(pipe, tmp_path / "x.safetensors")
    renamed(file, "cond_stage_model.transformer.", "cond_stage_model.model.transformer.")
    refused(lambda: loaded(file), 2, "does not say whether its UNet predicts noise or velocity", str(tmp_path / "x"))


def test_a_file_that_lacks_weights(pipe: Any, settings: Path) -> None:
    file = write_checkpoint(pipe, settings.with_suffix(".safetensors"))
    tensors = load_file(file)
    del tensors["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(tensors, file)
    refused(lambda: loaded(file), 3, str(file))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["unet.mid_block.lora_A.weight"], "it is a LoRA, not a base model"),
        (["model.diffusion_model.out.2.weight"], "it holds a UNet without its text encoder or VAE"),
        (["model.layers.0.mlp.weight"], "it is a file, not a folder"),
        (
            ["model.diffusion_model.double_blocks.0.weight", "first_stage_model.a", "cond_stage_model.a"],
            "it is a checkpoint of another kind than Stable Diffusion",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.a", "conditioner.embedders.0.model.a"],
            "it is the SDXL refiner",
        ),
    ],
)
def test_other_files_are_named(keys: list[str], what: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(4, 4, 1, 1) for key in keys}, tmp_path / "x.safetensors")
    refused(lambda: loaded(tmp_path / "x.safetensors"), 2, what)


def test_an_inpainting_file_and_pickles(tmp_path: Path) -> None:
    keys = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.a", "cond_stage_model.a"]
    save_file({key: torch.ones(4, 9, 1, 1) for key in keys}, tmp_path / "x.safetensors")
    refused(lambda: loaded(tmp_path / "x.safetensors"), 2, "it is an inpainting model")
    (tmp_path / "x.ckpt").write_bytes(b"")
    refused(lambda: loaded(tmp_path / "x.ckpt"), 2, "it is a pickle", "Write the .safetensors file")
