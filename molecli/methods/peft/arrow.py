"""Arrow: every token goes to the LoRAs whose first right singular vector it follows, at every matrix apart.

    v_i = first right singular vector of B_i A_i        p = softmax over the k largest of |v_i · x| / T

Source: Ostapenko et al. 2024, 2405.11157, as PEFT's `tuners.lora.arrow` has it, which runs. To know of it:
- x is not normalised, though PEFT's documentation speaks of cosines: T acts on values that grow with ‖x‖.
- The outputs of all N LoRAs are built for every token, [tokens, N, d_out].
- v_i comes from 15 power iterations from a random start: `method.seed` decides what they leave undone.
- It stacks factors of one rank; here smaller ones are filled up with zeros, which changes no update. At a matrix that
  some LoRA lacks it fails, and with k > N: refused below.
- Subtracting "general knowledge" LoRAs, which it offers too, is left off.
Departs: a user's weight of a LoRA scales its update, which moves no v_i.
"""

from __future__ import annotations

from peft import ArrowConfig

from molecli.config import MethodConfig
from molecli.errors import UsageError
from molecli.experts import ExpertBank

# PEFT's own default.
TOP_K = 3


def peft_config(config: MethodConfig, bank: ExpertBank, *, width: int, seq2seq: bool) -> ArrowConfig:
    """PEFT's settings of the router. Raises: UsageError for LoRAs that it cannot route among."""
    for matrix in bank.matrices:
        present = bank.present(matrix)
        absent = next((expert.name for i, expert in enumerate(bank.experts) if i not in present), None)
        if absent is not None:
            what = f"{absent} does not adapt {matrix} as {bank.names[present[0]]} does, and PEFT routes where all do"
            raise UsageError("--mode arrow", what, "Use LoRAs of the same matrices, or --mode gated.")
    if config.top_k is not None and config.top_k > len(bank):
        raise UsageError("method.top_k", f"{config.top_k} is more than the {len(bank)} LoRAs", "Lower it.")
    return ArrowConfig(
        top_k=config.top_k or min(TOP_K, len(bank)), router_temperature=config.temperature, rng_seed=config.seed
    )
