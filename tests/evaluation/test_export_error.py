"""An export beside its original: mean losses, their interval, and how far apart the pictures are."""

from __future__ import annotations

import pytest
import torch

from molecli.evaluation.export_error import ExportError, Observed


def losses(**tasks: list[float]) -> Observed:
    return Observed({task: torch.tensor(values) for task, values in tasks.items()})


def test_tasks_weigh_alike_and_the_difference_is_paired() -> None:
    base, own = losses(x=[4.0], y=[2.0, 2.0, 2.0]), losses(x=[1.0], y=[0.5, 1.5, 1.0])
    export = losses(x=[1.5], y=[1.0, 2.0, 1.5])
    found = ExportError("gated", "examples", "mean token loss", base, own, export)
    assert found.losses == pytest.approx({"base": 3.0, "gated": 1.0, "export": 1.5})
    assert found.loss_inputs == 4
    difference = found.loss_difference
    assert difference is not None
    # 0.5 on every input: nothing to resample.
    assert (difference.estimate, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.lines() == [
        "loss      base 3.0000, gated 1.0000, export 1.5000: mean token loss, 4 examples",
        "          export minus gated +0.5000 [+0.5000, +0.5000], 95% interval over the examples",
    ]
    document = found.document()
    assert document["loss_difference"]["first"] == "export"
    assert document["by_task"]["x"] == pytest.approx({"base": 4.0, "gated": 1.0, "export": 1.5})
    assert (document["pictures"], document["latent_difference"]) == (0, {})


def test_the_interval_follows_the_spread_and_the_seed() -> None:
    own, export = losses(x=[1.0, 1.0, 1.0, 1.0]), losses(x=[1.0, 1.2, 1.4, 1.0])

    def interval(seed: int) -> object:
        return ExportError("gated", "examples", "loss", own, own, export, seed).loss_difference

    found = interval(0)
    assert found.low < 0.15 < found.high  # type: ignore[attr-defined]
    assert found == interval(0)


def test_pictures_are_compared_by_their_latents() -> None:
    own = Observed(latents=torch.zeros(2, 4, 2, 2))
    base, export = Observed(latents=torch.full((2, 4, 2, 2), -3.0)), Observed(latents=torch.full((2, 4, 2, 2), 0.5))
    found = ExportError("gated", "pictures", "denoising error", base, own, export)
    assert found.loss_difference is None
    assert found.lines() == ["latents   mean difference from gated: export 0.5000, base 3.0000, 2 pictures drawn"]
    assert found.document()["pictures"] == 2
