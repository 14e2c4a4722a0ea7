"""SVDiff adapters in files: written and read to the same updates, and refused where they mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molecli.adapters import LoraSpec, Origin, read_expert, read_info, write_svdiff
from molecli.bases.weights import BaseWeights
from molecli.errors import MismatchError, UserError
from molecli.mixture.layout import adaptable_matrices, host_of

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
MATRICES = (Q, UP)


def random(size: int, seed: int) -> Tensor:
    return 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, model: nn.Module, matrices: tuple[str, ...] = MATRICES) -> dict[str, Tensor]:
    """An adapter of `model` in the folder; its shifts."""
    base = BaseWeights(model)
    shifts = {name: random(base.spectrum(name).width, i) for i, name in enumerate(matrices)}
    digests = {name: base.digest(name) for name in matrices}
    shapes = {name: base.shape(name) for name in matrices}
    write_svdiff(folder, shifts, shapes, Origin("the/base", base.dtype(Q), base.fingerprint(), digests))
    return shifts


def read(folder: Path, model: nn.Module) -> Any:
    return read_expert(LoraSpec("x", str(folder)), adaptable_matrices(model), base=BaseWeights(model))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    file = folder / "svdiff.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    save_file(tensors, file, metadata=metadata)


def refused(folder: Path, model: nn.Module, code: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, model)
    assert (caught.value.exit_code, str(caught.value)) == (code, f"x ({folder / 'svdiff.safetensors'}): {message}")


@pytest.fixture
def model(tiny_llama: Any) -> nn.Module:
    return tiny_llama.model


def test_what_is_read_moves_the_singular_values_as_written(model: nn.Module, tmp_path: Path) -> None:
    shifts = write(tmp_path, model)
    expert = read(tmp_path, model)
    assert expert.matrices == MATRICES
    for matrix, factor in expert.factors.items():
        U, S, Vt = torch.linalg.svd(model.get_submodule(matrix).weight.double(), full_matrices=False)
        wanted = U @ torch.diag(torch.relu(S + shifts[matrix]) - S) @ Vt
        torch.testing.assert_close(factor.delta(), wanted.float(), rtol=0, atol=1e-5)
        assert factor.A.dtype == factor.B.dtype == torch.float32


@pytest.mark.parametrize("kind", ["t5", "gpt2", "sd"])
def test_every_matrix_of_every_kind_of_base(kind: str, make_tiny: Any, make_pipeline: Any, tmp_path: Path) -> None:
    host: Any = host_of(make_pipeline("sd")) if kind == "sd" else make_tiny(kind).model
    shapes, base = adaptable_matrices(host), BaseWeights(host)
    shifts = {name: random(base.spectrum(name).width, i) for i, name in enumerate(shapes)}
    digests = {name: base.digest(name) for name in shapes}
    write_svdiff(tmp_path, shifts, shapes, Origin("base", "float32", base.fingerprint(), digests))
    expert = read(tmp_path, host)
    assert list(expert.factors) == list(shapes)
    for matrix, factor in expert.factors.items():
        delta = factor.delta()
        assert tuple(delta.shape) == shapes[matrix]
        S = base.spectrum(matrix).S
        moves = torch.relu(S + shifts[matrix]) - S
        found = torch.linalg.svdvals(base.dense(matrix) + delta.flatten(1))
        torch.testing.assert_close(found, (S + moves).sort(descending=True).values, rtol=0, atol=2e-5)


def test_it_is_described_without_its_shifts_or_a_base(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model)
    info = read_info(LoraSpec("x", str(tmp_path)))
    assert info.matrices == {Q: (32, 32), UP: (64, 32)}
    assert (info.rank, info.alpha, info.base_model) == (32, 32.0, "the/base")
    assert info.scalings == {Q: 1.0, UP: 1.0}
    assert info.origin is not None
    assert (info.origin.base, info.origin.dtype) == ("the/base", "float32")


def test_the_same_shifts_are_the_same_bytes(model: nn.Module, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, model)
    files = [(tmp_path / name / "svdiff.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_shifts_of_zero_are_an_expert_that_adds_nothing(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model)
    rewrite(tmp_path, lambda tensors, _: [t.zero_() for t in tensors.values()] and None)
    assert not any(factor.delta().any() for factor in read(tmp_path, model).factors.values())


def test_the_base_in_a_type_that_holds_its_numbers_is_the_same(model: nn.Module, tmp_path: Path) -> None:
    model.bfloat16()
    write(tmp_path, model)
    wanted = read(tmp_path, model)
    found = read(tmp_path, model.float())
    for matrix in MATRICES:
        torch.testing.assert_close(found.factors[matrix].delta(), wanted.factors[matrix].delta())


def test_another_base_of_the_same_shape_is_exit_3(model: nn.Module, make_tiny: Any, tmp_path: Path) -> None:
    write(tmp_path, model)
    what = "it shifts the singular values of the/base, whose weights differ from this base's. "
    refused(
        tmp_path, make_tiny("llama", seed=1).model, 3, what + "Name the base it was trained on with --base the/base."
    )


def test_another_kind_of_base_is_exit_3(model: nn.Module, make_tiny: Any, tmp_path: Path) -> None:
    write(tmp_path, model)
    what = f"it was made for another base: this one lacks all its 2 matrices, such as {Q!r}. "
    remedy = "Name the base it was trained on with --base (it names the/base)."
    refused(tmp_path, make_tiny("t5").model, 3, what + remedy)


def test_the_base_rounded_is_exit_3_though_a_lora_would_do(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model)
    what = f"it needs exactly the weights of {Q!r} that it was trained on, and these differ. "
    remedy = "Load the/base in the precision it was trained on: --dtype float32."
    refused(tmp_path, model.bfloat16(), 3, what + remedy)


def test_without_a_base_it_cannot_be_read(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model)
    with pytest.raises(UserError, match=r"it shifts singular values of a base, and no base is loaded"):
        read_expert(LoraSpec("x", str(tmp_path)), adaptable_matrices(model))


def drop_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["base_fingerprint"]


def no_json(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["matrices"] = "{"


def no_shape(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    matrices = json.loads(metadata["matrices"])
    matrices[Q]["shape"] = []
    metadata["matrices"] = json.dumps(matrices)


def empty(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["matrices"] = "{}"


def newer(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["format_version"] = "2"


def lose(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors[f"svdiff/{Q}/delta"]


def add(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["svdiff/other/delta"] = torch.zeros(3)


def shorten(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[f"svdiff/{Q}/delta"] = torch.zeros(31)


def diverge(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[f"svdiff/{Q}/delta"][2] = float("nan")


AGAIN = " Download or export it again."


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (drop_metadata, 3, "its metadata do not name the base that it shifts." + AGAIN),
        (no_json, 3, "its metadata do not name the base that it shifts." + AGAIN),
        (no_shape, 3, "its metadata do not name the base that it shifts." + AGAIN),
        (empty, 3, "there are no shifts in it. Name an adapter that was trained and saved."),
        (newer, 2, "it has format version 2, and this version of mole reads 1. Upgrade mole."),
        (lose, 3, f"'svdiff/{Q}/delta' is missing." + AGAIN),
        (add, 3, "'svdiff/other/delta' is not one of its shifts." + AGAIN),
        (shorten, 3, f"'svdiff/{Q}/delta' has the shape [31], not [32]." + AGAIN),
        (diverge, 3, f"'svdiff/{Q}/delta' holds NaN or infinity. Its training diverged: train it again."),
    ],
)
def test_a_damaged_file(change: Any, code: int, message: str, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model)
    rewrite(tmp_path, change)
    refused(tmp_path, model, code, message)


def test_a_cut_file_is_exit_3(model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path, model)
    file = tmp_path / "svdiff.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(MismatchError, match="a damaged safetensors file"):
        read(tmp_path, model)
