"""The names that a transformers model gives to modules of older files, by the rules with which it loads checkpoints.

transformers 5 moved modules: `language_model.model.layers` became `model.language_model.layers`, for example. PEFT
renames the tensors of old adapters by the same rules. Source: transformers.conversion_mapping;
peft.utils.transformers_weight_conversion. Contents: own_names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from molecli.protocols import Renaming


def own_names(model: nn.Module, names: Iterable[str]) -> Renaming:
    """The renaming of `model`, whose own names are `names`; it changes nothing in a model without rules."""
    if not isinstance(model, PreTrainedModel):
        return str
    there = {f"{name}.weight": True for name in names}
    older = getattr(model, "_checkpoint_conversion_mapping", None) or {}  # of models with code of their own

    @cache
    def rules() -> list[Any]:
        return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]

    def renamed(name: str) -> str:
        for pattern, replacement in older.items():
            changed, count = re.subn(pattern, replacement, name)
            if count:  # as PEFT does: the first rule that applies
                return changed
        key, _ = rename_source_key(f"{name}.weight", rules(), [], model.base_model_prefix, there)
        return key.removesuffix(".weight")

    return renamed
