"""Collages: drawn from the step's own random numbers, holding the pictures that their prompts name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from molecli.files.concepts import Concept
from molecli.images.collage import Collages, lay_out
from molecli.images.pictures import Album
from molecli.protocols import Picture

SIDE = 16
SCENES = {"cat": ["on red", "on blue"], "hat": ["on blue", "on sand"], "owl": ["on snow"], "sea": ["at dusk"]}
CONCEPTS = {name: Concept(name, f"a {name}", name, "background" if name == "sea" else "object") for name in SCENES}


@pytest.fixture
def collages(tmp_path: Path) -> Collages:
    """Two cats, two hats, an owl, a sea; every picture in a grey of its own."""
    pictures = []
    for name, scenes in SCENES.items():
        for scene in scenes:
            file = tmp_path / f"{len(pictures)}.png"
            Image.new("RGB", (SIDE, SIDE), (40 * len(pictures) + 20,) * 3).save(file)
            pictures.append(Picture(name, f"a {name} {scene}", str(file)))
    return Collages(Album(pictures, SIDE), CONCEPTS)


def greys(pixels: torch.Tensor) -> set[int]:
    return {round(float(value)) for value in ((pixels + 1) * 127.5).unique()}


def test_the_prompt_names_what_is_shown(collages: Collages) -> None:
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        drawn = collages.draw(0)
        assert 0 in drawn.places
        tasks = [collages.album.pictures[place].task for place in drawn.places]
        assert len(set(tasks)) == len(tasks) in (2, 3)
        named = sorted(tasks, key=lambda task: drawn.prompt.index(f"a {task}"))
        assert named == tasks
        assert greys(collages.pixels(drawn)) == {40 * place + 20 for place in drawn.places}
        seen.add(tuple(tasks))
    assert {len(tasks) for tasks in seen} == {2, 3}
    assert len(seen) > 4
    assert not any("sea" in tasks for tasks in seen)


def test_a_scene_is_named_where_all_share_it_and_shared_where_it_can_be(collages: Collages) -> None:
    torch.manual_seed(0)
    drawn = [collages.draw(1) for _ in range(40)]
    pairs = {collage.prompt for collage in drawn if collage.places in ((1, 2), (2, 1))}
    assert pairs == {"a cat and a hat on blue", "a hat and a cat on blue"}
    assert not any(3 in collage.places for collage in drawn)  # the other hat has another scene
    assert all("on" not in collage.prompt.split() for collage in drawn if 4 in collage.places)


def test_collages_follow_the_seed(collages: Collages) -> None:
    def several(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [collages.pixels(collages.draw(0)) for _ in range(8)]

    assert all(map(torch.equal, several(1), several(1)))
    assert not all(map(torch.equal, several(1), several(2)))


def test_only_things_beside_other_things_can_be_held(collages: Collages) -> None:
    assert [collages.can_hold(place) for place in range(6)] == [True] * 5 + [False]
    album = Album(collages.album.pictures[:2], SIDE)
    assert not Collages(album, CONCEPTS).can_hold(0)


def gradients(count: int) -> torch.Tensor:
    """Pictures that are brighter below, each in a range of its own."""
    ramp = torch.linspace(0, 0.1, SIDE).view(1, 1, SIDE, 1).expand(count, 3, SIDE, SIDE)
    return ramp + torch.arange(count).view(-1, 1, 1, 1).float()


@pytest.mark.parametrize("count", [2, 3])
def test_every_picture_stays_upright_and_whole(count: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        whole = lay_out(gradients(count))
        assert whole.shape == (3, SIDE, SIDE)
        assert bool(((whole[:, 1:] - whole[:, :-1]) > -1e-6).float().mean() > 0.5)
        for i in range(count):
            own = (whole >= i - 1e-6) & (whole < i + 0.5)
            rows = whole[own].unique()
            assert len(rows) == SIDE // 2  # every row of the picture at half its size
            assert int(own[0].sum()) >= (SIDE // 2) ** 2


def test_the_rest_of_a_half_goes_on_as_the_picture_s_edge() -> None:
    torch.manual_seed(0)
    pictures = torch.stack([torch.full((3, SIDE, SIDE), value) for value in (0.25, 0.75)])
    assert set(lay_out(pictures).unique().tolist()) == {0.25, 0.75}
    shares = [float((lay_out(pictures) == 0.25).float().mean()) for _ in range(10)]
    assert shares == [0.5] * 10
