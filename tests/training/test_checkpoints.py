"""Checkpoints: round trips, what is kept, and what a damaged one does."""

from __future__ import annotations

from pathlib import Path

import torch

from molecli.training.checkpoints import (
    Checkpoint,
    discard_checkpoints,
    newest_checkpoint,
    newest_step,
    save_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    parameters = {"site/a.b/weight": torch.full((2, 3), float(step)), "scalar": torch.tensor(1.5)}
    moments = {name: torch.randn_like(tensor) for name, tensor in parameters.items()}
    return Checkpoint(step, parameters, {"exp_avg": moments}, {"seed": 1, "train.lr": 0.1})


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = checkpoint(7)
    save_checkpoint(tmp_path, written)
    read = newest_checkpoint(tmp_path)
    assert read is not None
    assert (read.step, read.settings) == (7, written.settings)
    torch.testing.assert_close(dict(read.parameters), dict(written.parameters), rtol=0, atol=0)
    torch.testing.assert_close(dict(read.optimizer["exp_avg"]), dict(written.optimizer["exp_avg"]), rtol=0, atol=0)


def test_the_newest_two_are_kept_and_the_rest_of_a_killed_write_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/.step-000002.partial").mkdir(parents=True)
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000100"]
    assert newest_step(tmp_path) == 100


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    damaged = save_checkpoint(tmp_path, checkpoint(2)) / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    read = newest_checkpoint(tmp_path)
    assert read is not None
    assert read.step == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3))
    save_checkpoint(tmp_path, checkpoint(3))
    assert newest_step(tmp_path) == 3


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3))
    discard_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) is None
    assert newest_step(tmp_path) is None
