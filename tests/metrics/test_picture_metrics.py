"""Alignments and recognised concepts: identities on a tiny random CLIP and a recogniser that sees colours."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import build_tiny_clip
from torch import Tensor

from molecli.config import ClipConfig
from molecli.errors import UsageError
from molecli.metrics import load_picture_metric
from molecli.metrics.clip import load_clip
from molecli.metrics.image_batch import Instruments, Shots, pixels_of
from molecli.protocols import Scene


class Colours:
    """Finds "red", "green" and "blue" where that channel's mean is above a half."""

    classes = ("red", "green", "blue")

    def found(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3)) > 0.5


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def instruments(clip_folder: Path, tmp_path: Path) -> Instruments:
    """References: two pictures of "cat", one of "hat"."""
    torch.manual_seed(0)
    for name, count in {"cat": 2, "hat": 1}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = (torch.rand(40, 40, 3) * 255).byte().numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    references = {name: str(tmp_path / name) for name in ("cat", "hat")}
    clip = load_clip(ClipConfig(model=str(clip_folder)))
    return Instruments(clip=lambda: clip, recogniser=Colours, references=references)  # type: ignore[arg-type]


def scene(prompt: str, *loras: str, classes: tuple[str, ...] = ()) -> Scene:
    return Scene("t", prompt, prompt, loras, classes=classes)


def reference(instruments: Instruments, name: str, number: int = 0) -> Tensor:
    with Image.open(Path(instruments.references[name]) / f"{number}.png") as image:
        return pixels_of(image)


def test_the_image_alignment_of_a_concepts_own_picture_is_one(instruments: Instruments) -> None:
    shots = Shots(reference(instruments, "hat")[None], [scene("a", "hat")], instruments)
    assert load_picture_metric("image_alignment")(shots) == [pytest.approx(1.0, abs=1e-5)]


def test_image_alignment_is_the_mean_over_concepts_of_the_mean_over_their_pictures(instruments: Instruments) -> None:
    picture = torch.rand(1, 3, 40, 40)
    clip = instruments.clip
    with torch.no_grad():
        mine = clip.images(picture)[0]
        cats = [float(mine @ clip.images(reference(instruments, "cat", i)[None])[0]) for i in range(2)]
        hat = float(mine @ clip.images(reference(instruments, "hat")[None])[0])
    expected = (sum(cats) / 2 + hat) / 2
    for loras in (("cat", "hat"), ("hat", "cat")):
        scores = load_picture_metric("image_alignment")(Shots(picture, [scene("a", *loras)], instruments))
        assert scores == [pytest.approx(expected, abs=1e-5)]


def test_text_alignment_is_open_clips_own_cosine(instruments: Instruments, clip_folder: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    file = Path(instruments.references["cat"]) / "0.png"
    with torch.no_grad(), Image.open(file) as image:
        seen = model.eval().encode_image(preprocess(image)[None], normalize=True)
        said = model.encode_text(tokenizer(["a cat"]), normalize=True)
    shots = Shots(reference(instruments, "cat")[None], [scene("a cat", "cat")], instruments)
    assert load_picture_metric("text_alignment")(shots) == [pytest.approx(float(seen @ said.T), abs=1e-3)]


@pytest.mark.parametrize("metric", ["text_alignment", "image_alignment", "recognised"])
def test_permuting_scenes_permutes_scores_and_changes_none(instruments: Instruments, metric: str) -> None:
    pixels = torch.rand(3, 3, 40, 40)
    scenes = [scene("a", "cat", classes=("red",)), scene("b", "hat", classes=("red", "blue"))]
    scenes.append(scene("c", "hat", "cat", classes=("green",)))
    order = [2, 0, 1]
    scores = load_picture_metric(metric)(Shots(pixels, scenes, instruments))
    turned = load_picture_metric(metric)(Shots(pixels[order], [scenes[i] for i in order], instruments))
    assert turned == pytest.approx([scores[i] for i in order], abs=1e-5)


def test_recognised_is_the_share_of_the_scenes_classes_that_are_found(instruments: Instruments) -> None:
    red = torch.zeros(1, 3, 16, 16)
    red[:, 0] = 1
    purple = red.clone()
    purple[:, 2] = 1
    scenes = [scene("a", classes=("red", "blue")), scene("b", classes=("red", "blue"))]
    assert load_picture_metric("recognised")(Shots(torch.cat([red, purple]), scenes, instruments)) == [0.5, 1.0]


def test_a_class_that_the_recogniser_lacks_is_an_error(instruments: Instruments) -> None:
    with pytest.raises(UsageError) as caught:
        load_picture_metric("recognised")(Shots(torch.rand(1, 3, 16, 16), [scene("a", classes=("pink",))], instruments))
    assert str(caught.value) == "scene a: the recogniser has no class 'pink'. It knows: red, green, blue."


def test_a_batchs_pictures_are_encoded_once(instruments: Instruments, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    shots = Shots(torch.rand(2, 3, 40, 40), [scene("a", "cat"), scene("b", "hat")], instruments)
    for name in ("cat", "hat"):
        instruments.look(name)
    images = instruments.clip.images
    monkeypatch.setattr(instruments.clip, "images", lambda pixels: calls.append(len(pixels)) or images(pixels))
    load_picture_metric("text_alignment")(shots)
    load_picture_metric("image_alignment")(shots)
    assert calls == [2]
