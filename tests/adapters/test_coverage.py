"""How much of a LoRA a base lacks: its share is said, and never more than half is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from molecli.adapters import LoraSpec, check_coverage, read_expert, read_info
from molecli.errors import MismatchError

Matrices = dict[str, tuple[int, int]]


def info_of(folder: Path) -> Any:
    return read_info(LoraSpec("x", str(folder)))


def without(matrices: Matrices, start: str) -> Matrices:
    return {name: shape for name, shape in matrices.items() if not name.startswith(start)}


def scaled(rewrite: Any, folder: Path, part: str, factor: float) -> None:
    rewrite(folder, lambda tensors: {k: t * factor if part in k and "lora_B" in k else t for k, t in tensors.items()})


def test_the_share_is_of_the_squared_norm(adapter: Path, matrices: Matrices) -> None:
    fewer = without(matrices, "decoder.block.1")
    expert = read_expert(LoraSpec("x", str(adapter)), matrices)
    sizes = {name: factor.delta().square().sum() for name, factor in expert.factors.items()}
    share = sum(size for name, size in sizes.items() if name not in fewer) / sum(sizes.values())
    found = check_coverage(info_of(adapter), fewer, allow_partial=True)
    assert found.left_out == pytest.approx(float(share), rel=1e-5)
    (told,) = read_expert(LoraSpec("x", str(adapter)), fewer, allow_partial=True).notices
    assert f"with {float(share):.1%} of its weights (by squared Frobenius norm); they are left out" in told


@pytest.mark.parametrize("allow_partial", [False, True])
def test_the_main_part_is_never_left_out(allow_partial: bool, adapter: Path, matrices: Matrices, rewrite: Any) -> None:
    """Few matrices can be most of the weights; the flag is not offered then."""
    scaled(rewrite, adapter, "decoder.block.1", 10.0)
    with pytest.raises(
        MismatchError, match=r"3 of its 10 matrices are not in this base.*9\d\.\d% of its weights"
    ) as said:
        check_coverage(info_of(adapter), without(matrices, "decoder.block.1"), allow_partial=allow_partial)
    assert "--allow-partial" not in str(said.value)
    assert "Name the base it was trained on" in str(said.value)


def test_many_matrices_can_be_a_minor_part(adapter: Path, matrices: Matrices, rewrite: Any) -> None:
    scaled(rewrite, adapter, "decoder", 0.01)
    found = check_coverage(info_of(adapter), without(matrices, "decoder"), allow_partial=True)
    assert len(found.unmatched) == 6
    assert found.left_out < 0.01


def test_the_share_of_a_dead_lora_is_that_of_its_matrices(adapter: Path, matrices: Matrices, rewrite: Any) -> None:
    rewrite(adapter, lambda tensors: {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()})
    found = check_coverage(info_of(adapter), without(matrices, "decoder.block.1"), allow_partial=True)
    assert found.left_out == pytest.approx(0.3)


def test_another_prefix_is_to_be_renamed_not_left_out(adapter: Path, matrices: Matrices, rewrite: Any) -> None:
    """A part of the file is under a prefix that the base lacks, although the base has these layers."""
    rewrite(adapter, lambda tensors: {k.replace("decoder.block.1", "policy.block.1"): t for k, t in tensors.items()})
    own = {name.replace("decoder.block.1", "own.block.1"): shape for name, shape in matrices.items()}
    with pytest.raises(MismatchError) as said:
        check_coverage(info_of(adapter), own)
    old, new = (f"'{start}.block.1.layer.0.SelfAttention.q'" for start in ("policy", "own"))
    assert str(said.value).endswith(f" Rename its modules to those of the base, such as {old} to {new}.")


def test_a_lora_that_does_nothing_is_told(adapter: Path, matrices: Matrices, rewrite: Any) -> None:
    assert read_expert(LoraSpec("x", str(adapter)), matrices).notices == ()
    rewrite(adapter, lambda tensors: {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()})
    (told,) = read_expert(LoraSpec("x", str(adapter)), matrices).notices
    assert told == "x: it changes nothing: one of its factors is zero everywhere, as before any training"
