"""PEFT's Arrow and X-LoRA as mixtures: what PEFT computes when it is used by hand, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from gates import close, drop
from torch import Tensor, nn

from molecli.adapters import LoraSpec
from molecli.bases.causal import Causal
from molecli.bases.seq2seq import Seq2Seq
from molecli.config import MethodConfig
from molecli.errors import MismatchError, RunError, UsageError
from molecli.experts import Expert, LowRank
from molecli.mixture.attach import read_experts
from molecli.mixture.build import build_mixture
from molecli.mixture.peft_routed import ArrowMixture, XLoraMixture

NAMES = ("a", "b.c", "d")  # a point is no part of a module's name
CAUSAL, ALL = ("llama", "gpt2"), ("llama", "gpt2", "t5", "bart")


@pytest.fixture(scope="module")
def lora_folders(
    tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Any], make_peft_adapter: Callable[..., Path]
) -> Callable[..., list[Path]]:
    """`lora_folders(kind)` -> three LoRAs of one rank in folders."""
    made: dict[str, list[Path]] = {}

    def build(kind: str) -> list[Path]:
        if kind not in made:
            place, model = tmp_path_factory.mktemp(kind), make_tiny(kind).model
            made[kind] = [
                make_peft_adapter(model, place / str(i), seed=i, rank=3, alpha=3.0 + i, use_rslora=i == 2)
                for i in range(3)
            ]
        return made[kind]

    return build


@pytest.fixture
def world(make_tiny: Callable[..., Any], lora_folders: Callable[..., list[Path]]) -> Callable[..., Any]:
    """`world(kind)` -> (model, its three experts)."""

    def build(kind: str, count: int = 3) -> tuple[nn.Module, list[Expert]]:
        model = make_tiny(kind).model
        specs = [LoraSpec(name, str(path)) for name, path in zip(NAMES, lora_folders(kind), strict=True)]
        return model, read_experts(model, specs[:count])

    return build


def logits(model: nn.Module, **more: Any) -> Tensor:
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model(**inputs).logits


def state(model: nn.Module) -> dict[str, Any]:
    """All that PEFT might change."""
    modules = {
        name: (id(m), m.training, [len(h) for h in (m._forward_hooks, m._forward_pre_hooks)], sorted(vars(m)))
        for name, m in model.named_modules()
    }
    parameters = {name: (id(p), p.requires_grad, p.dtype, p.grad) for name, p in model.named_parameters()}
    settings = model.config.to_dict(), model.generation_config.to_dict()  # type: ignore[union-attr, operator]
    return {"modules": modules, "parameters": parameters, "settings": settings, "order": list(modules)}


def shifted(mixture: XLoraMixture, size: float = 0.5) -> XLoraMixture:
    """The mixture with a classifier that tells tokens apart."""
    torch.manual_seed(0)
    for parameter in mixture.named_parameters().values():
        parameter.data = size * torch.randn(parameter.shape)
    return mixture


def xlora(model: nn.Module, experts: list[Expert], **settings: Any) -> XLoraMixture:
    mixture = build_mixture(model, experts, mode="xlora", method=MethodConfig(**settings))
    assert isinstance(mixture, XLoraMixture)
    return shifted(mixture)


def by_formula(model: nn.Module, experts: list[Expert], top_k: int, temperature: float = 1.0) -> Tensor:
    """Arrow's logits by its formula, on a copy of the model: singular vectors by SVD, one LoRA after another."""
    fresh = copy.deepcopy(model)
    for name, module in fresh.named_modules():
        if not all(name in expert.factors for expert in experts):
            continue
        deltas = torch.stack([expert.factors[name].delta() for expert in experts])
        first = torch.linalg.svd(deltas).Vh[:, 0]

        def hook(_: Any, args: Any, y: Tensor, deltas: Tensor = deltas, first: Tensor = first) -> Tensor:
            scores = (args[0] @ first.T).abs()
            kept = scores.topk(top_k, dim=-1)
            p = torch.zeros_like(scores).scatter(-1, kept.indices, (kept.values / temperature).softmax(-1))
            return y + torch.einsum("...n,noi,...i->...o", p, deltas, args[0])

        module.register_forward_hook(hook)
    return logits(fresh)


# -- the model stays what it was ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kind"), [*(("arrow", k) for k in ALL), *(("xlora", k) for k in CAUSAL)])
@pytest.mark.parametrize("learning", [False, True])
def test_leaving_it_leaves_nothing_behind(world: Callable[..., Any], mode: str, kind: str, learning: bool) -> None:
    model, experts = world(kind)
    model.train(learning).requires_grad_(learning)  # as a user's own model may be
    before = logits(model.eval(), output_hidden_states=True)  # transformers puts hooks of its own on, once
    model.train(learning)
    was, values = state(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    mixture = build_mixture(model, experts, mode=mode)
    with mixture:
        model.eval()
        inside = logits(model)
        assert not close(inside, before, 1e-2)
    with mixture:  # again
        model.eval()
        assert torch.equal(logits(model), inside)
    assert state(model) == was
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("mode", ["arrow", "xlora"])
def test_an_error_inside_leaves_nothing_behind_either(world: Callable[..., Any], mode: str) -> None:
    model, experts = world("llama")
    before, was = logits(model, output_hidden_states=True), state(model)
    norm = LowRank(torch.ones(3, 4), torch.ones(4, 3), 1.0)  # a layer that PEFT has no LoRA for
    broken = [replace(expert, factors={**expert.factors, "model.norm": norm}) for expert in experts]
    mixture = build_mixture(model, broken if mode == "arrow" else [experts[0], broken[1]], mode=mode)
    with pytest.raises(UsageError, match="PEFT has no LoRA layer for a LlamaRMSNorm"), mixture:
        pass
    assert state(model) == was
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mode", ["arrow", "xlora"])
def test_random_numbers_go_on_as_without_it(world: Callable[..., Any], mode: str) -> None:
    model, experts = world("llama")
    mixture = build_mixture(model, experts, mode=mode)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    with mixture:
        logits(model)
    assert torch.equal(torch.rand(1), wanted)


def test_a_model_with_adapters_of_peft_is_refused(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    mixture = build_mixture(model, experts, mode="arrow")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(MismatchError) as refused, mixture:
        pass
    assert str(refused.value) == (
        "base: it already has PEFT adapters, which would mix with the LoRAs. Give the model without them."
    )


def test_attached_twice_is_refused(world: Callable[..., Any]) -> None:
    mixture = build_mixture(*world("llama"), mode="arrow")
    with mixture, pytest.raises(RunError, match="it is attached already"):
        mixture.attach()


# -- arrow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_arrow_of_one_lora_is_that_lora(world: Callable[..., Any], kind: str) -> None:
    model, experts = world(kind, 1)
    with build_mixture(model, experts, mode="linear"):
        wanted = logits(model)
    with build_mixture(model, experts, mode="arrow"):
        assert close(logits(model), wanted)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_is_what_peft_makes_of_the_same_folders(
    world: Callable[..., Any], lora_folders: Callable[..., list[Path]], top_k: int
) -> None:
    model, experts = world("llama")
    settings = peft.ArrowConfig(top_k=top_k, router_temperature=0.5, rng_seed=4)
    folders = [str(folder) for folder in lora_folders("llama")]
    by_hand = peft.create_arrow_model(copy.deepcopy(model), folders, settings).eval()
    with build_mixture(model, experts, mode="arrow", method=MethodConfig(top_k=top_k, temperature=0.5, seed=4)):
        found = logits(model)
    assert torch.equal(found, logits(by_hand.base_model.model))


@pytest.mark.parametrize("top_k", [1, 3])
def test_arrow_is_its_formula(world: Callable[..., Any], top_k: int) -> None:
    model, experts = world("llama")
    # A clear first direction: fifteen power iterations find it.
    clear = [_with_first_direction(expert) for expert in experts]
    wanted = by_formula(model, clear, top_k, 2.0)
    with build_mixture(model, clear, mode="arrow", method=MethodConfig(top_k=top_k, temperature=2.0)):
        assert close(logits(model), wanted, 1e-4)


def test_arrow_of_mixed_ranks_is_its_formula(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    mixed = [_with_first_direction(_cut(expert, rank)) for expert, rank in zip(experts, (3, 1, 2), strict=True)]
    wanted = by_formula(model, mixed, 3)
    with build_mixture(model, mixed, mode="arrow"):
        assert close(logits(model), wanted, 1e-4)


def test_the_weight_of_a_lora_scales_its_update(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    scaled = [
        replace(experts[0], factors={m: replace(f, scaling=-0.5 * f.scaling) for m, f in experts[0].factors.items()})
    ]
    method = MethodConfig(scale=0.25)
    with build_mixture(model, experts, mode="arrow", weights={"a": -2.0, "b.c": 4.0, "d": 4.0}, method=method):
        found = logits(model)
    with build_mixture(model, [*scaled, *experts[1:]], mode="arrow"):
        assert torch.equal(logits(model), found)


def test_arrow_takes_three_or_all_if_there_are_fewer(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    four = [*experts, replace(experts[0], name="e")]
    for some, top_k in ((experts[:1], 1), (experts[:2], 2), (experts, 3), (four, 3)):
        mixture = build_mixture(model, some, mode="arrow")
        assert isinstance(mixture, ArrowMixture)
        assert mixture.config.top_k == top_k


def test_a_masked_lora_is_as_if_arrow_never_had_it(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    base = logits(model)
    with build_mixture(model, [experts[0], experts[2]], mode="arrow"):
        wanted = logits(model)
    mixture = build_mixture(model, experts, mode="arrow")
    mixture.mask("b.c")
    with mixture:
        assert torch.equal(logits(model), wanted)
        mixture.mask(*NAMES)
        assert torch.equal(logits(model), base)
        mixture.only("a", "d")
        assert torch.equal(logits(model), wanted)
        mixture.mask()
        assert not close(logits(model), wanted, 1e-2)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", ALL)
def test_arrow_generates_the_same_with_a_cache_and_without(
    world: Callable[..., Any], make_tiny: Callable[..., Any], kind: str
) -> None:
    model, experts = world(kind)
    backbone = (Seq2Seq if kind in ("t5", "bart") else Causal)(model, make_tiny(kind).tokenizer)
    prompts = ["one two", "three"]
    base = backbone.generate(prompts, max_new_tokens=8)
    with build_mixture(model, experts, mode="arrow"):
        found = backbone.generate(prompts, max_new_tokens=8)
        assert backbone.generate(prompts, max_new_tokens=8, use_cache=False) == found != base
        assert [backbone.generate([prompt], max_new_tokens=8)[0] for prompt in prompts] == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda experts: [experts[0], drop(experts[1], lambda matrix: "mlp" not in matrix)],
            "--mode arrow: all LoRAs must adapt the same matrices, but b.c lacks model.layers.0.mlp.gate_proj of a. "
            "Use LoRAs of the same matrices, or --mode gated.",
        ),
        (lambda experts: experts[:2], "method.top_k: 3 is more than the 2 LoRAs. Lower it."),
    ],
)
def test_what_arrow_cannot_route_is_refused(world: Callable[..., Any], change: Any, message: str) -> None:
    model, experts = world("llama")
    with pytest.raises(UsageError) as refused:
        build_mixture(model, change(experts), mode="arrow", method=MethodConfig(top_k=3))
    assert str(refused.value) == message


# -- xlora -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_xlora_of_one_lora_is_that_lora(world: Callable[..., Any], kind: str) -> None:
    model, experts = world(kind, 1)
    with build_mixture(model, experts, mode="linear"):
        wanted = logits(model)
    with xlora(model, experts):
        assert close(logits(model), wanted)


@pytest.mark.parametrize(
    "settings", [{}, {"layerwise_scalings": True, "temperature": 0.5}, {"top_k": 2, "xlora_depth": 3, "xlora_size": 5}]
)
def test_xlora_is_what_peft_makes_of_the_same_folders(
    world: Callable[..., Any], lora_folders: Callable[..., list[Path]], settings: dict[str, Any]
) -> None:
    model, experts = world("llama")
    mixture = xlora(model, experts, **settings, scale=0.7)
    fresh = copy.deepcopy(model)
    fresh.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        adapters={str(i): str(folder) for i, folder in enumerate(lora_folders("llama"))},
        softmax_temperature=settings.get("temperature", 1.0),
        layerwise_scalings=settings.get("layerwise_scalings", False),
        top_k_lora=settings.get("top_k"),
        xlora_depth=settings.get("xlora_depth", 1),
        xlora_size=settings.get("xlora_size", 2048),
        global_scaling_weight=0.7,
    )
    by_hand = peft.get_peft_model(fresh, config).eval()
    by_hand.base_model.internal_xlora_classifier.load_state_dict(mixture.classifier.state_dict())
    with mixture:
        found, inside = logits(model), mixture.gates()
    assert torch.equal(found, logits(by_hand))
    scalings = by_hand.get_latest_scalings().mean(1)  # [B, matrices, N]
    assert len(inside) == (scalings.shape[1] if "layerwise_scalings" in settings else 1)
    if "top_k" not in settings:
        assert all(torch.allclose(inside[site], scalings[:, place]) for place, site in enumerate(inside))
    else:
        assert all((gate.sum(-1) < 1).all() for gate in inside.values())  # not rescaled


def test_xlora_of_mixed_ranks_and_matrices_is_its_formula(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    mixed = [_cut(experts[0], 1), drop(experts[1], lambda matrix: "mlp" in matrix), experts[2]]
    mixture = xlora(model, mixed)
    with torch.no_grad():
        ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        p = mixture.classifier.layers(hidden).softmax(-1)
    fresh = copy.deepcopy(model)
    for i, expert in enumerate(mixed):
        for matrix, factor in expert.factors.items():
            delta, weight = factor.delta(), p[..., i : i + 1]
            fresh.get_submodule(matrix).register_forward_hook(
                lambda _, args, y, delta=delta, weight=weight: y + weight * (args[0] @ delta.T)
            )
    with mixture:
        assert close(logits(model), logits(fresh))


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_masked_lora_leaves_its_share_to_the_others(world: Callable[..., Any], layerwise: bool) -> None:
    model, experts = world("llama")
    base = logits(model)
    mixture = xlora(model, experts, layerwise_scalings=layerwise)
    with mixture:
        whole, before = logits(model), mixture.gates()
        mixture.mask("b.c")
        masked = logits(model)
        for gate in mixture.gates().values():
            assert (gate[:, 1] == 0).all()
            assert torch.allclose(gate.sum(-1), torch.ones(2))
        mixture.mask(*NAMES)
        assert torch.equal(logits(model), base)
        assert mixture.gates() == {}
        mixture.mask()
        assert torch.equal(logits(model), whole)
        assert all(torch.equal(gate, before[site]) for site, gate in mixture.gates().items())
        mixture.only("d")
        alone = logits(model)
    # The classifier without the masked one's rows is the classifier of the others.
    others = xlora(model, [experts[0], experts[2]], layerwise_scalings=layerwise)
    for own, part in zip(mixture.classifier.parameters(), others.classifier.parameters(), strict=True):
        part.data = own.data.unflatten(0, (-1, 3))[:, [0, 2]].flatten(0, 1)
    with others:
        assert close(logits(model), masked)
    with build_mixture(model, experts[2:], mode="linear"):
        assert close(logits(model), alone)


def test_padding_is_left_out_of_the_mean(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    ids = torch.randint(6, 200, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mixture = xlora(model, experts)
    with mixture, torch.no_grad():
        model(input_ids=ids)
        alone = mixture.gates()["network"]
        model(input_ids=padded, attention_mask=(padded != 0).long())
        assert torch.allclose(mixture.gates()["network"], alone, atol=1e-6)


def test_xlora_generates_without_a_cache_whoever_asks(world: Callable[..., Any], make_tiny: Callable[..., Any]) -> None:
    model, experts = world("llama")
    backbone = Causal(model, make_tiny("llama").tokenizer)
    ids = torch.tensor([[2, 70, 71, 72]])
    mixture = xlora(model, experts)
    with mixture:
        rows = ids
        for _ in range(6):  # one token after another, by plain calls
            with torch.no_grad():
                rows = torch.cat([rows, model(input_ids=rows).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6), rows)  # type: ignore[operator]
        wanted = [backbone.generate([prompt], max_new_tokens=6)[0] for prompt in ("one two", "three")]
        assert backbone.generate(["one two", "three"], max_new_tokens=6) == wanted
        with pytest.raises(RunError) as refused:
            model(input_ids=ids, use_cache=True)
    assert str(refused.value) == (
        "generation: X-LoRA runs the model twice per call, so a key-value cache would get every token twice. "
        "Write use_cache=False."
    )
    with torch.no_grad():
        assert model(input_ids=ids).past_key_values is not None


def test_only_the_classifier_learns_in_float32(world: Callable[..., Any]) -> None:
    model, experts = world("llama")
    model.to(torch.bfloat16)
    mixture = xlora(model, experts)
    assert {parameter.dtype for parameter in mixture.named_parameters().values()} == {torch.float32}
    with mixture:
        out = model(input_ids=torch.tensor([[2, 70, 71]])).logits
        out.float().square().mean().backward()
        assert out.dtype == torch.bfloat16
        assert all(parameter.grad.any() for parameter in mixture.named_parameters().values())  # type: ignore[union-attr]
        assert not any(p.requires_grad for name, p in model.named_parameters())


def test_xlora_refuses_what_it_cannot_read(world: Callable[..., Any]) -> None:
    with pytest.raises(UsageError) as refused:
        build_mixture(*world("t5"), mode="xlora")
    assert str(refused.value) == (
        "--mode xlora: PEFT's X-LoRA reads the last hidden states of a decoder-only model, and the base is an "
        "encoder-decoder. Use --mode gated."
    )
    with pytest.raises(UsageError, match=r"method.top_k: 4 is more than the 3 LoRAs"):
        build_mixture(*world("llama"), mode="xlora", method=MethodConfig(top_k=4))


@pytest.mark.parametrize("mode", ["arrow", "xlora"])
def test_a_pipeline_is_refused(tiny_sd: Any, mode: str) -> None:
    from molecli.bases.diffusion import Diffusion
    from molecli.mixture.layout import host_of

    shapes = Diffusion(tiny_sd).matrices()
    name = next(n for n, shape in shapes.items() if len(shape) == 2)
    expert = Expert("a", {name: LowRank(torch.ones(1, shapes[name][1]), torch.ones(shapes[name][0], 1), 1.0)})
    with pytest.raises(UsageError) as refused:
        build_mixture(host_of(tiny_sd), [expert], mode=mode)
    assert str(refused.value) == (
        f"--mode {mode}: PEFT routes only in language models, and the base is a diffusion pipeline. "
        "Write gated, linear or another mode for a diffusion pipeline."
    )


def _cut(expert: Expert, rank: int) -> Expert:
    return replace(expert, factors={m: replace(f, A=f.A[:rank], B=f.B[:, :rank]) for m, f in expert.factors.items()})


def _with_first_direction(expert: Expert) -> Expert:
    """The expert with one direction far above its others."""

    def clear(low_rank: LowRank) -> LowRank:
        U, S, Vh = torch.linalg.svd(low_rank.B @ low_rank.A, full_matrices=False)
        sizes = S[0] * torch.tensor([1.0, 0.2, 0.1])[: low_rank.rank]
        return replace(low_rank, A=Vh[: low_rank.rank], B=U[:, : low_rank.rank] * sizes)

    return replace(expert, factors={m: clear(f) for m, f in expert.factors.items()})
