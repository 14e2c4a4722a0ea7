"""PEFT's configuration for given factors: their ranks and alphas, as patterns if they differ."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from molecli.experts import LowRank


def exact_pattern(matrix: str) -> str:
    """The regular expression that matches only `matrix`."""
    # PEFT matches patterns at the end of a name; without the anchor "decoder.q" would also match "x.decoder.q".
    return f"^{re.escape(matrix)}"


def lora_config(factors: Mapping[str, LowRank], exactly: Callable[[str], str] = exact_pattern) -> dict[str, Any]:
    """The LoraConfig entries for `factors` (matrix name -> A, B, scaling): ranks, alphas and target modules.

    The most frequent rank and alpha become `r` and `lora_alpha`, the others patterns; `exactly` gives the pattern that
    matches only one matrix.
    """
    ranks = {matrix: low_rank.rank for matrix, low_rank in factors.items()}
    alphas = {matrix: exact_alpha(low_rank) for matrix, low_rank in factors.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(m): a for m, a in alphas.items() if a != alpha},
        "target_modules": list(factors),
    }


def exact_alpha(low_rank: LowRank) -> float:
    """The alpha for which alpha / r equals the scaling exactly; an integer if possible."""
    alpha = low_rank.scaling * low_rank.rank
    near = (alpha, float(round(alpha)), math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    exact = next((a for a in near if a / low_rank.rank == low_rank.scaling), alpha)
    return int(exact) if exact.is_integer() else exact


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
