"""The invariants of the engine on diffusion pipelines, each on the shapes of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gates import close, copy_permuted, drop, randomise
from reference import NaivePipelineGate, NaivePipelineMixture
from tiny_pipelines import PIPELINES, TOKENS, make_expert
from torch import Tensor, nn

from molecli.adapters import write_diffusers
from molecli.bases.diffusion import Diffusion
from molecli.config import GateConfig
from molecli.experts import Expert, LowRank
from molecli.files.composition import Composition, load_composition, record_of, save_composition
from molecli.functional.gating import balance_loss
from molecli.mixture.attach import attach
from molecli.mixture.build import build_mixture
from molecli.mixture.mixture import Mixture

CONFIGS = [
    {"granularity": g, "input": i, "normalize": n, "pool": p, "head": h}
    for g, i, n, p, h in (
        ("block", "hidden", "standardize", "auto", "full"),
        ("layer", "hidden", "unit", "token", "full"),
        ("network", "hidden", "unit", "mean", "low_rank"),
        ("matrix", "hidden", "standardize", "token", "full"),
        ("block", "experts", "unit", "mean", "full"),
        ("layer", "experts", "unit", "token", "per_expert"),
        ("matrix", "experts", "none", "mean", "low_rank"),
        ("layer", "experts", "standardize", "mean", "per_expert"),
        ("network", "none", "unit", "mean", "full"),
    )
]
# Every way to gate on one shape, and the ways that meet what is particular of the others on those.
PARTICULAR = {"sd": range(len(CONFIGS)), "sd2": (0,), "sdxl": (0, 2, 5)}
VARIANTS = pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(kind, CONFIGS[i], id="-".join((kind, *map(str, CONFIGS[i].values()))))
        for kind, chosen in PARTICULAR.items()
        for i in chosen
    ],
    indirect=["kind"],
)
PROMPTS = ["a cat", "two dogs"]


@pytest.fixture(params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backbone(kind: str, make_pipeline: Callable[..., Any]) -> Diffusion:
    return Diffusion(make_pipeline(kind), kind)


@pytest.fixture
def experts(backbone: Diffusion) -> list[Expert]:
    """Three LoRAs of different rank and alpha on every matrix: attention, feed-forward, time, convolutions, CLIP."""
    settings = [{"rank": 4, "alpha": 8}, {"rank": 2, "alpha": 3}, {"rank": 5, "alpha": 4}]
    matrices = backbone.matrices()
    return [
        make_expert(n, matrices, seed=i, scale=0.2, **s) for i, (n, s) in enumerate(zip("abc", settings, strict=True))
    ]  # type: ignore[arg-type]


@pytest.fixture
def batch(backbone: Diffusion) -> dict[str, Any]:
    """Two pictures to denoise, at a late and an early time."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1,
        "prompts": PROMPTS,
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([900, 40]),
    }


def latents(backbone: Diffusion, prompts: list[str] = PROMPTS, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    """What the pipeline's own call makes, with guidance."""
    return backbone.pipe(
        prompts, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip


@torch.no_grad()
def prediction(backbone: Diffusion, batch: Mapping[str, Any]) -> Tensor:
    """One pass of text encoder(s) and UNet, in which rounding has no steps to grow over."""
    return backbone.predict(batch["noise"], batch["timesteps"], backbone.encode(batch["prompts"]))


def gated(backbone: Diffusion, experts: list[Expert], **config: Any) -> Mixture:
    mixture = build_mixture(backbone.model, experts, mode="gated", gate=GateConfig(**config))
    randomise(mixture, sharpness=1.0)  # sharper, and rounding decides between experts: there are many sites in a row
    return mixture


def write(expert: Expert, folder: Path) -> Path:
    return write_diffusers(folder, expert.factors)


# 1, 2 ---------------------------------------------------------------------------------------------------------------


def test_one_expert_equals_diffusers_with_that_adapter(
    backbone: Diffusion, kind: str, experts: list[Expert], tmp_path: Path, make_pipeline: Callable[..., Any]
) -> None:
    base = latents(backbone)
    for expert in experts:
        folder = write(expert, tmp_path / expert.name)
        other = Diffusion(make_pipeline(kind))
        other.pipe.load_lora_weights(folder, adapter_name="x")
        other.pipe.set_adapters(["x"])
        expected = latents(other)
        assert not close(expected, base, 1e-2)  # the adapter matters
        for mode in ("linear", "nla", "single", "gated"):
            with attach(backbone.pipe, loras={"x": str(folder)}, mode=mode):
                assert close(latents(backbone), expected, 1e-4)


@pytest.mark.parametrize(("mode", "weight"), [("gated", 1 / 3), ("nla", 1 / 3), ("linear", 1.0)])
def test_fixed_gates_equal_diffusers_with_several_adapters(
    backbone: Diffusion,
    kind: str,
    experts: list[Expert],
    tmp_path: Path,
    make_pipeline: Callable[..., Any],
    mode: str,
    weight: float,
) -> None:
    folders = {expert.name: str(write(expert, tmp_path / expert.name)) for expert in experts}
    other = Diffusion(make_pipeline(kind))
    for name, folder in folders.items():
        other.pipe.load_lora_weights(folder, adapter_name=name)
    other.pipe.set_adapters(list(folders), [weight] * 3)
    with attach(backbone.pipe, loras=folders, mode=mode):  # fresh gates are uniform
        assert close(latents(backbone), latents(other), 1e-4)


def test_weights_equal_diffusers_adapter_weights(
    backbone: Diffusion, kind: str, experts: list[Expert], tmp_path: Path, make_pipeline: Callable[..., Any]
) -> None:
    weights = {"a": 0.8, "b": -0.5}
    folders = {name: str(write(experts["abc".index(name)], tmp_path / name)) for name in weights}
    other = Diffusion(make_pipeline(kind))
    for name, folder in folders.items():
        other.pipe.load_lora_weights(folder, adapter_name=name)
    other.pipe.set_adapters(list(weights), list(weights.values()))
    with attach(backbone.pipe, loras=folders, mode="linear", weights=weights):
        assert close(latents(backbone), latents(other), 1e-4)


# 3 ------------------------------------------------------------------------------------------------------------------


@VARIANTS
def test_masks_reach_the_base_and_each_expert(
    backbone: Diffusion, experts: list[Expert], config: dict[str, Any]
) -> None:
    base = latents(backbone)
    with gated(backbone, experts, **config) as mixture:
        everything = latents(backbone)
        mixture.mask("a", "b", "c")
        assert torch.equal(latents(backbone), base)
        mixture.mask("a", "c")
        alone = latents(backbone)
        mixture.mask()
        assert torch.equal(latents(backbone), everything)
        mixture.only("b")
        assert torch.equal(latents(backbone), alone)
    assert torch.equal(latents(backbone), base)
    assert not close(everything, alone, 1e-2)
    with build_mixture(backbone.model, [experts[1]], mode="single"):
        assert close(alone, latents(backbone), 1e-4)


# 4 ------------------------------------------------------------------------------------------------------------------


@VARIANTS
def test_permuting_experts_permutes_gates_and_changes_no_output(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], config: dict[str, Any]
) -> None:
    order = [2, 0, 1]
    with gated(backbone, experts, **config) as mixture:
        before, gates = prediction(backbone, batch), mixture.gates()
    permuted = build_mixture(
        backbone.model, [experts[i] for i in order], mode="gated", gate=GateConfig.model_validate(config)
    )
    for site, gate in permuted.gate_modules().items():
        copy_permuted(mixture.gate_modules()[site], gate, order, experts, mixture, site)
    with permuted:
        after, moved = prediction(backbone, batch), permuted.gates()
    assert close(after, before, 1e-4)
    assert max(float((g[:, 0] - g[:, 1]).abs().max()) for g in gates.values()) > 0.1
    for site in gates:
        assert torch.allclose(moved[site], gates[site][:, order], atol=1e-3)


# 5 ------------------------------------------------------------------------------------------------------------------


def uneven(experts: list[Expert]) -> list[Expert]:
    """Experts of different ranks that adapt different matrices: all, attention and CLIP alone, not the queries."""
    return [
        experts[0],
        drop(experts[1], lambda m: "attn" in m or "conv2" in m),
        drop(experts[2], lambda m: not m.endswith(("to_q", "q_proj", "conv1"))),
    ]


def run(backbone: Diffusion, batch: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The prediction, its loss, and the gradient of every parameter."""
    for parameter in parameters.values():
        parameter.grad = None
    total, count = backbone.denoise_loss(batch)
    (total / count).backward()
    predicted = prediction(backbone, batch)
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return {"": predicted, **gradients}


def same(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients by the largest of them: those of a gate that hardly acts are rounding alone."""
    assert values.keys() == expected.keys()
    assert close(values.pop(""), expected.pop(""), 1e-4)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in values.items():
        assert torch.allclose(gradient, expected[name], atol=2e-4 * largest, rtol=1e-3), name


@VARIANTS
def test_stacked_equals_a_naive_loop_in_values_and_gate_gradients(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], config: dict[str, Any]
) -> None:
    mixed = uneven(experts)
    mixture = gated(backbone, mixed, **config)
    parameters = mixture.named_parameters()
    with mixture:
        values = run(backbone, batch, parameters)
    gate = NaivePipelineGate(mixture, backbone.model, config)
    with NaivePipelineMixture(backbone.model, mixed, mixture.sites, gate):
        expected = run(backbone, batch, parameters)
    same(values, expected)


def test_an_absent_expert_can_hand_its_gate_to_the_others(backbone: Diffusion, experts: list[Expert]) -> None:
    half = drop(experts[1], lambda m: "attn" in m)
    with build_mixture(backbone.model, [experts[0], half], mode="gated", gate=GateConfig(absent="renormalize")):
        shared = latents(backbone)
    # Uniform gates: 1/2 each where both are present, and all of it to expert 0 elsewhere.
    doubled = {m: LowRank(f.A, f.B, f.scaling * (1 if m in half.factors else 2)) for m, f in experts[0].factors.items()}
    with build_mixture(backbone.model, [Expert("a", doubled), half], mode="nla"):
        assert close(shared, latents(backbone), 1e-4)


# 6 ------------------------------------------------------------------------------------------------------------------


@VARIANTS
def test_a_training_step_reaches_every_gate_and_nothing_else(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], config: dict[str, Any]
) -> None:
    frozen = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    frozen |= {f"vae.{k}": v.clone() for k, v in backbone.pipe.vae.state_dict().items()}
    factors = [(f.A.clone(), f.B.clone()) for e in experts for f in e.factors.values()]
    with build_mixture(backbone.model, experts, mode="gated", gate=GateConfig(**config)) as mixture:
        parameters = mixture.named_parameters()
        optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
        before = latents(backbone)
        for _ in range(2):
            optimiser.zero_grad()
            backbone.denoise_loss(batch)[0].backward()
            reached = {k.split("/")[1] for k, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
            assert reached == set(mixture.gate_modules())
            optimiser.step()
        assert not torch.equal(latents(backbone), before)  # the gates act on the output
    now = backbone.model.state_dict() | {f"vae.{k}": v for k, v in backbone.pipe.vae.state_dict().items()}
    assert now.keys() == frozen.keys()
    for key, value in now.items():
        assert torch.equal(value, frozen[key]), key
    for (A, B), factor in zip(factors, [f for e in experts for f in e.factors.values()], strict=True):
        assert torch.equal(A, factor.A)
        assert torch.equal(B, factor.B)


def test_the_balance_loss_carries_gradient_to_unet_and_text_encoder(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any]
) -> None:
    with gated(backbone, experts, granularity="block") as mixture:
        backbone.denoise_loss(batch)
        balance_loss(mixture.stacked_gates().mean((0, 1))).backward()
        grads = {k: p.grad for k, p in mixture.named_parameters().items() if k.endswith("head.bias")}
    assert {key.split("/")[1].split(".")[0] for key in grads} >= {"unet", "text_encoder"}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


def test_the_gates_of_a_guided_step_stack_with_those_of_the_text(backbone: Diffusion, experts: list[Expert]) -> None:
    with gated(backbone, experts, granularity="network") as mixture:
        latents(backbone)
        gates, stacked = mixture.gates(), mixture.stacked_gates()
    assert gates["text_encoder"].shape == (2, 3)  # the two prompts
    assert gates["unet"].shape == (4, 3)  # unconditional, then conditional
    assert stacked.shape == (len(gates), 4, 3)
    assert torch.equal(stacked[list(gates).index("text_encoder")], gates["text_encoder"].repeat(2, 1))


@VARIANTS
def test_gradient_checkpointing_changes_no_gradient(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], config: dict[str, Any]
) -> None:
    mixture = gated(backbone, uneven(experts), **config)
    parameters = mixture.named_parameters()
    with mixture:
        expected = run(backbone, batch, parameters)
        gates = mixture.gates()
        backbone.pipe.unet.enable_gradient_checkpointing()
        calls = count_calls(backbone.pipe.unet)
        values = run(backbone, batch, parameters)
        backbone.pipe.unet.disable_gradient_checkpointing()
    assert calls["block"] == 3  # forward, recomputed, and without gradient
    same(values, expected)
    for site, gate in mixture.gates().items():
        assert torch.allclose(gate, gates[site])


def count_calls(unet: nn.Module) -> dict[str, int]:
    """How often the first residual block has run since."""
    calls = {"block": 0}
    first = dict(unet.named_modules())["down_blocks.0.resnets.0"]
    # Before, since torch breaks a recomputation off as soon as it has what it needs.
    first.register_forward_pre_hook(lambda *_: calls.__setitem__("block", calls["block"] + 1))
    return calls


# 7 ------------------------------------------------------------------------------------------------------------------


@VARIANTS
def test_a_picture_depends_on_neither_its_batch_nor_the_one_before(
    backbone: Diffusion, experts: list[Expert], config: dict[str, Any]
) -> None:
    prompts, seeds = ["a cat", "two dogs", "x"], (1, 2, 3)
    with gated(backbone, experts, **config):
        together = latents(backbone, prompts, seeds)
        alone = [latents(backbone, [prompt], (seed,)) for prompt, seed in zip(prompts, seeds, strict=True)]
        backwards = latents(backbone, prompts[::-1], seeds[::-1])
    assert close(together, torch.cat(alone), 1e-4)
    assert close(together, backwards.flip(0), 1e-4)
    assert not close(alone[0], alone[1], 1e-2)


def test_latents_are_those_that_are_decoded_into_the_picture(backbone: Diffusion, experts: list[Expert]) -> None:
    with gated(backbone, experts), torch.no_grad():
        drawn = torch.stack(backbone.generate(["a cat"], seeds=[3], steps=2, latent=True))
        picture = np.asarray(backbone.generate(["a cat"], seeds=[3], steps=2)[0], dtype=float)
        decoded = backbone.decode(drawn)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(picture - decoded).max() <= 1  # a picture has whole numbers


# 8 ------------------------------------------------------------------------------------------------------------------


@VARIANTS
def test_a_saved_mixture_draws_the_same_bits(
    backbone: Diffusion,
    kind: str,
    experts: list[Expert],
    config: dict[str, Any],
    tmp_path: Path,
    make_pipeline: Callable[..., Any],
) -> None:
    folders = {expert.name: str(write(expert, tmp_path / expert.name)) for expert in experts}
    mixture = attach(backbone.pipe, loras=folders, mode="gated", gate=GateConfig(**config))
    randomise(mixture, sharpness=1.0)
    with mixture:
        drawn = latents(backbone)
    composition = Composition(
        mode="gated",
        level="site",
        base="",
        base_fingerprint=backbone.fingerprint(),
        experts=tuple(record_of(expert) for expert in mixture.bank.experts),
        gate=GateConfig(**config).model_dump(),
        settings={},
        recipe="",
        tensors=mixture.state_dict(),
    )
    save_composition(tmp_path / "composition.safetensors", composition)
    other = Diffusion(make_pipeline(kind))
    with attach(other.pipe, composition=str(tmp_path / "composition.safetensors")):
        assert torch.equal(latents(other), drawn)
    assert load_composition(tmp_path / "composition.safetensors").mode == "gated"


def test_leaving_the_context_leaves_the_pipeline(backbone: Diffusion, experts: list[Expert]) -> None:
    weights = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    drawn = latents(backbone)
    hooks = hook_count(backbone.model)  # transformers puts its own on in the first pass
    with gated(backbone, experts) as mixture:
        assert hook_count(backbone.model) > hooks
        assert not torch.equal(latents(backbone), drawn)
    assert hook_count(backbone.model) == hooks
    assert torch.equal(latents(backbone), drawn)
    assert all(torch.equal(value, weights[key]) for key, value in backbone.model.state_dict().items())
    with mixture:
        again = latents(backbone)
    with mixture:
        assert torch.equal(latents(backbone), again)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# types --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_train_on_a_pipeline_in_half_precision(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], dtype: torch.dtype
) -> None:
    mixture = gated(backbone, experts, granularity="block")
    with mixture:
        exact = run(backbone, batch, mixture.named_parameters())[""]
    for part in (backbone.model, backbone.pipe.vae):
        part.to(dtype)
    half = {**batch, "noise": batch["noise"].to(dtype)}
    with mixture:
        values = run(backbone, half, mixture.named_parameters())
    assert values.pop("").dtype == dtype
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in values.values())
    assert any(g.abs().sum() > 0 for g in values.values())
    with mixture:
        near = run(backbone, half, {})[""].float()
    assert close(near, exact, 0.2)


def test_channels_last_weights_give_the_same(backbone: Diffusion, experts: list[Expert]) -> None:
    with gated(backbone, experts, granularity="layer"):
        expected = latents(backbone)
        backbone.pipe.unet.to(memory_format=torch.channels_last)
        assert close(latents(backbone), expected, 1e-4)


def test_the_text_is_read_whole(backbone: Diffusion, experts: list[Expert]) -> None:
    assert backbone.encode(["x"]).embeds.shape[1] == TOKENS
    with gated(backbone, experts, granularity="layer", pool="token") as mixture:
        latents(backbone)
        site = next(s for s in mixture.sites if s.name.endswith("attn2.memory"))
        assert mixture._hosted[site.name].value.shape == (4, TOKENS, 3)  # type: ignore[union-attr]


# what is kept between steps and folded for them -----------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_what_is_kept_of_the_text_is_made_anew_when_anything_it_rests_on_changes(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], granularity: str
) -> None:
    conditions = [backbone.encode(batch["prompts"]), backbone.encode(["x", "y"])]

    def predicted(condition: int = 0) -> Tensor:
        with torch.no_grad():
            return backbone.predict(batch["noise"], batch["timesteps"], conditions[condition])

    def same_as_fresh(mixture: Mixture, condition: int = 0) -> Tensor:
        found = predicted(condition)
        for group in mixture._groups:
            group.kept = None
        assert torch.equal(found, predicted(condition))
        return found

    with gated(backbone, experts, granularity=granularity) as mixture:
        seen = [predicted(), same_as_fresh(mixture)]
        assert torch.equal(*seen)
        gates = mixture.gates()
        assert any(group.kept for group in mixture._groups)
        predicted()
        assert all(torch.equal(gates[site], gate) for site, gate in mixture.gates().items())
        seen = [seen[0], same_as_fresh(mixture, 1)]
        mixture.mask("a")
        seen.append(same_as_fresh(mixture))
        mixture.mask("b")
        seen.append(same_as_fresh(mixture))
        mixture.mask()
        assert torch.equal(same_as_fresh(mixture), seen[0])
        with torch.no_grad():
            for parameter in mixture.named_parameters().values():
                parameter.mul_(-1)
        seen.append(same_as_fresh(mixture))
        with torch.no_grad():
            conditions[0].embeds.mul_(-1)
        seen.append(same_as_fresh(mixture))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("head", ["full", "low_rank"])
def test_a_gate_without_gradients_weighs_as_with_them(
    backbone: Diffusion, experts: list[Expert], batch: dict[str, Any], head: str
) -> None:
    with gated(backbone, experts, normalize="standardize", head=head) as mixture:
        generator = torch.Generator().manual_seed(1)
        for gate in mixture.gate_modules().values():
            gate.mean.copy_(torch.randn(gate.mean.shape, generator=generator))
            gate.std.copy_(0.5 + torch.rand(gate.std.shape, generator=generator))
        for sign in (1, -1):
            with torch.no_grad():
                for parameter in mixture.named_parameters().values():
                    parameter.mul_(sign)
            expected = backbone.predict(batch["noise"], batch["timesteps"], backbone.encode(batch["prompts"])).detach()
            gates = mixture.gates()
            assert close(prediction(backbone, batch), expected, 1e-5)
            assert all(torch.allclose(gate, gates[site], atol=1e-5) for site, gate in mixture.gates().items())
