"""The invariants of the engine, each on T5, BART, Llama and GPT-2: what the mixture must equal, and must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gates import close, copy_permuted, drop, randomise
from reference import NaiveGate, NaiveMixture, read_naively
from torch import Tensor, nn

from molecli.config import GateConfig
from molecli.experts import Expert, LowRank
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture

KINDS = ("t5", "bart", "llama", "gpt2")
PADDING = {"t5": slice(5, 8), "bart": slice(5, 8), "llama": slice(0, 3), "gpt2": slice(0, 3)}
VARIANTS = [
    pytest.param({"granularity": g, "input": i, "normalize": n, "pool": p, "head": h}, id=f"{g}-{i}-{n}-{p}-{h}")
    for g, i, n, p, h in (
        ("block", "hidden", "standardize", "prompt", "full"),
        ("layer", "hidden", "unit", "token", "full"),
        ("network", "hidden", "unit", "prompt", "low_rank"),
        ("matrix", "hidden", "standardize", "running", "full"),
        ("block", "experts", "unit", "prompt", "full"),
        ("layer", "experts", "unit", "token", "per_expert"),
        ("block", "experts", "none", "running", "low_rank"),
        ("layer", "experts", "standardize", "running", "per_expert"),
        ("network", "none", "unit", "prompt", "full"),
    )
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(f"tiny_{kind}").model


@pytest.fixture(scope="module")
def written() -> dict[str, list[Path]]:
    return {}


@pytest.fixture
def folders(
    kind: str,
    model: nn.Module,
    written: dict[str, list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
    make_peft_adapter: Callable[..., Path],
) -> list[Path]:
    """Three LoRAs of different rank, alpha and seed; the last scales as rsLoRA. Written once for each kind of model."""
    if kind not in written:
        settings: list[dict[str, Any]] = [
            {"rank": 4, "alpha": 8, "seed": 1},
            {"rank": 2, "alpha": 3, "seed": 2},
            {"rank": 5, "alpha": 6, "seed": 3, "use_rslora": True},
        ]
        root = tmp_path_factory.mktemp(kind)
        written[kind] = [make_peft_adapter(model, root / f"lora{i}", scale=0.15, **s) for i, s in enumerate(settings)]
    return written[kind]


@pytest.fixture
def experts(folders: list[Path]) -> list[Expert]:
    return [read_naively(folder, name) for folder, name in zip(folders, "abc", strict=True)]


def inputs(kind: str, *, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
    """Two sequences; causal ones carry labels on their second half, so that prompt and answer are told apart."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 200, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padded:  # on the side where a tokenizer would: right for an encoder, left for a causal model
        mask[1, PADDING[kind]] = 0
    if kind in ("t5", "bart"):
        labels = torch.randint(6, 200, (2, 5), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def gated(model: nn.Module, experts: list[Expert], **config: Any) -> Mixture:
    mixture = build_mixture(model, experts, mode="gated", gate=GateConfig(**config))
    randomise(mixture)
    return mixture


# 1 ------------------------------------------------------------------------------------------------------------------


def test_one_expert_equals_peft_with_that_adapter(
    model: nn.Module, kind: str, folders: list[Path], experts: list[Expert]
) -> None:
    batch = inputs(kind)
    base = logits(model, batch)
    for folder, expert in zip(folders, experts, strict=True):
        expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder), batch)
        assert not close(expected, base, 1e-2)  # the adapter matters
        for mode in ("linear", "nla", "single", "gated"):
            with build_mixture(model, [expert], mode=mode):
                assert close(logits(model, batch), expected)


# 2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "weight"), [("gated", 1 / 3), ("nla", 1 / 3), ("linear", 1.0)])
def test_fixed_gates_equal_pefts_cat_merge(
    model: nn.Module, kind: str, folders: list[Path], experts: list[Expert], mode: str, weight: float
) -> None:
    batch = inputs(kind)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="a")
    for folder, name in zip(folders[1:], "bc", strict=True):
        merged.load_adapter(folder, adapter_name=name)
    merged.add_weighted_adapter(["a", "b", "c"], [weight] * 3, "sum", combination_type="cat")
    merged.set_adapter("sum")
    with build_mixture(model, experts, mode=mode):  # fresh gates are uniform
        assert close(logits(model, batch), logits(merged, batch), 2e-5)


# 3 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
def test_masks_reach_the_base_and_each_expert(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    batch = inputs(kind)
    base = logits(model, batch)
    with gated(model, experts, **config) as mixture:
        everything = logits(model, batch)
        mixture.mask("a", "b", "c")
        assert torch.equal(logits(model, batch), base)
        mixture.mask("a", "c")
        alone = logits(model, batch)
        mixture.mask()
        assert torch.equal(logits(model, batch), everything)
        mixture.only("b")
        assert torch.equal(logits(model, batch), alone)
    assert not close(everything, alone, 1e-2)
    with build_mixture(model, [experts[1]], mode="single"):
        assert close(alone, logits(model, batch))


def test_masking_rescales_the_other_gates_proportionally(model: nn.Module, kind: str, experts: list[Expert]) -> None:
    batch = inputs(kind)
    with gated(model, experts, granularity="network", input="hidden", pool="prompt") as mixture:
        logits(model, batch)
        before = mixture.gates()["network"]
        mixture.mask("b")
        logits(model, batch)
        after = mixture.gates()["network"]
    assert torch.all(after[:, 1] == 0)
    assert torch.allclose(after.sum(-1), torch.ones(2))
    assert torch.allclose(after[:, 0] / after[:, 2], before[:, 0] / before[:, 2], rtol=1e-4)


# 4 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
def test_permuting_experts_permutes_gates_and_changes_no_output(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    batch, order = inputs(kind), [2, 0, 1]
    with gated(model, experts, **config) as mixture:
        before, gates = logits(model, batch), mixture.gates()
    permuted = build_mixture(model, [experts[i] for i in order], mode="gated", gate=GateConfig(**config))
    for site, gate in permuted.gate_modules().items():
        copy_permuted(mixture.gate_modules()[site], gate, order, [experts[i] for i in range(3)], mixture, site)
    with permuted:
        after, moved = logits(model, batch), permuted.gates()
    assert close(after, before, 3e-5)
    for site in gates:
        assert torch.allclose(moved[site], gates[site][:, order], atol=1e-5)


# 5 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
def test_stacked_equals_a_naive_loop_in_values_and_gate_gradients(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    batch = inputs(kind, padded=True)
    # Experts that adapt different matrices: one lacks the feed-forward, one the queries.
    mixed = [
        experts[0],
        drop(experts[1], lambda m: "attn" in m.lower() or "attention" in m.lower()),
        drop(experts[2], lambda m: not m.endswith(("q", "q_proj", "c_attn"))),
    ]
    mixture = gated(model, mixed, **config)
    parameters = mixture.named_parameters()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        for parameter in parameters.values():
            parameter.grad = None
        output = model(**batch)
        output.loss.backward()
        return output.logits.detach(), {k: p.grad.clone() for k, p in parameters.items() if p.grad is not None}

    with mixture:
        values, gradients = run()
    seen: list[Tensor] = []
    if kind in ("t5", "bart"):
        handle = model.get_encoder().register_forward_hook(
            lambda m, a, o: seen.__setitem__(slice(None), [o.last_hidden_state])
        )  # type: ignore[operator]
    with NaiveMixture(model, mixed, mixture.sites, NaiveGate(mixture, batch, config, lambda: seen[0])):
        expected, reference = run()
    if kind in ("t5", "bart"):
        handle.remove()
    assert close(values, expected, 1e-4)
    assert gradients
    assert gradients.keys() == reference.keys()
    largest = max(float(g.abs().max()) for g in reference.values())
    assert largest > 0
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, reference[key], atol=2e-4 * largest, rtol=1e-3), key


def test_an_absent_expert_can_hand_its_gate_to_the_others(model: nn.Module, kind: str, experts: list[Expert]) -> None:
    batch = inputs(kind)
    half = drop(experts[1], lambda m: "attn" in m.lower() or "attention" in m.lower())
    pair = [experts[0], half]
    with build_mixture(model, pair, mode="gated", gate=GateConfig(absent="renormalize")):
        shared = logits(model, batch)
    # Uniform gates: 1/2 each where both are present, and all of it to expert 0 elsewhere.
    doubled = {m: LowRank(f.A, f.B, f.scaling * (1 if m in half.factors else 2)) for m, f in experts[0].factors.items()}
    with build_mixture(model, [Expert("a", doubled), half], mode="nla"):
        assert close(shared, logits(model, batch), 2e-5)


# 6 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
def test_a_training_step_reaches_every_gate_and_nothing_else(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    batch = inputs(kind)
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    factors = [(f.A.clone(), f.B.clone()) for e in experts for f in e.factors.values()]
    with build_mixture(model, experts, mode="gated", gate=GateConfig(**config)) as mixture:
        parameters = mixture.named_parameters()
        optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
        before = logits(model, batch)
        for _ in range(2):
            optimiser.zero_grad()
            model(**batch).loss.backward()
            reached = {k.split("/")[1] for k, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
            assert reached == set(mixture.gate_modules())
            optimiser.step()
        assert not torch.equal(logits(model, batch), before)  # the gates act on the output
    for key, value in model.state_dict().items():
        assert torch.equal(value, frozen[key]), key
    for (A, B), factor in zip(factors, [f for e in experts for f in e.factors.values()], strict=True):
        assert torch.equal(A, factor.A)
        assert torch.equal(B, factor.B)


def test_the_balance_loss_carries_gradient(model: nn.Module, kind: str, experts: list[Expert]) -> None:
    from molecli.functional.gating import balance_loss

    with gated(model, experts, granularity="block", input="hidden", pool="prompt") as mixture:
        model(**inputs(kind))
        loss = balance_loss(mixture.stacked_gates().mean((0, 1)))
        loss.backward()
        gradients = [p.grad for p in mixture.named_parameters().values()]
    assert float(loss) > 3 * torch.log(torch.tensor(3.0)) - 1e-5  # least, N log N, at uniform usage
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


# 7 ------------------------------------------------------------------------------------------------------------------


def generate(model: Any, batch: dict[str, Tensor], *, cache: bool = True, beams: int = 1) -> list[list[int]]:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=cache,
        num_beams=beams,
        **settings,
    )
    return [row[-8:].tolist() for row in out]


@pytest.mark.parametrize("config", VARIANTS)
def test_cached_generation_gives_the_tokens_of_uncached(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    if kind not in ("t5", "bart") and config["pool"] == "prompt" and config["input"] != "none":
        pytest.skip("without a cache every pass is a prompt, so a gate fixed by the prompt has no uncached counterpart")
    batch = inputs(kind, padded=True)
    with gated(model, experts, **config):
        assert generate(model, batch) == generate(model, batch, cache=False)


@pytest.mark.parametrize("config", VARIANTS)
def test_a_padded_batch_gives_the_tokens_of_one_by_one(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    batch = inputs(kind, padded=True)
    real = [row.bool() for row in batch["attention_mask"]]
    singles = [{k: v[i : i + 1, real[i]] for k, v in batch.items() if k != "labels"} for i in range(2)]
    with gated(model, experts, **config):
        together = generate(model, batch)
        apart = [generate(model, single)[0] for single in singles]
    assert together == apart
    assert together[0] != together[1]


@pytest.mark.parametrize("granularity", ["network", "block"])
def test_beam_search_uses_each_prompts_own_gate(
    model: nn.Module, kind: str, experts: list[Expert], granularity: str
) -> None:
    batch = inputs(kind)
    singles = [{k: v[i : i + 1] for k, v in batch.items() if k != "labels"} for i in range(2)]
    with gated(model, experts, granularity=granularity, input="hidden", pool="prompt"):
        assert generate(model, batch, beams=3) == [generate(model, single, beams=3)[0] for single in singles]


# 8 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
def test_saved_gates_reload_to_the_same_bits_and_leaving_restores_the_base(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    batch = inputs(kind)
    base = logits(model, batch)
    with gated(model, experts, **config) as mixture:
        before = logits(model, batch)
    assert torch.equal(logits(model, batch), base)
    other = build_mixture(model, experts, mode="gated", gate=GateConfig(**config))
    other.load_state_dict({k: v.clone() for k, v in mixture.state_dict().items()})
    with other:
        assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# 9 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
def test_a_causal_gate_does_not_see_later_tokens(
    model: nn.Module, kind: str, experts: list[Expert], config: dict[str, Any]
) -> None:
    if kind in ("t5", "bart"):
        batch = inputs(kind)
        changed = {**batch, "labels": batch["labels"].clone()}
        changed["labels"][:, -1] += 1  # shifted right by the model: seen from position 4 on, of 5
        changed["labels"][:, -2] += 1
        unchanged = 3
    else:
        batch = inputs(kind)
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][:, 6:] += 1  # in the answer, behind the prompt
        unchanged = 6
    with gated(model, experts, **config):
        before, after = logits(model, batch), logits(model, changed)
    assert torch.equal(before[:, :unchanged], after[:, :unchanged])
    assert not torch.equal(before, after)
