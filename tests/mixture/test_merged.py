"""Merged compositions: one LoRA of all, on language models and pipelines, masked, saved and loaded again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import close
from torch import Tensor, nn

from molecli.bases.diffusion import Diffusion
from molecli.bases.weights import BaseWeights
from molecli.catalog.methods import METHODS
from molecli.commands.compose import run_compose
from molecli.config import ComposeRecipe, MethodConfig
from molecli.errors import MismatchError, UsageError
from molecli.experts import Expert, ExpertBank, LowRank
from molecli.files.composition import load_composition
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import host_of
from molecli.mixture.merged import MergedMixture, merge_experts

MERGES = sorted(name for name, row in METHODS.items() if row.family == "merges")
WEIGHTS = {"a": 0.7, "b": 1.3}


def settings(mode: str) -> MethodConfig:
    """What lets every method merge mixed ranks."""
    return MethodConfig(expression="a + 0.5 * b - c" if mode == "pem" else None, on="updates")


def loras(shapes: dict[str, tuple[int, ...]]) -> list[Expert]:
    """Three of different ranks; the last leaves out every other matrix."""
    g = torch.Generator().manual_seed(0)

    def factor(rank: int, shape: tuple[int, ...]) -> LowRank:
        A = torch.randn(rank, *shape[1:], generator=g) / torch.Size(shape[1:]).numel() ** 0.5
        return LowRank(A, 0.3 * torch.randn(shape[0], rank, generator=g), 1.5)

    chosen = list(shapes)
    return [
        Expert(name, {m: factor(rank, shapes[m]) for m in chosen[:: 2 if name == "c" else 1]})
        for name, rank in (("a", 3), ("b", 2), ("c", 4))
    ]


@pytest.fixture
def model(tiny_llama: Any) -> nn.Module:
    return tiny_llama.model


@pytest.fixture
def experts(model: nn.Module) -> list[Expert]:
    return loras({n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj")})


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def merged_by_hand(model: nn.Module, experts: list[Expert], mode: str, kept: list[int] | None = None) -> Tensor:
    """The logits of a copy of the model, without its hooks, whose weights were changed."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    weights = [WEIGHTS.get(expert.name, 1.0) for expert in experts]
    if mode == "pem":
        weights = [w * c for w, c in zip(weights, (1.0, 0.5, -1.0), strict=True)]
    base = BaseWeights(fresh)
    found = merge_experts(ExpertBank(experts), METHODS[mode].load(), weights, settings(mode), base=base, kept=kept)
    modules = dict(fresh.named_modules())
    for matrix, factor in found.factors.items():
        modules[matrix].weight.data += factor.delta()
    return logits(fresh)


@pytest.mark.parametrize("mode", MERGES)
def test_hosted_is_what_changed_weights_give(model: nn.Module, experts: list[Expert], mode: str) -> None:
    base = logits(model)
    with build_mixture(model, experts, mode=mode, weights=WEIGHTS, method=settings(mode)) as mixture:
        assert isinstance(mixture, MergedMixture)
        found = logits(model)
    assert close(found, merged_by_hand(model, experts, mode))
    assert not close(found, base, 1e-2)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("mode", ["ties", "svd", "dare", "pem"])
def test_a_mask_merges_the_others_anew(model: nn.Module, experts: list[Expert], mode: str) -> None:
    base = logits(model)
    with build_mixture(model, experts, mode=mode, weights=WEIGHTS, method=settings(mode)) as mixture:
        everything = logits(model)
        mixture.mask("a")
        assert close(logits(model), merged_by_hand(model, experts, mode, [1, 2]))
        mixture.mask("a", "b", "c")
        assert torch.equal(logits(model), base)
        mixture.mask()
        assert torch.equal(logits(model), everything)
        mixture.only("c")  # which leaves out every other matrix
        assert close(logits(model), merged_by_hand(model, experts, mode, [2]))


def test_mixed_ranks_sum_exactly(model: nn.Module, experts: list[Expert]) -> None:
    with build_mixture(model, experts, mode="linear", weights=WEIGHTS, method=MethodConfig(scale=0.8)):
        wanted = logits(model)
    with build_mixture(model, experts, mode="cat", weights=WEIGHTS, method=MethodConfig(scale=0.8)):
        assert close(logits(model), wanted)


@pytest.mark.parametrize("mode", MERGES)
def test_the_order_of_loras_changes_no_output(model: nn.Module, experts: list[Expert], mode: str) -> None:
    with build_mixture(model, experts, mode=mode, method=settings(mode)):
        first = logits(model)
    with build_mixture(model, experts[::-1], mode=mode, method=settings(mode)):
        assert close(logits(model), first, 1e-4)


@pytest.mark.parametrize("mode", ["ties", "tsv"])
def test_a_pipeline_merges_too_convolutions_included(tiny_sd: Any, mode: str) -> None:
    shapes = Diffusion(tiny_sd).matrices()
    experts = loras(dict(list(shapes.items())[::5]))
    assert any(factor.A.dim() == 4 for factor in experts[0].factors.values())
    mixture = build_mixture(host_of(tiny_sd), experts, mode=mode, method=MethodConfig(rank=4))
    conv = next(m for m, factor in experts[0].factors.items() if factor.A.dim() == 4)
    x = torch.randn(1, experts[0].factors[conv].A.shape[1], 8, 8)
    module = dict(host_of(tiny_sd).named_modules())[conv]
    with torch.no_grad():
        base = module(x)
        with mixture:
            mixture._streams.passes["unet"].step = 1
            found = module(x)
        delta = mixture.merged().factors[conv].delta()  # type: ignore[attr-defined]
        wanted = torch.nn.functional.conv2d(x, delta, stride=module.stride, padding=module.padding)
    assert close(found, base + wanted)
    assert delta.shape == module.weight.shape


def test_what_a_rank_cost_is_known_for_every_matrix(model: nn.Module, experts: list[Expert]) -> None:
    mixture = build_mixture(model, experts, mode="ties", method=MethodConfig(rank=2))
    assert isinstance(mixture, MergedMixture)
    found = mixture.merged()
    assert set(found.errors) == set(found.factors)
    assert all(0 < error < 1 for error in found.errors.values())


def test_it_says_how_far_it_is(model: nn.Module, experts: list[Expert]) -> None:
    told: list[tuple[int, int]] = []
    with build_mixture(model, experts, mode="svd", progress=lambda _, done, total: told.append((done, total))):
        pass
    assert told[-1] == (len(told), len(told))


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path], make_peft_adapter: Callable[..., Path]
) -> tuple[str, dict[str, str]]:
    """A base and two LoRAs of one rank in files."""
    from transformers import AutoModelForCausalLM

    base, root = tiny_folder("llama"), tmp_path_factory.mktemp("merging")
    model = AutoModelForCausalLM.from_pretrained(base)
    return str(base), {n: str(make_peft_adapter(model, root / n, seed=i)) for i, n in enumerate("ab")}


def recipe(written: tuple[str, dict[str, str]], output: Path, **more: Any) -> ComposeRecipe:
    base, named = written
    tree = {"base": {"id": base, "dtype": "float32"}, "loras": [f"{n}={p}" for n, p in named.items()]}
    return ComposeRecipe.model_validate({**tree, "evaluate": None, "output": str(output), "device": "cpu", **more})


@pytest.mark.parametrize("mode", ["ties", "pem"])
def test_saved_and_loaded_it_is_the_same_bit_by_bit(
    written: tuple[str, dict[str, str]], tmp_path: Path, mode: str, tiny_llama: Any
) -> None:
    method = {"expression": "a - 0.5 * b"} if mode == "pem" else {"density": 0.3, "rank": 3}
    report = run_compose(recipe(written, tmp_path / "m", mode=mode, method=method))
    assert report["experts"] == ["a", "b"]
    composition = load_composition(tmp_path / "m")
    assert any(key.startswith("merged/") for key in composition.tensors)
    model = tiny_llama.model
    with attach(model, loras=written[1], mode=mode, method=MethodConfig.model_validate(method)):
        wanted = logits(model)
    with attach(model, composition=tmp_path / "m") as mixture:
        assert torch.equal(logits(model), wanted)
        mixture.mask("b")
        alone = logits(model)
    with attach(
        model,
        loras={"a": written[1]["a"]},
        mode=mode,
        method=MethodConfig.model_validate({**method, **({"expression": "a"} if mode == "pem" else {})}),
    ):
        assert close(logits(model), alone)


def test_the_report_says_what_the_rank_cost(written: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    report = run_compose(recipe(written, tmp_path / "m", mode="svd", method={"rank": 2}))
    found = report["truncation"]
    assert 0 < found["mean"] <= found["worst"] < 1
    assert found["matrix"].endswith("_proj")
    assert "truncation" not in run_compose(recipe(written, tmp_path / "g", mode="linear"))


def test_a_damaged_file_is_refused(written: tuple[str, dict[str, str]], tmp_path: Path, tiny_llama: Any) -> None:
    run_compose(recipe(written, tmp_path / "m", mode="svd"))
    tensors = load_composition(tmp_path / "m").tensors
    with attach(tiny_llama.model, loras=written[1], mode="svd") as mixture:
        key = next(iter(k for k in tensors if k.endswith("/A")))
        with pytest.raises(MismatchError, match="is missing"):
            mixture.load_state_dict({k: t for k, t in tensors.items() if k != key})
        with pytest.raises(MismatchError, match="belongs to no matrix"):
            mixture.load_state_dict({**tensors, "merged/other/A": tensors[key]})
        with pytest.raises(MismatchError, match="do not fit"):
            mixture.load_state_dict({**tensors, key: tensors[key][:, 1:]})


def test_pem_needs_an_expression(model: nn.Module, experts: list[Expert]) -> None:
    with pytest.raises(UsageError, match="none is given"):
        build_mixture(model, experts, mode="pem")
