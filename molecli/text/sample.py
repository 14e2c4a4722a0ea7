"""`mole sample` on a language model: completions of prompts.

sample         recipe -> Completions: the whole command
Completions    all of them, as `commands.sample` shows them
Sample         one prompt and its completion
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molecli.bases import prompt_record
from molecli.bases.loading import load_backbone
from molecli.config.unread import check_fields
from molecli.errors import UsageError
from molecli.files.atomic import write_text
from molecli.files.output_folder import SAMPLES_FILE
from molecli.mixture.attach import attach, base_of
from molecli.mixture.mixture import Mixture, switch

if TYPE_CHECKING:
    from molecli.config import SampleRecipe
    from molecli.files.composition import Composition
    from molecli.protocols import Backbone, Note, Progress

# Completions go to stdout: a folder is written only if one is named.
IN_FOLDER = False
PICTURE_FIELDS = ("modes", "images", "init_image", "mask_image", "strength", "image", "method", "concepts")


@dataclass(frozen=True)
class Sample:
    """One prompt and its completion."""

    prompt: str
    text: str

    def document(self) -> dict[str, str]:
        return asdict(self)


class Completions(list[Sample]):
    """The completions, in the order of the prompts: `commands.sample.Samples`."""

    def document(self) -> list[dict[str, Any]]:
        """Prompts and completions."""
        return [sample.document() for sample in self]

    def lines(self) -> list[str]:
        """The completions."""
        return [sample.text for sample in self]

    def check(self) -> None:
        """Does nothing: the command fails if a completion cannot be made."""


def sample(
    recipe: SampleRecipe,
    composition: Composition | None,
    *,
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> Completions:
    """The completions of `recipe.prompts`; with `recipe.output`, also written to samples.jsonl there.

    Raises: UsageError if it is not clear which experts to use; MismatchError if they do not fit the base.
    """
    check_fields(recipe, PICTURE_FIELDS, "pictures")
    base = base_of(recipe.base, composition)
    backbone = load_backbone(base, recipe.device)
    with _experts(recipe, composition, backbone) as mixture:
        if mixture is not None:
            switch(mixture, mask=recipe.mask, only=recipe.only)
        made = {str(recipe.composition): composition.settings} if composition is not None else {}
        prompt_record.tell(backbone, note, base=base, loras=recipe.loras, compositions=made)
        texts = _complete(backbone, recipe, progress)
    samples = Completions(Sample(prompt, text) for prompt, text in zip(recipe.prompts, texts, strict=True))
    if recipe.output is not None:
        lines = (json.dumps(one.document(), ensure_ascii=False) + "\n" for one in samples)
        write_text(Path(recipe.output) / SAMPLES_FILE, "".join(lines))
    return samples


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
        what = f"there are {len(loras)} LoRAs, and no composition says how to combine them"
        raise UsageError("--loras", what, "Make one with mole compose, or choose one LoRA with --only.")
    weights = {lora.name: lora.weight for lora in recipe.loras}
    return attach(backbone.model, loras=loras, weights=weights)


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
            # Each batch has its own seed: otherwise equal prompts in two batches would get equal completions.
            seed=recipe.seed + start if recipe.temperature > 0 else None,
        )
        if progress is not None:
            progress("sample", len(texts), total)
    return texts
