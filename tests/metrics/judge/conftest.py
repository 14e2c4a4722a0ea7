"""A key in the environment, and settings whose pauses take no time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from standin import KEY, paint

from molecli.config import JudgeConfig
from molecli.metrics.judge import Element, Pair

Settings = Callable[..., JudgeConfig]
MakePairs = Callable[..., list[Pair]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def settings() -> Settings:
    """`settings(url, ...)`: a JudgeConfig for a stand-in."""

    def make(url: str, **more: object) -> JudgeConfig:
        quick = {"endpoint": url, "key_env": "MOLE_TEST_KEY", "timeout_s": 5, "retries": 2, "pause_s": 0.001}
        return JudgeConfig.model_validate({**quick, **more})

    return make


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """`make_pairs((worth, other's worth), ...)`: pairs of painted pictures, cases 0, 1, ... of the task "two"."""

    def make(*worths: tuple[tuple[float, float], tuple[float, float]]) -> list[Pair]:
        elements = (Element("character", "Alice", ("blue dress",)), Element("style", "ink"))
        pairs = []
        for i, (mine, theirs) in enumerate(worths):
            picture, other = paint(tmp_path / f"{i}-switch.png", *mine), paint(tmp_path / f"{i}-merge.png", *theirs)
            pairs.append(Pair("two", str(i), "switch", "merge", elements, picture, other))
        return pairs

    return make
