"""Learned constant weights per site, without input. Source: LoRA Soups (Prabhakar et al. 2024, 2410.13025), its CAT.

Departs: a softmax with a learnable temperature that starts uniform, like the gates. The published code starts with
random logits; `gate.init_std` is their spread here. Sites can have any granularity here; there they are layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from molecli.config import GateConfig
from molecli.experts import ExpertBank
from molecli.methods.gates import gated
from molecli.protocols import Site


def build_gates(
    config: GateConfig, bank: ExpertBank, sites: Sequence[Site], *, seq2seq: bool, memory_width: int | None = None
) -> dict[str, nn.Module]:
    """`gated.build_gates` with gates that read nothing."""
    still = config.model_copy(update={"input": "none"})
    return gated.build_gates(still, bank, sites, seq2seq=seq2seq, memory_width=memory_width)
