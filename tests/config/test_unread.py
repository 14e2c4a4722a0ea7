"""A setting changes what a mode makes exactly where the mode's row says so; elsewhere the commands refuse it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair, make_pair
from torch import Tensor

from molecli.bases.diffusion import Diffusion
from molecli.catalog.methods import METHODS
from molecli.commands.compose import run_compose
from molecli.commands.evaluate import run_evaluate
from molecli.commands.plan import make_plan
from molecli.commands.sample import run_sample
from molecli.config import ComposeRecipe, EvaluateRecipe, MethodConfig, SampleRecipe, StudyRecipe
from molecli.errors import UsageError
from molecli.experts import Expert, LowRank
from molecli.mixture.attach import attach
from molecli.mixture.branching import Branching
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import host_of
from molecli.study.run import jobs_of

# Another value of every setting.
OTHERS: dict[str, Any] = {
    "scale": 0.5,
    "layers": "0-50",
    "tau": 2,
    "order": ("c", "a", "b"),
    "base_share": 0.1,
    "rank": 1,
    "density": 0.9,
    "seed": 3,
    "expression": "a + b",
    "evaluations": 7,
    "examples": 3,
    "bound": 0.5,
    "l1": 0.5,
    "top_k": 1,
    "temperature": 3.0,
    "xlora_depth": 3,
    "xlora_size": 7,
    "layerwise_scalings": True,
    "on": "updates",
}
# What a mode cannot do without, or where a setting of it says something: one layer has no width.
NEEDED: dict[str, dict[str, Any]] = {"pem": {"expression": "a + 0.5 * b - c"}, "xlora": {"xlora_depth": 2}}
# These say how lorahub looks for its weights (tests of the search), and no more of a mixture that is there.
SEARCHED = {"evaluations", "examples", "bound", "l1"}
TEXT = [name for name, row in METHODS.items() if row.level != "output"]
IMAGES = [name for name, row in METHODS.items() if row.level == "output"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Pair:
    return make_pair(tiny_folder("llama"), tmp_path_factory.mktemp("pair"))


def trio(shapes: dict[str, tuple[int, ...]]) -> list[Expert]:
    """Three LoRAs of one rank."""
    g = torch.Generator().manual_seed(0)

    def factor(shape: tuple[int, ...]) -> LowRank:
        A = torch.randn(4, *shape[1:], generator=g) / torch.Size(shape[1:]).numel() ** 0.5
        return LowRank(A, 0.3 * torch.randn(shape[0], 4, generator=g), 1.5)

    return [Expert(name, {m: factor(shape) for m, shape in shapes.items()}, name, name, 4, 6.0) for name in "abc"]


def changing(found: dict[str, Any], usual: Any) -> set[str]:
    return {key for key, value in found.items() if value != usual}


@pytest.mark.parametrize("mode", TEXT)
def test_a_setting_changes_a_mixture_where_its_row_says_so(tiny_llama: Any, mode: str) -> None:
    model = tiny_llama.model
    experts = trio({n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj")})
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(0))

    def made(**settings: Any) -> list[float]:
        method = MethodConfig(**{**NEEDED.get(mode, {}), **settings})
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            weights = {"a": 1.0, "b": 0.5, "c": -0.3}
            only = "a" if mode == "single" else None
            with build_mixture(model, experts, mode=mode, weights=weights, only=only, method=method) as mixture:
                for parameter in mixture.named_parameters().values():
                    parameter.copy_(0.1 * torch.randn(parameter.shape))
                logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.flatten().tolist()

    usual = made()
    assert made() == usual
    found = {key: made(**{key: value}) for key, value in OTHERS.items()}
    assert changing(found, usual) == set(METHODS[mode].reads) - SEARCHED


@pytest.mark.parametrize("mode", IMAGES)
def test_a_setting_changes_what_acts_on_the_steps_where_its_row_says_so(tiny_sd: Any, mode: str) -> None:
    model = host_of(tiny_sd)
    experts = trio(dict(list(Diffusion(tiny_sd).matrices().items())[::5]))

    def made(**settings: Any) -> Any:
        triggers = {name: f"word {name}" for name in "abc"}
        mixture = build_mixture(model, experts, mode=mode, method=MethodConfig(**settings), triggers=triggers)
        assert isinstance(mixture, Branching)
        acting = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(mixture.method).items()}
        return acting, mixture.bank.matrices

    found = {key: made(**{key: value}) for key, value in OTHERS.items()}
    assert changing(found, made()) == set(METHODS[mode].reads)


def test_every_setting_is_tried() -> None:
    assert set(OTHERS) == set(MethodConfig.model_fields)


# -- refused before anything is loaded -------------------------------------------------------------------------------


def test_compose_refuses_in_plan_and_run(pair: Pair, tmp_path: Path) -> None:
    recipe = pair.recipe(tmp_path / "c", mode="iso", method={"density": 0.3})
    for go in (make_plan, run_compose):
        with pytest.raises(UsageError, match=r"^method\.density: mode iso does not read it\. It reads scale, rank"):
            go(recipe)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("modes", "method", "message"),
    [
        (
            ["ties", "linear"],
            {"top_k": 1},
            r"^method\.top_k: none of the modes ties, linear reads it\. They read scale",
        ),
        (["base", "single"], {"scale": 0.5}, r"^method\.scale: no chosen mode reads it"),
        ([], {"rank": 2}, r"^method\.rank: none of the modes linear, nla reads it"),
    ],
)
def test_evaluate_refuses_in_plan_and_run(
    pair: Pair, tmp_path: Path, modes: list[str], method: dict[str, Any], message: str
) -> None:
    recipe = evaluation(pair, tmp_path, modes=modes, method=method)
    for go in (make_plan, run_evaluate):
        with pytest.raises(UsageError, match=message):
            go(recipe)


def test_modes_that_are_scored_together_share_their_settings(pair: Pair, tmp_path: Path) -> None:
    method = {"expression": "up - down", "on": "updates", "density": 0.5}
    report = run_evaluate(evaluation(pair, tmp_path, modes=["ties", "pem"], method=method))
    assert list(report["methods"]) == ["ties", "pem"]


def evaluation(pair: Pair, output: Path, **more: Any) -> EvaluateRecipe:
    tree: dict[str, Any] = {
        "base": {"id": pair.base},
        "loras": [{"name": name, "source": source} for name, source in pair.loras.items()],
        "eval": {"data": {"suite": "jsonl", "files": pair.files}, "max_new_tokens": 1, "bootstrap": 0},
        "output": str(output),
        "device": "cpu",
    }
    return EvaluateRecipe.model_validate({**tree, **more})


PICTURES = {"base": {"id": "builtin:tiny-sd"}, "device": "cpu"}


def test_pictures_refuse_likewise(tmp_path: Path) -> None:
    asked = {**PICTURES, "modes": ["base", "composite"], "method": {"tau": 2}, "output": str(tmp_path / "out")}
    message = r"^method\.tau: mode composite does not read it\. It reads scale, layers; tau is for switch, w_switch"
    with pytest.raises(UsageError, match=message):
        run_sample(SampleRecipe.model_validate({**asked, "prompts": ["a cat"]}))
    scored = EvaluateRecipe.model_validate({**asked, "eval": {"data": {"suite": "emoji"}}})
    for go in (make_plan, run_evaluate):
        with pytest.raises(UsageError, match=message):
            go(scored)


@pytest.mark.parametrize(("preview", "refused"), [({}, True), ({"preview": ["linear"]}, False)])
def test_a_preview_that_was_asked_for_counts(tmp_path: Path, preview: dict[str, Any], refused: bool) -> None:
    tree = {**PICTURES, "mode": "composite", "method": {"rank": 2}, "evaluate": None, "output": str(tmp_path / "c")}
    with pytest.raises(UsageError, match=r"^method\.rank: mode composite does not read it"):
        make_plan(ComposeRecipe.model_validate(tree))
    tree |= {"mode": "nla", "method": {"scale": 0.5}, **preview}
    if refused:
        with pytest.raises(UsageError, match=r"^method\.scale: mode nla does not read it"):
            make_plan(ComposeRecipe.model_validate(tree))
    else:
        assert make_plan(ComposeRecipe.model_validate(tree)).mode == "nla"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"mine": {"mode": "iso", "method": {"density": 0.3}}}, r"methods\.mine\.method\.density: mode iso does not"),
        ({"iso": {"tune": {"method.top_k": [1, 2]}}}, r"methods\.iso\.method\.top_k: mode iso does not"),
        ({"base": {"method": {"scale": 0.5}}, "nla": {}}, r"methods\.base\.method\.scale: no chosen mode reads it"),
        # A study holds what was written, and no defaults.
        ({"iso": {"method": {"evaluations": 40}}}, r"methods\.iso\.method\.evaluations: mode iso does not"),
    ],
)
def test_a_study_says_which_method_does_not_read_it(methods: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = {"methods": methods, "experts": {"loras": ["a", "b"]}, "fit": {"holdout": 0.1}, "output": str(tmp_path)}
    with pytest.raises(UsageError, match=f"^{message}"):
        jobs_of(StudyRecipe.model_validate(tree))


def test_attach_refuses_too(pair: Pair, tiny_llama: Any) -> None:
    with pytest.raises(UsageError, match=r"^method\.expression: mode ties does not read it\. .* expression is for pem"):
        attach(tiny_llama.model, loras=pair.loras, mode="ties", method=MethodConfig(expression="up"))
