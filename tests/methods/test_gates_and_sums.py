"""The composition methods: their table, the fixed weights, and the gates' heads and pools against loops."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from molecli.catalog.methods import METHODS, get_method
from molecli.config import GateConfig, recipes
from molecli.errors import UsageError
from molecli.experts import Expert, ExpertBank, LowRank
from molecli.methods.gates.gated import InputGate, StaticGate, build_gates, resolve_pool
from molecli.methods.gates.heads import FeatureHead, OutputHead, PerExpertHead
from molecli.methods.sums import linear, nla, single
from molecli.protocols import Group, Reading, Site

RANKS, D_IN, WIDTHS = (2, 1, 3), 5, (4, 6)
ENTRY = ("layer.0.q", "layer.0.k")
SITE = Site("layer.0", (Group(ENTRY, "decoder"),))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank() -> ExpertBank:
    """Three experts of different rank; the second does not adapt the second matrix."""
    experts = []
    for i, rank in enumerate(RANKS):
        factors = {
            matrix: LowRank(draw(rank, D_IN, seed=10 * i + j), draw(width, rank, seed=100 + 10 * i + j), 0.5 + i)
            for j, (matrix, width) in enumerate(zip(ENTRY, WIDTHS, strict=True))
            if (i, j) != (1, 1)
        }
        experts.append(Expert("abc"[i], factors))
    return ExpertBank(experts)


def reading(bank: ExpertBank) -> Reading:
    """Two sequences of four tokens: one padded on the left, the other with an answer behind its prompt."""
    x = draw(2, 4, D_IN, seed=7)
    A = torch.cat([bank.stacked(matrix).A for matrix in ENTRY])
    valid = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    prompt = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    return Reading(x, x @ A.T, valid, prompt)


def gate_of(bank: ExpertBank, **config: Any) -> Any:
    seq2seq = bool(config.pop("seq2seq", False))
    (gate,) = build_gates(GateConfig(**config), bank, [SITE], seq2seq=seq2seq).values()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in gate.parameters():
            spread = 2.0 if parameter.dim() else 0.3  # far from uniform, at a moderate temperature
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return gate


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_row_names_what_can_be_imported() -> None:
    images = ["switch", "composite", "w_switch", "w_composite", "loratorio"]
    assert set(METHODS) == set(get_args(recipes.Mode)) - {"merge"}
    assert [name for name, method in METHODS.items() if method.level == "output"] == images
    for method in METHODS.values():
        assert callable(method.load())
        assert method.level in ("weights", "site", "output")
    assert {name for name, method in METHODS.items() if method.trained} == {"gated", "soup", "lorahub", "xlora"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gaetd", "--mode: there is no composition method 'gaetd'. Did you mean gated?"),
        ("ties-merging", f"--mode: there is no composition method 'ties-merging'. Known: {', '.join(METHODS)}."),
        ("marge", "--mode: there is no composition method 'marge'. Did you mean merge?"),
    ],
)
def test_an_unknown_method_names_the_nearest_or_all(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_method(name)
    assert str(caught.value) == message


# -- fixed weights -----------------------------------------------------------------------------------------------------

KEEP = torch.tensor([1.0, 0.0, 1.0])


def test_linear_keeps_the_weights_and_masks_without_rescaling() -> None:
    gate = linear.gate(torch.tensor([1.0, 0.5, -2.0]))
    assert gate(None).tolist() == [1.0, 0.5, -2.0]
    assert gate(None, KEEP).tolist() == [1.0, 0.0, -2.0]


def test_nla_divides_by_the_sum_and_rescales_under_a_mask() -> None:
    gate = nla.gate(torch.tensor([1.0, 2.0, 1.0]))
    assert gate(None).tolist() == [0.25, 0.5, 0.25]
    assert gate(None, KEEP).tolist() == [0.5, 0.0, 0.5]


def test_nla_refuses_weights_that_sum_to_nothing() -> None:
    with pytest.raises(UsageError) as caught:
        nla.gate(torch.tensor([1.0, -1.0]))
    assert str(caught.value) == (
        "--loras: the weights sum to 0, and `nla` divides by their sum. Change a weight or use --mode linear."
    )


def test_single_keeps_one_weight() -> None:
    assert single.gate(torch.tensor([1.0, 0.5, 2.0]), 1)(None).tolist() == [0.0, 0.5, 0.0]
    assert single.gate(torch.tensor([0.5]))(None).tolist() == [0.5]
    with pytest.raises(UsageError) as caught:
        single.gate(torch.ones(3))
    assert str(caught.value) == "--mode single: 3 LoRAs are given. Name one of them with --only NAME."


# -- pools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "stream", "seq2seq", "resolved"),
    [
        ("auto", "decoder", False, "prompt"),
        ("running", "decoder", False, "running"),
        ("token", "decoder", False, "token"),
        ("auto", "decoder", True, "prompt"),
        ("mean", "decoder", True, "running"),
        ("auto", "encoder", True, "mean"),
        ("running", "encoder", True, "mean"),
        ("prompt", "memory", True, "mean"),
        ("token", "memory", True, "token"),
    ],
)
def test_a_pool_never_looks_ahead(pool: str, stream: Any, seq2seq: bool, resolved: str) -> None:
    assert resolve_pool(pool, stream, seq2seq=seq2seq) == resolved


def test_a_mean_over_a_causal_model_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_pool("mean", "decoder", seq2seq=False)
    assert str(caught.value) == (
        "gate.pool: 'mean' would let a causal model see later tokens. Use prompt, running or token."
    )


@pytest.mark.parametrize("reads", ["hidden", "experts"])
@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
def test_features_are_pooled_as_a_loop_would(reads: str, pool: str, bank: ExpertBank) -> None:
    seen = reading(bank)
    gate = gate_of(bank, input=reads, pool=pool)
    source = seen.x if reads == "hidden" else seen.u
    features = gate.features(seen)
    assert gate.per_sequence == (pool == "prompt")
    for b in range(2):
        if pool == "prompt":
            torch.testing.assert_close(features[b], source[b][seen.prompt[b].bool()].mean(0))
            continue
        for t in range(4):
            before = source[b, : t + 1][seen.valid[b, : t + 1].bool()]
            mean = before.mean(0) if len(before) else torch.zeros(source.shape[-1])
            torch.testing.assert_close(features[b, t], source[b, t] if pool == "token" else mean)


def test_a_decoder_reads_the_encoders_output_as_its_prompt(bank: ExpertBank) -> None:
    seen = reading(bank)
    seen.memory, seen.memory_valid = draw(2, 3, 9, seed=8), torch.tensor([[1, 1, 0], [1, 1, 1]])
    (gate,) = build_gates(GateConfig(input="hidden"), bank, [SITE], seq2seq=True, memory_width=9).values()
    features = gate.features(seen)
    torch.testing.assert_close(features, torch.stack([seen.memory[0, :2].mean(0), seen.memory[1].mean(0)]))
    assert gate.features(seen) is features  # computed once a pass, for every site of the decoder


# -- heads -------------------------------------------------------------------------------------------------------------


def outputs(bank: ExpertBank, x: Tensor) -> Tensor:
    """[..., N, d]: what every expert puts out at the entry, its matrices side by side."""
    rows = []
    for expert in bank.experts:
        parts = []
        for matrix, width in zip(ENTRY, WIDTHS, strict=True):
            factor = expert.factors.get(matrix)
            parts.append(x @ factor.delta().T if factor else x.new_zeros(*x.shape[:-1], width))
        rows.append(torch.cat(parts, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("head", ["full", "per_expert", "low_rank"])
@pytest.mark.parametrize("normalize", ["unit", "none"])
@pytest.mark.parametrize("pool", ["prompt", "token"])
def test_the_papers_head_equals_its_definition_on_the_experts_outputs(
    head: str, normalize: str, pool: str, bank: ExpertBank
) -> None:
    seen = reading(bank)
    gate = gate_of(bank, input="experts", head=head, head_rank=2, normalize=normalize, pool=pool)
    assert isinstance(gate.head, OutputHead)
    x = seen.x
    if pool == "prompt":
        x = torch.stack([x[b][seen.prompt[b].bool()].mean(0) for b in range(2)])
    E = outputs(bank, x)
    if normalize == "unit":  # Eq. 9: the concatenation of all the outputs is one vector
        E = E / E.flatten(-2).norm(dim=-1)[..., None, None]
    if head == "full":  # Eq. 10: e reads all of the concatenation for each logit
        logits = sum(torch.stack([E[..., n, :] @ gate.head.weight[n, k] for k in range(3)], -1) for n in range(3))
    elif head == "per_expert":
        logits = torch.stack([E[..., n, :] @ gate.head.weight[n, 0] for n in range(3)], -1)
    else:
        inner = sum(E[..., n, :] @ gate.head.down[n].T for n in range(3))
        logits = inner @ gate.head.weight.T
    expected = torch.softmax(logits / gate.log_temperature.exp(), -1)
    torch.testing.assert_close(gate(seen), expected, rtol=1e-4, atol=1e-5)
    assert (expected - 1 / 3).abs().max() > 0.05


@pytest.mark.parametrize("head", ["full", "low_rank"])
@pytest.mark.parametrize("reads", ["hidden", "experts"])
def test_a_feature_head_reads_standardised_features(head: str, reads: str, bank: ExpertBank) -> None:
    seen = reading(bank)
    gate = gate_of(bank, input=reads, head=head, head_rank=2, normalize="standardize", pool="token")
    assert isinstance(gate.head, FeatureHead)
    source = seen.x if reads == "hidden" else seen.u
    width = source.shape[-1]
    gate.mean.copy_(draw(width, seed=20))
    gate.std.copy_(draw(width, seed=21).abs() + 0.5)
    features = (source - gate.mean) / gate.std / math.sqrt(width)
    weight = gate.head.weight if head == "full" else gate.head.weight @ gate.head.down
    expected = torch.softmax((features @ weight.T + gate.head.bias) / gate.log_temperature.exp(), -1)
    torch.testing.assert_close(gate(seen), expected, rtol=1e-4, atol=1e-5)
    assert (expected - 1 / 3).abs().max() > 0.05


def test_a_per_expert_head_reads_each_experts_own_ranks(bank: ExpertBank) -> None:
    seen = reading(bank)
    gate = gate_of(bank, input="experts", head="per_expert", normalize="standardize", pool="token")
    assert isinstance(gate.head, PerExpertHead)
    owner = torch.cat([bank.owner(matrix) for matrix in ENTRY])
    features = seen.u / math.sqrt(seen.u.shape[-1])
    logits = torch.stack([(features * gate.head.weight)[..., owner == n].sum(-1) for n in range(3)], -1)
    expected = torch.softmax((logits + gate.head.bias) / gate.log_temperature.exp(), -1)
    torch.testing.assert_close(gate(seen), expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_low_rank_does_not_grow_with_experts_times_width(bank: ExpertBank) -> None:
    gate = gate_of(bank, input="hidden", head="low_rank", head_rank=2, normalize="standardize")
    assert sum(parameter.numel() for parameter in gate.head.parameters()) == 2 * D_IN + 3 * 2 + 3


@pytest.mark.parametrize("reads", ["hidden", "experts", "none"])
@pytest.mark.parametrize("head", ["full", "per_expert", "low_rank"])
@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
def test_a_fresh_gate_is_uniform(reads: str, head: str, normalize: str, bank: ExpertBank) -> None:
    config = GateConfig(input=reads, head=head, normalize=normalize)  # type: ignore[arg-type]
    (gate,) = build_gates(config, bank, [SITE], seq2seq=False).values()
    values = gate(reading(bank))
    torch.testing.assert_close(values, torch.full_like(values, 1 / 3))


# -- starts ------------------------------------------------------------------------------------------------------------

HEADS = ("full", "per_expert", "low_rank")
STARTS = [*((reads, head) for reads in ("hidden", "experts") for head in HEADS), ("none", "full")]


def fresh(bank: ExpertBank, seed: int = 0, sites: int = 1, **config: Any) -> list[Any]:
    """Gates as they are built after torch's global generator was given `seed`."""
    named = [Site(f"layer.{i}", SITE.groups) for i in range(sites)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return list(build_gates(GateConfig(**config), bank, named, seq2seq=False).values())


def weight_of(gate: Any) -> Tensor:
    return gate.logits if isinstance(gate, StaticGate) else gate.head.weight


@pytest.mark.parametrize("normalize", ["standardize", "unit"])
@pytest.mark.parametrize(("reads", "head"), STARTS)
def test_a_fresh_gates_weights_have_the_spread_that_is_asked_for(
    reads: str, head: str, normalize: str, bank: ExpertBank
) -> None:
    gates = fresh(bank, sites=400, input=reads, head=head, normalize=normalize, temperature=2.0, init_std=0.3)
    weights = torch.stack([weight_of(gate).detach().flatten() for gate in gates])
    assert float(weights.std(correction=0)) == pytest.approx(0.3, rel=0.1)
    assert abs(float(weights.mean())) < 0.05
    assert len({tuple(row) for row in weights.tolist()}) == len(gates)  # no site is the copy of another
    assert all(weight_of(gate).requires_grad for gate in gates)
    for gate in gates:
        assert gate.log_temperature.item() == pytest.approx(math.log(2.0))
        assert reads == "none" or getattr(gate.head, "bias", torch.zeros(1)).eq(0).all()
    values = gates[0](reading(bank))
    assert float((values - 1 / 3).abs().max()) > 1e-3
    torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]))


@pytest.mark.parametrize("init_std", [0.01, 0.5])
@pytest.mark.parametrize("reads", ["hidden", "experts"])
def test_the_first_logits_of_a_full_head_spread_as_its_weights_do(
    reads: str, init_std: float, bank: ExpertBank
) -> None:
    logits = []
    for i, gate in enumerate(fresh(bank, sites=300, input=reads, init_std=init_std)):
        features = draw(20, len(gate.mean), seed=i)  # each of variance 1, as what is standardised
        logits.append(gate.head(gate._normalized(features)).detach())
    assert float(torch.cat(logits).std()) == pytest.approx(init_std, rel=0.1)


@pytest.mark.parametrize(("reads", "head"), STARTS)
def test_a_start_follows_the_seed(reads: str, head: str, bank: ExpertBank) -> None:
    one, again, other = (fresh(bank, seed, sites=2, input=reads, head=head, init_std=0.2) for seed in (4, 4, 5))
    for gate, same, another in zip(one, again, other, strict=True):
        assert torch.equal(weight_of(gate), weight_of(same))
        assert not torch.equal(weight_of(gate), weight_of(another))


@pytest.mark.parametrize(("reads", "head"), [start for start in STARTS if start[1] != "low_rank"])
def test_an_even_start_draws_no_random_number(reads: str, head: str, bank: ExpertBank) -> None:
    before = torch.get_rng_state()
    build_gates(GateConfig(input=reads, head=head), bank, [SITE], seq2seq=False)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reads", ["hidden", "experts"])
def test_the_first_factors_of_low_rank_are_the_same_at_any_start(reads: str, bank: ExpertBank) -> None:
    even, drawn = (fresh(bank, sites=2, input=reads, head="low_rank", init_std=std) for std in (0.0, 0.2))
    for a, b in zip(even, drawn, strict=True):
        assert torch.equal(a.head.down, b.head.down)
        assert not a.head.weight.any()


@pytest.mark.parametrize("reads", ["hidden", "experts"])
def test_a_gate_is_even_while_its_features_are_measured(reads: str, bank: ExpertBank) -> None:
    (gate,) = fresh(bank, input=reads, pool="token", init_std=5.0)
    gate.observe()
    values = gate(reading(bank))
    torch.testing.assert_close(values, torch.full((2, 4, 3), 1 / 3))
    torch.testing.assert_close(gate(reading(bank), KEEP), torch.tensor([0.5, 0.0, 0.5]).expand(2, 4, 3))
    gate.settle()
    assert float((gate(reading(bank)) - 1 / 3).abs().max()) > 0.1


# -- temperature, top-k, masks, calibration ----------------------------------------------------------------------------


def test_static_gates_are_the_same_for_every_input(bank: ExpertBank) -> None:
    gate = gate_of(bank, input="none", temperature=2.0, learn_temperature=False)
    assert isinstance(gate, StaticGate)
    assert (gate.constant, gate.per_sequence) == (True, True)
    assert not gate.log_temperature.requires_grad
    with torch.no_grad():
        gate.log_temperature.fill_(math.log(2.0))
        gate.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(gate(None), torch.softmax(torch.tensor([0.0, 0.5, 1.0]), -1))


@pytest.mark.parametrize("reads", ["hidden", "experts", "none"])
def test_top_k_and_masks_reach_every_kind_of_gate(reads: str, bank: ExpertBank) -> None:
    seen = reading(bank)
    gate = gate_of(bank, input=reads, top_k=2, pool="token", normalize="unit")
    values = gate(seen)
    assert ((values > 0).sum(-1) == 2).all()
    masked = gate(seen, KEEP)
    assert (masked[..., 1] == 0).all()
    torch.testing.assert_close(masked.sum(-1), torch.ones_like(masked[..., 0]))


def test_calibration_gathers_padded_tokens_out_and_ends_where_it_is_settled(bank: ExpertBank) -> None:
    seen = reading(bank)
    gate = gate_of(bank, input="hidden", pool="token", normalize="standardize")
    assert isinstance(gate, InputGate)
    gate.observe()
    gate(seen)
    gate(seen)
    gate.settle()
    rows = seen.x.flatten(0, 1)[seen.valid.flatten().bool()]
    torch.testing.assert_close(gate.mean, rows.mean(0))
    torch.testing.assert_close(gate.std, rows.std(0, correction=0))
    kept = gate.mean.clone()
    gate(Reading(seen.x + 5, seen.u, seen.valid, seen.prompt))
    assert torch.equal(gate.mean, kept)


def test_a_feature_that_never_changes_is_not_blown_up(bank: ExpertBank) -> None:
    seen = reading(bank)
    seen.x[..., 0] = 3.0
    gate = gate_of(bank, input="hidden", pool="token", normalize="standardize")
    gate.observe()
    gate(seen)
    gate.settle()
    spread = seen.x.flatten(0, 1)[seen.valid.flatten().bool()].std(0, correction=0)
    assert float(spread[0]) < 1e-6
    assert float(gate.std[0]) == pytest.approx(1e-3 * float(spread.mean()), rel=1e-3)
