"""CLIP through open_clip: its own numbers, gradients to the pixels, and messages where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import SIZE, build_tiny_clip
from torch import Tensor

from molecli.catalog.builtin import package_folder
from molecli.config import ClipConfig
from molecli.errors import MismatchError, UsageError
from molecli.metrics.clip import Clip, load_clip, source_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(ClipConfig(model=str(folder)))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.stack([np.sin(5 * x + seed), np.cos(7 * y), np.sin(3 * x * y + 1)], -1) * 0.4 + 0.5
    return Image.fromarray(((waves + 0.05 * rng.standard_normal(waves.shape)).clip(0, 1) * 255).astype(np.uint8))


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def theirs(folder: Path) -> tuple[Any, Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("side", [SIZE, 64, 101, 20])
def test_square_pictures_have_the_features_that_open_clip_computes(folder: Path, clip: Clip, side: int) -> None:
    model, preprocess, _ = theirs(folder)
    image = picture(side, side)
    with torch.no_grad():
        expected = model.encode_image(preprocess(image)[None], normalize=True)
    assert torch.allclose(clip.images(pixels(image)), expected, atol=1e-3)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(50, 81), (97, 40), (30, 31)])
def test_every_resize_mode_prepares_pictures_as_open_clip_does(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    folder = build_tiny_clip(tmp_path, resize_mode=mode)
    _, preprocess, _ = theirs(folder)
    image = picture(*size)
    mine, other = load_clip(ClipConfig(model=f"local-dir:{folder}")).prepared(pixels(image))[0], preprocess(image)
    assert mine.shape == other.shape
    assert (mine - other).abs().mean() < 0.02  # Pillow rounds to whole colours between its two passes
    assert (mine - other).abs().max() < 0.1


def test_texts_have_the_features_that_open_clip_computes(folder: Path, clip: Clip) -> None:
    model, _, tokenizer = theirs(folder)
    texts = ["a cat", "a hat on a cat"]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True)
    found = clip.texts(texts)
    assert torch.allclose(found, expected, atol=1e-6)
    assert found[0] @ found[1] < 0.99


def test_vectors_have_length_one(clip: Clip) -> None:
    batch = torch.rand(3, 3, 40, 40)
    assert torch.allclose(clip.images(batch).norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(clip.texts(["a", "b"]).norm(dim=-1), torch.ones(2), atol=1e-5)


def test_pixels_get_a_gradient_and_the_clip_none(clip: Clip) -> None:
    x = torch.rand(2, 3, 48, 48, requires_grad=True)
    (clip.images(x) @ clip.texts(["a cat"]).T).sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert not clip.texts(["a cat"]).requires_grad
    assert all(p.grad is None for p in clip.model.parameters())


def test_a_batch_has_the_vectors_of_its_pictures_alone(clip: Clip) -> None:
    batch = torch.rand(3, 3, 40, 40)
    alone = torch.cat([clip.images(batch[i : i + 1]) for i in range(3)])
    assert torch.allclose(clip.images(batch), alone, atol=1e-5)


def test_a_named_model_loads_from_a_local_file_of_weights(tmp_path: Path) -> None:
    shape = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "mole-test.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "mole-test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("mole-test").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    clip = load_clip(ClipConfig(model="mole-test", pretrained=str(tmp_path / "weights.safetensors")))
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("mole-test")(["a cat"]), normalize=True)
    assert torch.allclose(clip.texts(["a cat"]), expected, atol=1e-6)


def test_the_default_fits_the_base() -> None:
    assert source_of(ClipConfig()).name == "ViT-L-14/openai"
    assert source_of(ClipConfig(pretrained="laion2b_s32b_b82k")).name == "ViT-L-14/laion2b_s32b_b82k"


def test_results_name_a_clip_as_the_user_did(folder: Path, clip: Clip) -> None:
    assert clip.name == str(folder)
    if (package_folder() / "builtin" / "tiny-clip").is_dir():
        assert source_of(ClipConfig(), builtin=True).name == "builtin:tiny-clip"


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s32b_b82k", False)])
def test_weights_get_the_gelu_that_they_were_trained_with(
    monkeypatch: pytest.MonkeyPatch, tag: str, quick: bool
) -> None:
    asked: dict[str, Any] = {}

    def create(*arguments: Any, **options: Any) -> Any:
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(UsageError):
        load_clip(ClipConfig(model="ViT-L-14", pretrained=tag))
    assert asked["force_quick_gelu"] is quick


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "ViT-B-33"}, "CLIP ViT-B-33: open_clip has no such model, and there is no such folder. Did you"),
        ({"model": "ViT-B-32"}, "CLIP ViT-B-32: its weights are not named. Write --clip-pretrained, one of: o"),
        ({"model": "ViT-B-32", "pretrained": "opena"}, "CLIP ViT-B-32: 'opena' is neither one of its tags nor a file."),
        ({"model": "builtin:big"}, "CLIP builtin:big: no such built-in CLIP. Known: "),
        ({"model": "local-dir:nowhere"}, "CLIP local-dir:nowhere: no such folder. Write a folder in open_clip's form"),
        (
            {"model": "hf-hub:a/b", "pretrained": "openai"},
            "clip.pretrained: hf-hub:a/b includes its weights, so that 'openai' would be ignored. Leave it out.",
        ),
    ],
)
def test_what_names_no_clip_is_explained(config: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        source_of(ClipConfig(**config))
    assert str(caught.value).startswith(message)


def test_a_folder_that_is_no_clip_is_explained(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"it has no open_clip_config.json. Write a folder in open_clip's format."):
        source_of(ClipConfig(model=str(tmp_path)))
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(UsageError, match=r"the folder has no weights. Put open_clip_model.safetensors there."):
        source_of(ClipConfig(model=str(tmp_path)))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MismatchError, match="its files cannot be loaded"):
        load_clip(ClipConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    "config", [{"model": "ViT-B-32", "pretrained": "openai"}, {"model": "hf-hub:nobody/no-such-clip"}]
)
def test_weights_that_cannot_be_had_offline_are_explained(config: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_clip(ClipConfig(**config))
    assert "its weights are not in the local cache, and HF_HUB_OFFLINE=1 forbids downloading them" in str(caught.value)
