"""The section of a recipe with the settings of all composition methods but the gates.

Contents: MethodConfig, share_of.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from molecli.catalog.methods import EVERYWHERE, FAMILIES, Option, brought, readers
from molecli.config.sections import Section
from molecli.config.shorthand import as_names

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%?\s*-\s*(\d+(?:\.\d+)?)\s*%?")


def share_of(text: str) -> tuple[float, float]:
    """`20-40` as (0.2, 0.4). Raises: an error that says how to write it."""
    found = _SHARE.fullmatch(text.strip())
    low, high = (float(part) / 100 for part in found.groups()) if found else (0.0, 0.0)
    if not low < high <= 1:
        remedy = "Write two percentages, such as 0-20 or 80-100."
        raise PydanticCustomError("unknown_name", "is not a part of the depth", {"remedy": remedy})
    return low, high


def _checked_share(text: str) -> str:
    share_of(text)
    return text


NAMED = 6  # an option that more methods read is not prefixed with their names


class _Settings(Section):
    """Settings of the methods. A method reads those that its row in `catalog.methods` names; others are refused.

    In the help, each description begins with the methods that read the setting.
    """

    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="factor on every LoRA's weight")
    layers: Annotated[str, AfterValidator(_checked_share)] | None = Field(
        default=None,
        description="the part of the depth in which the LoRAs act, in percent, such as 0-20; by default all of it",
    )
    tau: int = Field(default=5, ge=1, description="denoising steps of a LoRA's turn, or of the longest turn")
    order: Annotated[tuple[str, ...], BeforeValidator(as_names)] = Field(
        default=(), description="order of the LoRAs' turns; by default the order of the LoRAs"
    )
    base_share: float = Field(default=0.5, ge=0.0, le=1.0, description="the base's share in the unconditional output")
    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank of the result; by default nothing is truncated, unless the method itself truncates",
    )
    density: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="fraction of an update's entries to keep; by default 0.2, or 0.5 if they are dropped at random",
    )
    seed: int = Field(default=0, ge=0, description="seed of what the method draws at random")
    expression: str | None = Field(
        default=None, description="sum or difference of LoRAs, such as 'a + b - c' or '0.5 * a + 0.5 * b'"
    )
    evaluations: int = Field(default=40, ge=1, description="number of weight vectors that the search tries")
    examples: int = Field(default=64, ge=1, description="maximum number of training examples that score them")
    bound: float = Field(default=1.5, gt=0.0, allow_inf_nan=False, description="largest absolute weight")
    l1: float = Field(default=0.05, ge=0.0, allow_inf_nan=False, description="weight of the penalty on mean |weight|")
    top_k: int | None = Field(
        default=None, ge=1, description="number of LoRAs for each token; by default that of the method"
    )
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="temperature of the softmax")
    xlora_depth: int = Field(default=1, ge=1, description="number of layers of the classifier")
    xlora_size: int = Field(default=2048, ge=1, description="width of the classifier's hidden layers")
    layerwise_scalings: bool = Field(default=False, description="separate weights for every matrix")
    on: Literal["factors", "updates"] = Field(
        default="factors", description="add A and B separately, as published, or add the updates"
    )


def _whose(option: str) -> str:
    """The prefix of an option's help: the methods that read it, if they are few."""
    if option in EVERYWHERE:
        return "any mode: "
    if option in FAMILIES["merges"].options and option not in FAMILIES["outputs"].options:
        return "merges: "
    own = readers(option)
    return f"{', '.join(own)}: " if len(own) <= NAMED else ""


def _brought(option: Option) -> Any:
    """pydantic's (type, field) of a key that a row adds."""
    kind = option.kind or (type(option.default) if option.default is not None else Any)
    return kind, Field(default=option.default, description=option.help, **option.bounds)


if TYPE_CHECKING:
    MethodConfig = _Settings
else:
    MethodConfig = create_model(
        "MethodConfig",
        __base__=_Settings,
        __doc__=_Settings.__doc__,
        __module__=__name__,
        **{name: _brought(option) for name, option in brought().items() if name not in _Settings.model_fields},
    )
    for _name, _field in MethodConfig.model_fields.items():
        _field.description = _whose(_name) + _field.description
