"""Merges of ΔW at one matrix: each held to its closed form or published formula on small matrices, and to PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import merge_utils
from torch import Tensor, nn

from molecli.catalog.methods import METHODS
from molecli.config import MethodConfig
from molecli.errors import MismatchError, UsageError
from molecli.functional.merging import drop, elected_mean, trim
from molecli.functional.spectral import Spectrum, decompose
from molecli.methods.merges.knots import shared_space
from molecli.methods.merges.pem import coefficients
from molecli.methods.merges.tsv import polar
from molecli.methods.merges.updates import Updates

D_OUT, D_IN = 12, 10
RANKS = (3, 2, 4)
MERGES = sorted(name for name, row in METHODS.items() if row.family == "merges")
BY_FACTORS = ("lorahub", "pem")


def pair(rank: int, seed: int, d_out: int = D_OUT, d_in: int = D_IN) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=g, dtype=torch.float64), torch.randn(
        d_out, rank, generator=g, dtype=torch.float64
    )


def updates(pairs: Sequence[tuple[Tensor, Tensor]] | None = None, weights: Sequence[float] | None = None) -> Updates:
    pairs = pairs if pairs is not None else [pair(rank, seed) for seed, rank in enumerate(RANKS)]
    return Updates("m", tuple(pairs), tuple(weights or (1.0,) * len(pairs)), tuple(range(len(pairs))), spectrum)


def spectrum() -> Spectrum:
    """Of the base's own matrix."""
    return decompose(torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(9)))


def merged(name: str, given: Updates, **config: Any) -> Tensor:
    A, B, _ = METHODS[name].load()(given, MethodConfig(**config))
    return B @ A


def linear(given: Updates) -> Tensor:
    return sum(w * (B @ A) for w, (A, B) in zip(given.weights, given.factors, strict=True))  # type: ignore[return-value]


def close(x: Tensor, y: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((x - y).norm() <= tolerance * y.norm().clamp_min(1e-12))


WEIGHTS = (0.7, -0.4, 1.2)


# -- what reduces to the sum -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [("cat", {}), ("svd", {"rank": 9}), ("magnitude_prune", {"density": 1.0}), ("dare", {"density": 1.0})],
)
def test_nothing_lost_is_the_sum(name: str, config: dict[str, Any]) -> None:
    given = updates(weights=WEIGHTS)
    assert close(merged(name, given, **config), linear(given))


@pytest.mark.parametrize("name", ["lorahub", "pem"])
def test_factor_methods_on_updates_are_the_sum(name: str) -> None:
    given = updates(weights=WEIGHTS)
    assert close(merged(name, given, on="updates"), linear(given))


@pytest.mark.parametrize("name", [name for name in MERGES if name not in ("iso", "dare", "dare_ties", "svdiff")])
def test_one_lora_alone_is_itself(name: str) -> None:
    given = updates([pair(3, 5)])
    density = {"density": 1.0}
    assert close(merged(name, given, **density), linear(given))


@pytest.mark.parametrize("name", MERGES)
def test_the_order_changes_nothing(name: str) -> None:
    given = updates([pair(3, seed) for seed in range(3)], WEIGHTS)
    order = (2, 0, 1)
    moved = replace(
        given,
        factors=tuple(given.factors[i] for i in order),
        weights=tuple(given.weights[i] for i in order),
        seeds=tuple(given.seeds[i] for i in order),
    )
    assert close(merged(name, moved), merged(name, given), 1e-5)


# -- rank --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MERGES if name not in BY_FACTORS])
def test_a_rank_is_the_best_of_that_rank_and_says_its_error(name: str) -> None:
    given = updates()
    whole = merged(name, given, rank=D_IN)
    A, B, error = METHODS[name].load()(given, MethodConfig(rank=2))
    assert len(A) == 2
    assert B.shape == (D_OUT, 2)
    tail = torch.linalg.svdvals(whole)[2:].norm() / whole.norm()
    assert error == pytest.approx(float(tail), rel=1e-4)
    assert float((whole - B @ A).norm() / whole.norm()) == pytest.approx(error, rel=1e-4)


def test_svd_keeps_the_largest_rank_by_default() -> None:
    A, _, error = METHODS["svd"].load()(updates(), MethodConfig())
    assert len(A) == max(RANKS)
    assert 0 < error < 1


def test_svd_is_the_truncated_sum() -> None:
    given = updates()
    U, S, Vt = torch.linalg.svd(linear(given))
    assert close(merged("svd", given, rank=4), U[:, :4] @ torch.diag(S[:4]) @ Vt[:4])


def pefts(given: Updates, kind: str, **options: Any) -> Tensor:
    """What PEFT's `add_weighted_adapter` makes of LoRAs with these factors, which must be of one rank."""
    rank = len(given.factors[0][0])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["m"])
    model = PeftModel(nn.ModuleDict({"m": nn.Linear(D_IN, D_OUT, bias=False)}), config, "0")
    for number in range(1, len(given.factors)):
        model.add_adapter(str(number), config)
    layer: Any = model.base_model.model["m"]
    for number, (A, B) in enumerate(given.factors):
        layer.lora_A[str(number)].weight.data = A.float()
        layer.lora_B[str(number)].weight.data = B.float()
    names = [str(number) for number in range(len(given.factors))]
    model.base_model.add_weighted_adapter(names, list(given.weights), "out", combination_type=kind, **options)
    return layer.get_delta_weight("out").double()


def alike(weights: Sequence[float]) -> Updates:
    return updates([pair(3, seed) for seed in range(len(weights))], weights)


def test_peft_agrees_where_it_sums_and_truncates() -> None:
    given = alike((0.7, 0.4, 1.2))
    assert close(merged("svd", given, rank=3), pefts(given, "svd", svd_rank=3), 1e-5)
    assert close(merged("cat", given), pefts(given, "cat"), 1e-5)
    theirs = pefts(given, "dare_linear_svd", density=1.0, svd_rank=3)
    assert close(merged("dare", given, density=1.0, rank=3), theirs, 1e-5)


def test_pefts_linear_mixes_the_factors_apart_and_is_no_sum() -> None:
    """peft#3004: √w A and √w B are summed each by itself, whose product has every cross term."""
    given = alike((0.7, 0.4))
    theirs, total = pefts(given, "linear"), linear(given)
    assert float((theirs - total).norm() / total.norm()) > 0.5
    roots = [w**0.5 for w in given.weights]
    A = sum(r * a for r, (a, _) in zip(roots, given.factors, strict=True))
    B = sum(r * b for r, (_, b) in zip(roots, given.factors, strict=True))
    assert close(theirs, B @ A, 1e-5)  # type: ignore[operator]
    for name in ("cat", "svd"):
        assert close(merged(name, given, rank=6), total)


# -- TIES and DARE -----------------------------------------------------------------------------------------------------


def naive_trim(x: np.ndarray, density: float) -> np.ndarray:
    order = sorted(range(x.size), key=lambda i: -abs(x.flat[i]))[: int(density * x.size)]
    out = np.zeros_like(x)
    for i in order:
        out.flat[i] = x.flat[i]
    return out


def naive_ties(deltas: list[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    kept = [w * naive_trim(x, density) for w, x in zip(weights, deltas, strict=True)]
    out = np.zeros_like(kept[0])
    for place in np.ndindex(out.shape):
        values = [x[place] for x in kept]
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agree = [v for v in values if v and math.copysign(1, v) == sign]
        out[place] = sum(agree) / len(agree) if agree else 0.0
    return out


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_its_definition(weights: tuple[float, ...], density: float) -> None:
    given = updates(weights=weights)
    wanted = naive_ties([d.numpy() for d in given.dense()], weights, density)
    assert close(merged("ties", given, density=density, rank=D_IN), torch.from_numpy(wanted))


def test_ties_of_equal_updates_is_the_update() -> None:
    given = updates([pair(3, 1)] * 4)
    assert close(merged("ties", given, density=1.0), given.dense()[0])


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_ties_and_pruning_are_pefts_on_dense_updates(density: float) -> None:
    given = updates()
    tensors, ones = list(given.dense()), torch.ones(3, dtype=torch.float64)
    assert close(merged("ties", given, density=density, rank=D_IN), merge_utils.ties(tensors, ones, density))
    theirs = merge_utils.magnitude_prune(tensors, torch.tensor(WEIGHTS, dtype=torch.float64), density)
    assert close(merged("magnitude_prune", updates(weights=WEIGHTS), density=density, rank=D_IN), theirs)


def test_a_negative_weight_subtracts_where_peft_elects_before_it_weighs() -> None:
    """Minus one of two equal updates and plus the other cancel; PEFT lets both vote for the sign they had."""
    given = updates([pair(3, 1)] * 2, (1.0, -1.0))
    assert merged("ties", given, density=1.0).norm() < 1e-9
    one = updates([pair(3, 1), pair(3, 2)], (1.0, -1.0))
    turned = updates([one.factors[0], (one.factors[1][0], -one.factors[1][1])])
    assert close(merged("ties", one, density=1.0), merged("ties", turned, density=1.0))
    theirs = merge_utils.ties(list(one.dense()), torch.tensor([1.0, -1.0], dtype=torch.float64), 1.0)
    assert not close(theirs, merged("ties", one, density=1.0, rank=D_IN), 0.1)


def test_dare_keeps_its_share_and_its_expectation() -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = [drop(x, 0.25, torch.Generator().manual_seed(seed)) for seed in range(400)]
    kept = torch.stack([d != 0 for d in drawn]).double().mean()
    assert kept.item() == pytest.approx(0.25, abs=0.005)
    assert all(bool(torch.isclose(d[d != 0], 4 * x[d != 0]).all()) for d in drawn[:3])
    assert close(torch.stack(drawn).mean(0), x, 0.12)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_dare_ties_elects_among_what_was_not_dropped(weights: tuple[float, ...], density: float) -> None:
    given = updates(weights=weights)
    kept = [
        drop(update, density, torch.Generator().manual_seed(seed)).numpy()
        for update, seed in zip(given.dense(), given.seeds, strict=True)
    ]
    wanted = naive_ties(kept, weights, 1.0)
    found = merged("dare_ties", given, density=density, rank=D_IN)
    assert close(found, torch.from_numpy(wanted))
    assert not close(found, merged("dare", given, density=density, rank=D_IN), 0.1)


def test_dares_mask_follows_the_seed_of_each_lora() -> None:
    given = updates()
    assert torch.equal(merged("dare", given, rank=D_IN), merged("dare", given, rank=D_IN))
    others = Updates("m", given.factors, given.weights, (7, 8, 9))
    assert not close(merged("dare", others, rank=D_IN), merged("dare", given, rank=D_IN), 0.1)


def test_trim_keeps_the_floor_of_the_share() -> None:
    x = torch.tensor([[[3.0, -1.0, 2.0, 0.5, -4.0]]])
    assert torch.equal(trim(x, 0.5), torch.tensor([[[3.0, 0.0, 0.0, 0.0, -4.0]]]))
    assert not trim(x, 0.1).any()


def test_the_mean_is_over_those_that_agree() -> None:
    x = torch.tensor([[[1.0, 0.0]], [[3.0, -2.0]], [[-2.0, 0.0]]])
    assert torch.equal(elected_mean(x), torch.tensor([[2.0, -2.0]]))


# -- shared subspaces --------------------------------------------------------------------------------------------------


def test_knots_space_holds_every_update() -> None:
    given = updates()
    U, aligned = shared_space(given)
    assert close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64))
    for update, part in zip(given.dense(), aligned, strict=True):
        assert close(U @ part, update)
    wide = torch.cat(list(given.dense()), dim=1)
    assert close(aligned.transpose(0, 1).flatten(1).norm(dim=1), torch.linalg.svdvals(wide)[: U.shape[1]])


def test_knots_is_ties_in_that_space() -> None:
    given = updates(weights=WEIGHTS)
    U, S, Vt = torch.linalg.svd(torch.cat(list(given.dense()), dim=1), full_matrices=False)
    kept = 1e-5 * S[0] < S
    parts = [p.numpy() for p in (torch.diag(S) @ Vt)[kept].split(D_IN, dim=1)]
    wanted = U[:, kept] @ torch.from_numpy(naive_ties(parts, WEIGHTS, 0.3))
    assert close(merged("knots", given, density=0.3), wanted)


def test_tsv_of_orthogonal_updates_is_the_sum() -> None:
    eye = torch.eye(12, dtype=torch.float64)
    pairs = [(3.0 * eye[2 * i : 2 * i + 2], eye[:, 2 * i : 2 * i + 2]) for i in range(3)]
    given = updates(pairs, WEIGHTS)
    assert close(merged("tsv", given), linear(given))


def test_tsv_of_copies_is_the_update() -> None:
    copies = updates([pair(3, 1)] * 3)
    assert close(merged("tsv", copies), copies.dense()[0])


def test_tsv_is_its_formula() -> None:
    given = updates()
    parts = [torch.linalg.svd(d, full_matrices=False) for d in given.dense()]
    k = [min(D_IN // 3, rank) for rank in RANKS]
    U = torch.cat([u[:, :n] for (u, _, _), n in zip(parts, k, strict=True)], 1)
    S = torch.cat([s[:n] for (_, s, _), n in zip(parts, k, strict=True)])
    V = torch.cat([v[:n] for (_, _, v), n in zip(parts, k, strict=True)])

    def procrustes(x: Tensor) -> Tensor:
        p, _, q = torch.linalg.svd(x, full_matrices=False)
        return p @ q

    assert close(merged("tsv", given), procrustes(U) @ torch.diag(S) @ procrustes(V))


def test_polar_leaves_out_directions_that_are_rounding() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    doubled = torch.cat([x, x], dim=1)
    assert torch.linalg.matrix_rank(polar(doubled)) == 2


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_iso_is_its_formula(scale: float) -> None:
    given = updates(weights=[scale * w for w in WEIGHTS])
    U, S, Vt = torch.linalg.svd(linear(given), full_matrices=False)
    rank = int(torch.linalg.matrix_rank(linear(given)))
    assert close(merged("iso", given), S[:rank].mean() * U[:, :rank] @ Vt[:rank])


def test_iso_keeps_the_nuclear_norm_and_is_idempotent() -> None:
    given = updates(weights=WEIGHTS)
    once = merged("iso", given)
    before, after = torch.linalg.svdvals(linear(given)), torch.linalg.svdvals(once)
    rank = int(torch.linalg.matrix_rank(linear(given)))
    assert float(after.sum()) == pytest.approx(float(before.sum()))
    assert close(after[:rank], before.sum().expand(rank) / rank)
    A, B, _ = METHODS["iso"].load()(given, MethodConfig())
    assert close(merged("iso", updates([(A, B)])), once)


# -- factor by factor --------------------------------------------------------------------------------------------------


def test_lorahub_squares_a_weight_and_forgets_its_sign() -> None:
    one = pair(3, 1)
    assert close(merged("lorahub", updates([one], [0.6])), 0.36 * (one[1] @ one[0]))
    pairs = [pair(3, seed) for seed in range(3)]
    turned = [-w for w in WEIGHTS]
    assert close(merged("lorahub", updates(pairs, turned)), merged("lorahub", updates(pairs, WEIGHTS)))


def test_lorahub_is_its_formula_cross_terms_and_all() -> None:
    pairs = [pair(3, seed) for seed in range(3)]
    A = sum(w * a for w, (a, _) in zip(WEIGHTS, pairs, strict=True))
    B = sum(w * b for w, (_, b) in zip(WEIGHTS, pairs, strict=True))
    assert close(merged("lorahub", updates(pairs, WEIGHTS)), B @ A)  # type: ignore[operator]


def test_pem_adds_negates_and_draws_analogies() -> None:
    pairs = [pair(3, seed) for seed in range(3)]
    (a1, b1), (a2, b2), (a3, b3) = pairs
    assert close(merged("pem", updates([pairs[0]] * 2, (0.5, 0.5))), b1 @ a1)
    assert close(merged("pem", updates([pairs[0]], (-1.0,))), -(b1 @ a1))
    analogy = merged("pem", updates(pairs, (0.5, 0.5, -0.5)))
    assert close(analogy, 0.5 * (b1 + b2 - b3) @ (0.5 * (a1 + a2 + a3)))


@pytest.mark.parametrize("name", BY_FACTORS)
def test_a_sum_of_factors_is_cut_to_a_rank(name: str) -> None:
    given = updates([pair(3, seed) for seed in range(3)], WEIGHTS)
    whole = merged(name, given)
    A, B, error = METHODS[name].load()(given, MethodConfig(rank=2))
    assert A.shape == (2, D_IN)
    U, S, Vt = torch.linalg.svd(whole)
    assert close(B @ A, U[:, :2] @ torch.diag(S[:2]) @ Vt[:2])
    assert error == pytest.approx(float(S[2:].norm() / S.norm()))


@pytest.mark.parametrize("name", BY_FACTORS)
def test_factors_of_different_ranks_cannot_be_added(name: str) -> None:
    with pytest.raises(MismatchError, match=r"ranks 3, 2, 4.*method\.on=updates"):
        merged(name, updates())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a + b - c", (1, 1, -1)),
        ("a", (1, 0, 0)),
        ("-b", (0, -1, 0)),
        ("0.5 * a + b * 2 - (c - a) / 4", (0.75, 2, -0.25)),
        ("'a' - 3*'c' + a", (2, 0, -3)),
    ],
)
def test_expressions(text: str, wanted: tuple[float, ...]) -> None:
    assert coefficients(MethodConfig(expression=text), "abc") == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["a * b", "a +", "f(a)", "a / 0", "2", "a ** 2", "__import__('os')"])
def test_what_is_no_sum_of_names(text: str) -> None:
    with pytest.raises(UsageError, match=r"method\.expression: .* is not a sum of names"):
        coefficients(MethodConfig(expression=text), "abc")


def test_an_expression_is_needed_and_its_names_are_loras() -> None:
    with pytest.raises(UsageError, match="none is given"):
        coefficients(MethodConfig(), "abc")
    with pytest.raises(UsageError, match="there is no LoRA 'ab'"):
        coefficients(MethodConfig(expression="a + ab"), "abc")
