"""What gates learn from pictures: every term reaches every gate, and CLIP's falls when it is minimised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_clip import build_tiny_clip
from tiny_pipelines import attention_only, make_expert
from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.config import ClipConfig, GateConfig, ImageConfig, ObjectiveConfig
from molecli.errors import UsageError
from molecli.files.concepts import Concept
from molecli.functional.gating import balance_loss
from molecli.images.clip_guidance import ClipGuide, Theme, found_in, predicted_clean, random_crops, themes
from molecli.images.denoising import Prompts
from molecli.images.objective import Objective, check_objective
from molecli.images.pictures import Album, concept_pictures, concept_rows
from molecli.metrics.clip import load_clip
from molecli.mixture.build import build_mixture

# The tiny encoder takes 16 letters.
pytestmark = pytest.mark.filterwarnings("ignore::molecli.bases.prompt_limits.PromptCut")
NAMES = ("cat", "hat", "owl")
TERMS = {
    "denoise": {},
    "collage": {"collage": 1.0},
    "clip": {"denoise": 0.0, "clip": 1.0},
    "clip_local": {"denoise": 0.0, "clip_local": 1.0},
    "all": {"collage": 0.5, "clip": 0.5, "clip_local": 0.5},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_clip(ClipConfig(model=str(build_tiny_clip(tmp_path_factory.mktemp("clip")))))


@pytest.fixture
def concepts(tmp_path: Path) -> dict[str, Concept]:
    found = {}
    for name, colour in zip(NAMES, ("red", "green", "blue"), strict=True):
        (tmp_path / name).mkdir()
        for i in range(1 + (name == "cat")):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{i}.png")
        found[name] = Concept(name, f"a {name}", name, "object", str(tmp_path / name))
    return found


@pytest.fixture
def build(make_pipeline: Callable[..., Any], concepts: dict[str, Concept], clip: Any) -> Callable[..., Any]:
    """`build(kind="sd", text=True, **objective)` -> (objective, its mixture, the rows), the mixture not attached."""

    def make(
        kind: str = "sd", *, text: bool = True, guidance: float | None = 2.0, **settings: Any
    ) -> tuple[Any, Any, Any]:
        backbone = Diffusion(make_pipeline(kind), kind)
        names = {n: s for n, s in backbone.matrices().items() if attention_only(n) and (text or n.startswith("unet."))}
        experts = [make_expert(name, names, seed=i) for i, name in enumerate(NAMES)]
        gate = GateConfig(granularity="block", normalize="unit")
        mixture = build_mixture(backbone.model, experts, mode="gated", gate=gate)
        pictures = concept_pictures(NAMES, concepts)
        config = ObjectiveConfig(**{"clip_steps": 2, **settings})
        told = Prompts(backbone, backbone.resolution, keep=not text)
        guide = None
        if config.clip or config.clip_local:
            guide = ClipGuide(
                backbone, clip, themes((), list(concepts.values())), told, ImageConfig(guidance=guidance),
                steps=config.clip_steps, local=config.clip_local > 0,
            )  # fmt: skip
        album = Album(pictures, backbone.resolution)
        objective = Objective(backbone, mixture, album, concepts, config, told, guide)
        return objective, mixture, concept_rows(pictures)

    return make


@pytest.mark.parametrize("term", list(TERMS))
@pytest.mark.parametrize(("kind", "text"), [("sd", True), ("sd", False), ("sdxl", True), ("sd2", True)])
def test_a_gradient_reaches_every_gate(build: Any, term: str, kind: str, text: bool) -> None:
    objective, mixture, rows = build(kind, text=text, **TERMS[term])
    with mixture:
        torch.manual_seed(0)
        found = objective(rows[:2])
        found.sum.backward()
    biases = {name: p.grad for name, p in mixture.named_parameters().items() if name.endswith("head.bias")}
    assert any(name.startswith("site/text_encoder") for name in biases) == text
    assert all(grad is not None and bool(grad.any()) for grad in biases.values())


def test_the_terms_are_added_with_their_weights_and_logged(build: Any) -> None:
    objective, mixture, rows = build(**{**TERMS["all"], "denoise": 2.0})
    with mixture, torch.no_grad():
        found = objective(rows[:2])
    terms = {name: float(value) for name, value in found.extras.items()}
    assert set(terms) == {"denoise", "clip", "clip_local"}
    expected = 2.0 * terms["denoise"] + 0.5 * terms["clip"] + 0.5 * terms["clip_local"]
    assert float(found.sum) / found.count == pytest.approx(expected, rel=1e-5)


def test_the_gates_of_every_pass_are_balanced_and_live(build: Any) -> None:
    objective, mixture, rows = build(clip=1.0)
    randomise_biases(mixture)
    with mixture:
        gates = objective(rows[:2]).gates
        balance_loss(gates.flatten(0, 1).mean(0)).backward()
    assert gates.shape == (len(mixture.sites), 2 + 2 * 2, 3)  # two pictures to denoise, two guided ones
    grads = [p.grad for name, p in mixture.named_parameters().items() if name.endswith("head.bias")]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def randomise_biases(mixture: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters().items():
            if name.endswith("head.bias"):
                parameter.normal_()


@pytest.mark.parametrize("term", ["clip", "clip_local"])
def test_the_clip_loss_falls_when_it_alone_is_minimised(build: Any, term: str) -> None:
    objective, mixture, rows = build(guidance=1.0, **{**TERMS[term], "clip_steps": 1})
    optimizer = torch.optim.Adam(mixture.named_parameters().values(), lr=0.05)
    losses = []
    with mixture:
        for _ in range(12):
            torch.manual_seed(1)  # the same noise, prompts and crops
            optimizer.zero_grad()
            found = objective(rows[:2])
            found.sum.backward()
            optimizer.step()
            losses.append(float(found.sum.detach()))
    assert losses[-1] < losses[0] - 0.005
    assert min(losses) == pytest.approx(losses[-1], abs=0.02)


def test_the_share_of_collages_is_what_is_asked_for(build: Any) -> None:
    objective, _, rows = build(collage=0.5)
    torch.manual_seed(0)
    prompts = [prompt for _ in range(40) for prompt in objective.shown(rows)[1]]
    joint = sum(" and " in prompt for prompt in prompts)
    assert 0.35 < joint / len(prompts) < 0.65
    kept = objective.latents.clone()
    clean, prompts = objective.shown(rows)
    assert torch.equal(objective.latents, kept)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        assert torch.equal(clean[i], kept[row.picture]) == (" and " not in prompt)


def test_without_collages_no_random_number_is_drawn_for_them(build: Any) -> None:
    objective, _, rows = build()
    torch.manual_seed(0)
    clean, prompts = objective.shown(rows)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())
    assert prompts == [row.prompt for row in rows]
    assert torch.equal(clean, objective.latents[[row.picture for row in rows]])


def test_every_concept_has_as_many_rows(concepts: dict[str, Concept]) -> None:
    rows = concept_rows(concept_pictures(NAMES, concepts))
    assert [row.task for row in rows] == ["cat", "hat", "owl"] * 2
    assert [row.picture for row in rows] == [0, 2, 3, 1, 2, 3]


# -- guidance --------------------------------------------------------------------------------------------------------


def test_prompts_join_every_two_and_three_concepts(concepts: dict[str, Concept]) -> None:
    found = themes((), list(concepts.values()))
    assert [theme.prompt for theme in found] == [
        "a cat and a hat", "a cat and a owl", "a hat and a owl", "a cat, a hat and a owl",
    ]  # fmt: skip
    assert found[-1].parts == ("a cat", "a hat", "a owl")


def test_a_prompt_of_one_s_own_names_the_concepts_whose_words_it_has(concepts: dict[str, Concept]) -> None:
    found = themes(("a Cat in a hat", "a tree"), list(concepts.values()))
    assert found == [Theme("a Cat in a hat", ("a cat", "a hat")), Theme("a tree", ("a tree",))]


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_the_right_output_predicts_the_clean_latents(make_pipeline: Any, kind: str) -> None:
    backbone = Diffusion(make_pipeline(kind))
    clean, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([600, 600])
    noisy = backbone.noising.add_noise(clean, noise, times)
    output = backbone.target(clean, noise, times)
    torch.testing.assert_close(predicted_clean(backbone.noising, noisy, output, 600), clean, rtol=1e-3, atol=1e-4)


def test_pictures_that_guide_are_drawn_at_the_bases_scale_unless_told(build: Any) -> None:
    def loss(guidance: float | None) -> float:
        objective, mixture, rows = build(guidance=guidance, clip=1.0, denoise=0.0)
        with mixture, torch.no_grad():
            torch.manual_seed(0)
            return float(objective(rows[:2]).sum)

    assert loss(None) == loss(7.5) != loss(2.5)


def unit(*rows: tuple[float, ...]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows).float(), dim=-1)


def test_every_part_must_be_found_in_some_crop() -> None:
    parts = unit((1, 0, 0), (0, 1, 0))
    both = found_in(unit((1, 0, 0), (0, 1, 0), (0, 0, 1)), parts)
    one = found_in(unit((1, 0, 0), (1, 0, 0), (1, 0, 0)), parts)
    assert float(both) < 0.01
    assert float(one) == pytest.approx(0.5, abs=0.01)


def test_crops_have_one_size_and_follow_the_seed() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    first = random_crops(pixels)
    torch.manual_seed(0)
    assert torch.equal(first, random_crops(pixels))
    assert first.shape[1:] == (3, 8, 8)
    assert not torch.equal(first[0], first[1])


# -- what is refused -------------------------------------------------------------------------------------------------

ONE = [Concept("cat", "a cat", "cat")]
PLACE = [*ONE, Concept("sea", "the sea", "sea", "background")]


@pytest.mark.parametrize(
    ("settings", "known", "message"),
    [
        ({"denoise": 0.0}, PLACE, "objective: every term has weight 0, so the gates would learn nothing. "
         "Write --denoise 1, or --clip 1."),
        ({"prompts": ("x",)}, PLACE, "objective.prompts: prompts are for CLIP guidance, and both CLIP terms have "
         "weight 0. Write --clip 1, or leave them out."),
        ({"clip": 1.0}, ONE, "objective.clip: the prompts for CLIP guidance name two concepts or more, and there is "
         "only one. Write objective.prompts, or --clip 0."),
        ({"collage": 0.5, "denoise": 0.0, "clip": 1.0}, PLACE, "objective.collage: collages are pictures to denoise, "
         "and that term has weight 0. Write --denoise 1, or --collage 0."),
        ({"collage": 0.5}, PLACE, "objective.collage: a collage shows two things or more, and the LoRAs add 1 "
         "(styles and backgrounds do not count). Give another LoRA, or write --collage 0."),
    ],
)  # fmt: skip
def test_settings_that_teach_nothing_or_are_ignored(settings: Any, known: list[Concept], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_objective(ObjectiveConfig(**settings), known)
    assert str(caught.value) == message
