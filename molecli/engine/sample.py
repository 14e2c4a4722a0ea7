"""Completions of prompts: from a composition, a single LoRA, or the bare base.

run_sample       the completions of a language model; on a diffusion base `images.sample.run_sample_pictures` draws
draws_pictures   which of the two a recipe is for
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from molecli.backbones.hosting import Mixture
from molecli.backbones.loading import load_backbone
from molecli.backbones.sources import check_found, find_base
from molecli.engine.attach import attach
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.files.composition import Composition, load_composition
from molecli.files.recipe import BaseConfig, MethodConfig, Recipe, SampleRecipe
from molecli.protocols import Backbone

# label, done, total
Progress = Callable[[str, int, int], None]
SAMPLES_FILE = "samples.jsonl"
# Fields that only one kind of base reads, and what is said of them on the other.
TEXT_FIELDS = ("max_new_tokens", "temperature", "top_p")
PICTURE_FIELDS = ("modes", "images", "image", "method", "concepts")
TEXT_BASE = "a diffusion base draws by, and the base is a language model"
PICTURE_BASE = "a language model completes by, and the base draws pictures"


@dataclass(frozen=True)
class Sample:
    """One prompt and its completion."""

    prompt: str
    text: str

    def document(self) -> dict[str, str]:
        return asdict(self)


def run_sample(recipe: SampleRecipe, *, progress: Progress | None = None) -> list[Sample]:
    """The completions of `recipe.prompts`, in order; with `recipe.output` also written to samples.jsonl there.

    Raises: UsageError where it is not clear which experts to use; MismatchError where they do not fit.
    """
    if not recipe.prompts:
        raise UsageError("prompts", "there is none", "Write at least one.")
    check_fields(recipe, PICTURE_FIELDS, TEXT_BASE)
    composition = load_composition(recipe.composition) if recipe.composition else None
    backbone = load_backbone(base_of(recipe.base, composition), recipe.device)
    with _experts(recipe, composition, backbone) as mixture:
        if mixture is not None:
            switch(mixture, mask=recipe.mask, only=recipe.only)
        texts = _complete(backbone, recipe, progress)
    samples = [Sample(prompt, text) for prompt, text in zip(recipe.prompts, texts, strict=True)]
    if recipe.output is not None:
        lines = (json.dumps(sample.document(), ensure_ascii=False) + "\n" for sample in samples)
        write_text(Path(recipe.output) / SAMPLES_FILE, "".join(lines))
    return samples


def draws_pictures(base: BaseConfig | None, composition: str | None) -> bool:
    """Whether the base that is meant (see `base_of`) is a diffusion pipeline. Raises: UsageError where it is none."""
    return find_base(base_of(base, load_composition(composition) if composition else None)).pipeline


def check_fields(recipe: Recipe, fields: Sequence[str], whose: str) -> None:
    """Nothing, where `fields` are at their defaults. Raises: UsageError for one that would be ignored."""
    for name in fields:
        default = type(recipe).model_fields[name].get_default(call_default_factory=True)
        if getattr(recipe, name) != default:
            if whose == TEXT_BASE and (base := getattr(recipe, "base", None)) is not None:
                check_found(base)  # one that is not to be had looks like no pipeline
            raise UsageError(name, f"it is what {whose}", "Leave it out.")


def check_method(method: MethodConfig) -> None:
    """Nothing, where a language model reads these settings. Raises: UsageError for one of the denoising steps."""
    for name in ("tau", "order", "base_share"):
        if getattr(method, name) != MethodConfig.model_fields[name].default:
            raise UsageError(f"method.{name}", f"it is what {TEXT_BASE}", "Leave it out.")


def base_of(base: BaseConfig | None, composition: Composition | None) -> BaseConfig:
    """The base that was named, else the one the composition was made on, else the built-in one."""
    if base is not None:
        return base
    if composition is None:
        return BaseConfig()
    return BaseConfig.model_validate(yaml.safe_load(composition.recipe)["base"])


def switch(mixture: Mixture, *, mask: tuple[str, ...], only: tuple[str, ...]) -> tuple[str, ...]:
    """Switches off the experts in `mask`, and with `only` all that it does not name; which they are.

    Raises: UsageError for an unknown name.
    """
    kept = {mixture.names[mixture.bank.index(name)] for name in only} if only else set(mixture.names)
    off = {mixture.names[mixture.bank.index(name)] for name in mask}
    switched = tuple(name for name in mixture.names if name in off or name not in kept)
    mixture.mask(*switched)
    return switched


def _experts(
    recipe: SampleRecipe, composition: Composition | None, backbone: Backbone
) -> AbstractContextManager[Mixture | None]:
    loras: dict[str, Any] = {lora.name: lora.source for lora in recipe.loras}
    if composition is not None:
        return attach(backbone.model, loras=loras or None, composition=recipe.composition)
    if not loras:
        if recipe.mask or recipe.only:
            raise UsageError("--mask", "there is no LoRA to switch off", "Name a composition, or --loras.")
        return nullcontext()
    if len(loras) > 1 and len(recipe.only) != 1:
        what = f"{len(loras)} LoRAs and no composition that says how they mix"
        raise UsageError("--loras", what, "Make one with mole compose, or name one LoRA with --only.")
    weights = {lora.name: lora.weight for lora in recipe.loras}
    return attach(backbone.model, loras=loras, mode="linear", weights=weights)


def _complete(backbone: Backbone, recipe: SampleRecipe, progress: Progress | None) -> list[str]:
    texts: list[str] = []
    total = len(recipe.prompts)
    for start in range(0, total, recipe.batch_size):
        batch = recipe.prompts[start : start + recipe.batch_size]
        texts += backbone.generate(
            batch,
            max_new_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            # Its own seed for each batch: with one for all, equal prompts in two batches would complete alike.
            seed=recipe.seed + start if recipe.temperature > 0 else None,
        )
        if progress is not None:
            progress("sample", len(texts), total)
    return texts
