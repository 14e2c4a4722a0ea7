"""X-LoRA: a classifier of the base's last hidden states gives every token one weight per LoRA.

    h = the last hidden states of the base alone        p = softmax(f(h) / T)        y = W x + γ Σ p_i ΔW_i x

Source: Buehler and Buehler 2024, 2402.07148, as PEFT's `tuners.xlora` has it, which runs. To know of it:
- Every call is two passes of the model, the first without the LoRAs; no key-value cache follows that, so each new
  token of a completion costs two passes over all tokens before it.
- It reads `hidden_states`, which an encoder-decoder does not return: refused below.
- f is one linear layer unless `xlora_depth` says more. With `top_k` the values left are not rescaled to sum to 1.
- p is one for all matrices, or with `layerwise_scalings` one for each. γ is `method.scale`.
- A new classifier is random: training starts near Σ ΔW_i / N, not at it.
Departs: the classifier is kept in float32 on a base of bfloat16, in which small steps of a bfloat16 one would be lost.
LoRAs may be masked, as MoLE's gates: the others' p are rescaled in proportion.
"""

from __future__ import annotations

from peft import XLoraConfig

from molecli.config import MethodConfig
from molecli.errors import UsageError
from molecli.experts import ExpertBank


def peft_config(config: MethodConfig, bank: ExpertBank, *, width: int, seq2seq: bool) -> XLoraConfig:
    """PEFT's settings of the classifier; `width` is that of h. Raises: UsageError for a base that has no such h."""
    if seq2seq:
        what = "PEFT's X-LoRA reads the last hidden states of a decoder-only model, and the base is an encoder-decoder"
        raise UsageError("--mode xlora", what, "Use --mode gated or arrow.")
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
