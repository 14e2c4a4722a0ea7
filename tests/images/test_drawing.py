"""Many pictures, some of which fail: which are drawn, in which batches, and what is said of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from molecli.config import ImageConfig
from molecli.errors import MismatchError, RunError
from molecli.images.drawing import LESS_MEMORY, PictureJob, check_drawn, draw

JOBS = [PictureJob(prompt, seed, f"{prompt}/{seed}") for prompt in ("a", "b", "c") for seed in range(3)]


class Easel:
    """Draws one grey for each (prompt, seed); cannot hold more than `room` pictures, nor draw those in `broken`."""

    def __init__(self, *, room: int = 100, broken: Sequence[tuple[str, int]] = ()) -> None:
        self.room, self.broken = room, set(broken)
        self.batches: list[list[tuple[str, int]]] = []

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        batch = list(zip(prompts, seeds, strict=True))
        self.batches.append(batch)
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        if self.broken & set(batch):
            raise ValueError("a bad picture.\nmore")
        return [Image.new("L", (4, 4), 10 * ord(p) % 200 + s) for p, s in batch]


def drawn(easel: Easel, **options: Any) -> tuple[dict[str, int], list[Any]]:
    """{name: grey} of what was kept, and the failures."""
    kept: dict[str, int] = {}

    def keep(job: PictureJob, picture: Image.Image) -> None:
        kept[job.name] = picture.getpixel((0, 0))  # type: ignore[assignment]

    failures = draw(easel, JOBS, ImageConfig(), keep=keep, **{"batch_size": 4, **options})
    return kept, failures


ALL, _ = drawn(Easel())


def test_every_picture_is_drawn_once_whatever_the_batch() -> None:
    for size in (1, 2, 4, 100):
        easel = Easel()
        kept, failures = drawn(easel, batch_size=size)
        assert kept == ALL
        assert failures == []
        assert [len(batch) for batch in easel.batches][:-1] == [min(size, 9)] * (-(-9 // size) - 1)


def test_a_method_that_looks_at_prompts_is_given_one_at_a_time() -> None:
    told: list[Any] = []
    easel = Easel()

    class Watched(Easel):
        def generate(self, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
            told.append(("drawn", *prompts))
            return easel.generate(prompts, **settings)

    kept, _ = drawn(Watched(), batch_size=2, prepare=lambda prompt: told.append(("prepared", prompt)))
    assert kept == ALL
    expected = [[("prepared", p), ("drawn", p, p), ("drawn", p)] for p in "abc"]
    assert told == [step for steps in expected for step in steps]


def test_what_fails_alone_is_reported_and_costs_no_other_picture() -> None:
    kept, failures = drawn(Easel(broken=[("a", 1), ("c", 2)]))
    assert kept == {name: grey for name, grey in ALL.items() if name not in ("a/1", "c/2")}
    assert [(failure.job.name, failure.reason) for failure in failures] == [
        ("a/1", "ValueError: a bad picture"),
        ("c/2", "ValueError: a bad picture"),
    ]
    with pytest.raises(RunError) as caught:
        check_drawn(failures, 9)
    assert str(caught.value) == (
        "pictures: 2 of 9 pictures could not be drawn (a/1: ValueError: a bad picture). "
        "The others are kept. Run with --verbose for the traceback."
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_batches_that_do_not_fit_are_halved_for_good() -> None:
    easel, notes = Easel(room=1), []
    kept, failures = drawn(easel, note=notes.append)
    assert kept == ALL
    assert failures == []
    assert [len(batch) for batch in easel.batches] == [4, 2] + [1] * 9
    assert notes == [
        "4 pictures at once do not fit in memory: drawing 2 at once",
        "2 pictures at once do not fit in memory: drawing 1 at once",
    ]


def test_where_one_picture_does_not_fit_the_rest_is_not_tried() -> None:
    easel = Easel(room=0)
    kept, failures = drawn(easel, batch_size=1)
    assert (kept, len(easel.batches), len(failures)) == ({}, 1, 9)
    with pytest.raises(RunError) as caught:
        check_drawn(failures, 9)
    what = "9 of 9 pictures could not be drawn (a/0: one picture does not fit in memory)"
    assert str(caught.value) == f"pictures: {what}. {LESS_MEMORY}"


def test_a_mistake_of_the_users_ends_the_run_at_once() -> None:
    class Refusing(Easel):
        def generate(self, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
            raise MismatchError("base", "wrong", "Mend it.")

    with pytest.raises(MismatchError):
        drawn(Refusing())


def test_a_method_with_branches_is_eased_until_one_picture_fits() -> None:
    asked, notes = iter([True, True, False]), []

    class Tight(Easel):
        eased = 0

        def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
            self.room = int(self.eased == 2)
            return super().generate(prompts, seeds=seeds, **settings)

    easel = Tight()

    def ease() -> bool:
        easel.eased += 1
        return next(asked)

    kept, failures = drawn(easel, batch_size=1, ease=ease, note=notes.append)
    assert len(kept) == len(JOBS)
    assert failures == []
    assert notes == ["one picture does not fit in memory: drawing it with fewer LoRAs per UNet call"] * 2

    easel = Tight(room=0)
    easel.eased = 9
    kept, failures = drawn(easel, batch_size=1, ease=lambda: False)
    assert (kept, len(failures)) == ({}, len(JOBS))


def test_the_settings_reach_the_backbone() -> None:
    seen: list[dict[str, Any]] = []

    class Watched(Easel):
        def generate(self, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
            seen.append(settings)
            return super().generate(prompts, **settings)

    image = ImageConfig(steps=3, guidance=2.0, scheduler="ddim", negative_prompt="n", width=64, height=32, replay=False)
    draw(Watched(), JOBS[:1], image, batch_size=1, keep=lambda job, picture: None)
    assert seen == [
        {
            "seeds": [0],
            "steps": 3,
            "guidance": 2.0,
            "scheduler": "ddim",
            "negative_prompt": "n",
            "width": 64,
            "height": 32,
            "replay": False,
        }
    ]
