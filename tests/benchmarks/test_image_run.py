"""The benchmark of compositions of pictures: what its stages ask of `mole`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import image_run  # noqa: E402


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize(("told", "expected"), [([], None), (["--guidance", "4"], "4.0"), (["--guidance", "0"], "0.0")])
def test_guidance_is_left_to_the_base_unless_told(
    told: list[str], expected: str | None, split: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[image_run.Job] = []

    def kept(jobs: Sequence[image_run.Job], *paths: Any, **how: Any) -> int:
        asked.extend(jobs)
        return 0

    monkeypatch.setattr(image_run, "run", kept)
    image_run.draw(image_run.parser().parse_args(["draw", "--work", str(tmp_path), "--split", split, *told]))
    assert len(asked) > 1
    for job in asked:
        following = dict(zip(job.command, job.command[1:], strict=False))
        assert following.get("--guidance") == expected
