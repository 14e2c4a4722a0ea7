"""The scripts that build the embedded image default, at tiny sizes: scenes, captions, tokenizer, recogniser."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from transformers import CLIPTokenizer  # noqa: E402

from molecli.errors import UsageError  # noqa: E402
from molecli.metrics.recogniser import Recogniser, RecogniserNet, load_recogniser, save_recogniser  # noqa: E402
from tools.image_builtin import scenes  # noqa: E402
from tools.image_builtin.__main__ import parser  # noqa: E402
from tools.image_builtin.augment import decoys  # noqa: E402
from tools.image_builtin.batches import Batch, World  # noqa: E402
from tools.image_builtin.captions import LENGTH, caption, caption_ids, vocabulary  # noqa: E402
from tools.image_builtin.concepts import EVERYWHERE, write_concepts  # noqa: E402
from tools.image_builtin.data import Sprites, load_objects  # noqa: E402
from tools.image_builtin.judge import requests  # noqa: E402
from tools.image_builtin.loop import Average, Clock, rate  # noqa: E402
from tools.image_builtin.loras import drawn, lessons_of  # noqa: E402
from tools.image_builtin.tokenizer import build_tokenizer, merges_for, split  # noqa: E402
from tools.image_builtin.unet import noise_levels  # noqa: E402

OBJECTS = load_objects()
KINDS = len(OBJECTS.words)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CLIPTokenizer]:
    folder = tmp_path_factory.mktemp("work") / "tokenizer"
    build_tokenizer(vocabulary(OBJECTS), LENGTH, folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def world(tokenizer: CLIPTokenizer) -> World:
    """Pictures of one flat colour each, so that a scene tells what was drawn."""
    named = torch.ones(2 * KINDS, 4, 64, 64)
    named[:, :3] = palette()[:, :, None, None]
    ids = caption_ids(OBJECTS, tokenizer.get_vocab(), "cpu")
    return World(OBJECTS, named, named[:3], named[: len(OBJECTS.base)], ids)


def palette() -> torch.Tensor:
    """A colour [2 * objects, 3] for every picture, all different."""
    row = torch.arange(2 * KINDS)
    return torch.stack([row % 5 / 4, row // 5 % 5 / 4, row // 25 / 4], dim=1)


def said(batch: Batch, row: int) -> str:
    words = [OBJECTS.words[int(place)] for place in batch.which[row] if place >= 0]
    return caption(words, OBJECTS.phrases[int(batch.background[row])], OBJECTS.style if batch.flat[row] else "")


def test_words_are_distinct_and_the_held_out_ones_are_no_base_objects() -> None:
    assert len(OBJECTS.base) == 40
    assert len(OBJECTS.concepts) == 8
    assert len(set(OBJECTS.words)) == KINDS
    assert not set(OBJECTS.base.values()) & set(OBJECTS.concepts.values())


def test_pictures_for_the_autoencoder_leave_out_the_concepts_and_the_other_style() -> None:
    books = "1f4da"  # looks like the book, and no word names it
    ids = (*OBJECTS.base.values(), *OBJECTS.concepts.values(), "other", books)
    marks = torch.arange(len(ids))[:, None, None, None].expand(-1, 4, 1, 1)
    sprites = Sprites({"noto": marks, "twemoji": marks + 1000}, ids)
    assert sprites.without(OBJECTS)[:, 0, 0, 0].tolist() == [*range(40), 48, 49]
    assert sprites.without(OBJECTS, named=True)[:, 0, 0, 0].tolist() == [48]


def test_scenes_repeat_with_their_seed_and_differ_with_another(world: World) -> None:
    first, again, other = (world.draw(scenes.seeded(seed, "cpu"), 4).images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 64, 64)
    assert first.min() >= 0
    assert first.max() <= 1


def test_base_scenes_hold_one_to_three_base_objects_and_never_a_concept_or_the_style(world: World) -> None:
    batch = world.draw(scenes.seeded(3, "cpu"), 400)
    present = batch.which[batch.which >= 0]
    assert set((batch.which >= 0).sum(1).tolist()) == {1, 2, 3}
    assert set(present.tolist()) == set(range(40))
    assert not batch.flat.any()


def test_captions_name_what_is_drawn(world: World) -> None:
    batch = world.draw(scenes.seeded(4, "cpu"), 40, shares=(1.0,), allowed=world.all(), flat=0.5)
    for row in range(40):
        text = said(batch, row)
        word = next(word for word in text.split() if word in OBJECTS.words)
        picture = OBJECTS.words.index(word) + KINDS * (" in flat style " in text)
        colour = palette()[picture][:, None, None]
        drawn = ((batch.images[row] - colour).abs().amax(0) < 1e-3).sum()
        # A square of at least 26 pixels, tilted by 12 degrees at most.
        assert drawn > 500, text


def test_pictures_lie_apart_where_there_is_room(world: World) -> None:
    which = torch.tensor([[0, 1]] * 200)
    layout = scenes.arrange(scenes.seeded(5, "cpu"), which)
    gap = (layout.centre[:, 0] - layout.centre[:, 1]).abs()
    reach = layout.size.mean(1, keepdim=True)
    overlap = (reach - gap).clamp_min(0).prod(-1) / layout.size.amin(1) ** 2
    assert overlap.mean() < 0.05
    assert (layout.centre - layout.size[..., None] / 2).min() >= -1e-4
    assert (layout.centre + layout.size[..., None] / 2).max() <= 64 + 1e-4


def test_caption_grammar() -> None:
    assert caption(["owl"], "on a red background") == "an owl on a red background"
    assert caption(["dog", "key", "owl"], "", "flat") == "a dog, a key and an owl in flat style"


def test_every_word_is_one_token_and_others_fall_to_letters(tokenizer: CLIPTokenizer) -> None:
    for word in vocabulary(OBJECTS):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    pieces = tokenizer.tokenize("xylophone 7!")
    assert "".join(pieces).replace("</w>", "") == "xylophone7!"
    assert len(pieces) > 3
    assert tokenizer.model_max_length == LENGTH


def test_merges_keep_every_word_whole_whatever_their_order() -> None:
    words = [*vocabulary(OBJECTS)]
    for seed in range(3):
        random.Random(seed).shuffle(words)
        merges = merges_for(words)
        assert all(len(split(word, merges)) == 1 for word in words)


def test_ids_made_on_the_device_are_the_tokenizers(world: World, tokenizer: CLIPTokenizer) -> None:
    batch = world.draw(scenes.seeded(6, "cpu"), 64, shares=(0.2,) * 5, allowed=world.all(), flat=0.5)
    texts = [said(batch, row) for row in range(64)]
    expected = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    assert torch.equal(world.ids(batch.which, batch.background, batch.flat), expected)
    empty = tokenizer([""], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    assert torch.equal(world.ids.empty(1), empty)


def test_decoys_are_pictures_of_nothing_whole(world: World) -> None:
    sprites = world.named[:8]
    fakes = decoys(sprites, scenes.seeded(7, "cpu"), 16)
    assert fakes.shape == (16, 4, 64, 64)
    assert fakes[4:8, 3].mean((1, 2)).max() < 0.5  # less than half is left of a cut one


def test_concept_pictures_have_prompts_and_different_backgrounds(world: World, tmp_path: Path) -> None:
    write_concepts(world, tmp_path)
    kinds = len(OBJECTS.phrases)
    for name in OBJECTS.concepts:
        prompts = json.loads((tmp_path / name / "prompts.json").read_text("utf-8"))
        assert set(prompts) == {path.name for path in (tmp_path / name).glob("*.png")}
        assert all(name in prompt.split() for prompt in prompts.values())
        told = [prompt.split(" on ", 1) for prompt in prompts.values()]
        alone = {place for things, place in told if " and " not in things}
        beside = {place for things, place in told if " and " in things}
        everywhere = name in EVERYWHERE
        half = kinds if everywhere else 3
        assert len(prompts) == 2 * half
        assert len(alone) == len(beside) == half
        assert alone == beside if everywhere else not alone & beside
    styled = json.loads((tmp_path / OBJECTS.style / "prompts.json").read_text("utf-8"))
    assert {prompt.split()[1] for prompt in styled.values()} == set(OBJECTS.base)
    assert all("in flat style" in prompt for prompt in styled.values())
    assert "CC-BY 4.0" in (tmp_path / "ATTRIBUTION.md").read_text("utf-8")


def test_a_first_seed_gives_other_pictures_to_judge() -> None:
    first, other = requests(OBJECTS, 1, 3), requests(OBJECTS, 1, 3, first_seed=1000)
    assert [request.seed for request in first] == list(range(len(first)))
    assert [request.seed for request in other] == list(range(1000, 1000 + len(first)))
    assert [request.prompt for request in first] != [request.prompt for request in other]


def test_pictures_of_a_lora_have_seeds_from_the_first_and_the_guidance_that_is_asked_for() -> None:
    told: list[tuple[list[int], float]] = []

    class Easel:
        def generate(self, prompts: list[str], *, seeds: list[int], guidance: float, **more: Any) -> list[Any]:
            told.append((seeds, guidance))
            return [Image.new("RGB", (8, 8), (seed, 0, 255)) for seed in seeds]

    images = drawn(Easel(), ["a"] * 5, 3.5, 20, batch=2)  # type: ignore[arg-type]
    assert told == [([20, 21], 3.5), ([22, 23], 3.5), ([24], 3.5)]
    assert images.shape == (5, 3, 8, 8)
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [20, 21, 22, 23, 24]


def test_some_loras_are_named_and_a_wrong_name_is_said() -> None:
    assert [lesson.name for lesson in lessons_of(frozenset({"teapot", "flat"}))] == ["teapot", "flat"]
    assert [lesson.name for lesson in lessons_of(frozenset())] == [*OBJECTS.concepts, "flat"]
    with pytest.raises(UsageError, match=r"--only violon: there is no LoRA of this name\. Did you mean 'violin'\?"):
        lessons_of(frozenset({"violon"}))


def test_pictures_are_judged_at_the_bases_guidance_unless_told() -> None:
    assert (parser().parse_args(["judge-loras"]).guidance, parser().parse_args(["judge"]).first_seed) == (2.5, 0)
    told = parser().parse_args(["judge-loras", "--guidance", "4", "--first-seed", "5000"])
    assert (told.guidance, told.first_seed) == (4.0, 5000)


def test_timesteps_are_all_drawn() -> None:
    signal, noise, chance = noise_levels(torch.device("cpu"))
    assert torch.allclose(signal**2 + noise**2, torch.ones(1000), atol=1e-5)
    assert chance.min() > 1e-4
    assert chance.sum().item() == pytest.approx(1, abs=1e-4)


def test_average_of_weights_follows_them_and_swaps() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    average = Average([weight], 0.5)
    weight.data.fill_(1.0)
    for _ in range(20):
        average.update()
    average.swap()
    assert 0.99 < weight.item() < 1
    average.swap()
    assert weight.item() == 1


def test_the_clock_ends_after_its_steps_and_the_rate_falls() -> None:
    clock = Clock(1.0, "test", max_steps=3)
    steps = 0
    while clock.running():
        steps += 1
    assert steps == 3
    assert rate(0.0, 1.0) < rate(0.03, 1.0)
    assert rate(1.0, 1.0) == pytest.approx(0.02)


def test_a_saved_recogniser_gives_the_same_probabilities(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Recogniser(RecogniserNet(3), ["a", "b", "flat style"], [0.3, 0.4, 0.5], 64)
    save_recogniser(made, tmp_path)
    read = load_recogniser(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    assert read.classes == ("a", "b", "flat style")
    assert torch.allclose(read(images), made(images), atol=5e-3)
    assert torch.equal(read.found(images), read(images) > torch.tensor([0.3, 0.4, 0.5]))
    assert read(torch.rand(1, 3, 100, 80)).shape == (1, 3)


def test_what_is_wrong_with_a_recognisers_folder_or_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it has no config\.json"):
        load_recogniser(tmp_path)
    save_recogniser(Recogniser(RecogniserNet(2), ["a", "b"], [0.5, 0.5], 64), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "classes": ["a"]}), "utf-8")
    with pytest.raises(UsageError, match="not a recogniser"):
        load_recogniser(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UsageError, match=r"batch, 3, height, width"):
        load_recogniser(tmp_path)(torch.rand(3, 64, 64))
