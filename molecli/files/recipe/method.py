"""The section of a recipe with what composition methods other than the gates are told.

Contents: MethodConfig, share_of.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from molecli.files.recipe.parts import Section
from molecli.files.recipe.shorthand import as_names

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%?\s*-\s*(\d+(?:\.\d+)?)\s*%?")


def share_of(text: str) -> tuple[float, float]:
    """`20-40` as (0.2, 0.4). Raises: an error that says how to write it."""
    found = _SHARE.fullmatch(text.strip())
    low, high = (float(part) / 100 for part in found.groups()) if found else (0.0, 0.0)
    if not low < high <= 1:
        remedy = "Write two percentages, such as 0-20 or 80-100."
        raise PydanticCustomError("unknown_name", "is no part of the depth", {"remedy": remedy})
    return low, high


def _checked_share(text: str) -> str:
    share_of(text)
    return text


class MethodConfig(Section):
    """Settings of the methods: each reads those that its row of `compose.METHODS` names; others are refused."""

    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="factor on every LoRA's weight")
    layers: Annotated[str, AfterValidator(_checked_share)] | None = Field(
        default=None,
        description="any mode: only the LoRAs' part in this share of the depth acts, in percent, such as 0-20; all of "
        "it when not given",
    )
    tau: int = Field(
        default=5, ge=1, description="switch, w_switch: denoising steps of a LoRA's turn; in w_switch of the longest"
    )
    order: Annotated[tuple[str, ...], BeforeValidator(as_names)] = Field(
        default=(), description="switch, w_switch: LoRAs in turn; their own order when not given"
    )
    base_share: float = Field(default=0.5, ge=0.0, le=1.0, description="loratorio: the base's share of the free half")
    rank: int | None = Field(
        default=None,
        ge=1,
        description="merges: rank of the result; by default so many that nothing is lost, in svd the LoRAs' largest",
    )
    density: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="magnitude_prune, ties, dare, dare_ties, knots: share of an update's entries that stay; by default "
        "0.2, in dare and dare_ties 0.5",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="dare, dare_ties: which entries are dropped; arrow: where the power iterations start",
    )
    expression: str | None = Field(
        default=None, description="pem: sums and differences of LoRAs, such as 'a + b - c' or '0.5 * a + 0.5 * b'"
    )
    evaluations: int = Field(default=40, ge=1, description="lorahub: weights that the search tries")
    examples: int = Field(default=64, ge=1, description="lorahub: training examples that it scores them by, at most")
    bound: float = Field(default=1.5, gt=0.0, allow_inf_nan=False, description="lorahub: largest weight, either sign")
    l1: float = Field(default=0.05, ge=0.0, allow_inf_nan=False, description="lorahub: regulariser on mean |weight|")
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="arrow: LoRAs that a token goes to, by default 3; xlora: the same, by default all",
    )
    temperature: float = Field(
        default=1.0, gt=0.0, allow_inf_nan=False, description="arrow, xlora: of the softmax over the LoRAs"
    )
    xlora_depth: int = Field(default=1, ge=1, description="xlora: layers of the classifier")
    xlora_size: int = Field(default=2048, ge=1, description="xlora: width of the classifier's hidden layers")
    layerwise_scalings: bool = Field(
        default=False, description="xlora: every matrix has weights of its own, not one for all"
    )
    on: Literal["factors", "updates"] = Field(
        default="factors", description="lorahub, pem: whether A and B are added apart, as published, or the updates"
    )
