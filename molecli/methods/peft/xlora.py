"""X-LoRA: a classifier of the base's last hidden states gives every token one weight per LoRA.

    h = the last hidden states of the base alone        p = softmax(f(h) / T)        y = W x + γ Σ p_i ΔW_i x

Source: Buehler and Buehler 2024, 2402.07148, in PEFT's implementation `tuners.xlora`, which is used here. Note:
- Every call is two passes of the model, the first without the LoRAs. A key-value cache cannot be used with that, so
  each new token of a completion costs two passes over all tokens before it.
- It reads `hidden_states`, which an encoder-decoder does not return: refused below.
- f is one linear layer, or more with `xlora_depth`. With `top_k` the remaining values are not rescaled to sum to 1.
- p is the same for all matrices, or with `layerwise_scalings` one for each matrix. γ is `method.scale`.
- A new classifier is random: training starts near Σ ΔW_i / N, not exactly there.
Departs: the classifier stays in float32 on a bfloat16 base, because a bfloat16 one would lose small training steps.
LoRAs can be masked, like with MoLE's gates: the p of the others are rescaled in proportion.
"""

from __future__ import annotations

from peft import XLoraConfig

from molecli.catalog.methods import DEFAULT
from molecli.config import MethodConfig
from molecli.errors import UsageError
from molecli.experts import ExpertBank


def peft_config(config: MethodConfig, bank: ExpertBank, *, width: int, seq2seq: bool) -> XLoraConfig:
    """PEFT's settings of the classifier; `width` is that of h. Raises: UsageError for a base without such an h."""
    if seq2seq:
        what = "PEFT's X-LoRA reads the last hidden states of a decoder-only model, and the base is an encoder-decoder"
        raise UsageError("--mode xlora", what, f"Use --mode {DEFAULT}.")
    if config.top_k is not None and config.top_k > len(bank):
        raise UsageError("method.top_k", f"{config.top_k} is more than the {len(bank)} LoRAs", "Lower it.")
    return XLoraConfig(
        hidden_size=width,
        adapters={str(i): name for i, name in enumerate(bank.names)},
        softmax_temperature=config.temperature,
        layerwise_scalings=config.layerwise_scalings,
        top_k_lora=config.top_k,
        xlora_depth=config.xlora_depth,
        xlora_size=config.xlora_size,
        global_scaling_weight=config.scale,
    )
