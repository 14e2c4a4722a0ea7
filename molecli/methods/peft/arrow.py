"""Arrow: at each matrix, every token is routed to the LoRAs whose first right singular vector it is closest to.

    v_i = first right singular vector of B_i A_i        p = softmax over the k largest of |v_i · x| / T

Source: Ostapenko et al. 2024, 2405.11157, in PEFT's implementation `tuners.lora.arrow`, which is used here. Note:
- x is not normalised, although PEFT's documentation speaks of cosines: T acts on values that grow with ‖x‖.
- The outputs of all N LoRAs are computed for every token, [tokens, N, d_out].
- v_i comes from 15 power iterations with a random start, so it depends slightly on `method.seed`.
- PEFT stacks factors of equal rank; here smaller ones are padded with zeros, which does not change the update. PEFT
  fails at a matrix that some LoRA lacks, and if k > N: both are refused below.
- PEFT can also subtract "general knowledge" LoRAs; this is not used.
Departs: the user's weight of a LoRA scales its update, which does not change v_i.
"""

from __future__ import annotations

from peft import ArrowConfig

from molecli.catalog.methods import DEFAULT
from molecli.config import MethodConfig
from molecli.errors import UsageError
from molecli.experts import ExpertBank

# PEFT's own default.
TOP_K = 3


def peft_config(config: MethodConfig, bank: ExpertBank, *, width: int, seq2seq: bool) -> ArrowConfig:
    """PEFT's settings of the router. Raises: UsageError for LoRAs between which it cannot route."""
    for matrix in bank.matrices:
        present = bank.present(matrix)
        absent = next((expert.name for i, expert in enumerate(bank.experts) if i not in present), None)
        if absent is not None:
            what = f"all LoRAs must adapt the same matrices, but {absent} lacks {matrix} of {bank.names[present[0]]}"
            raise UsageError("--mode arrow", what, f"Use LoRAs of the same matrices, or --mode {DEFAULT}.")
    if config.top_k is not None and config.top_k > len(bank):
        raise UsageError("method.top_k", f"{config.top_k} is more than the {len(bank)} LoRAs", "Lower it.")
    return ArrowConfig(
        top_k=config.top_k or min(TOP_K, len(bank)), router_temperature=config.temperature, rng_seed=config.seed
    )
