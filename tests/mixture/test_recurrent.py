"""Recurrent bases (Mamba, RWKV and hybrids): what their state says of a pass, in generation and in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from molecli.config import GateConfig
from molecli.errors import RunError
from molecli.mixture.attach import attach

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[5, 9, 23, 40, 7], [8, 12, 61, 33, 18]])
ONE = IDS[:1]  # transformers' RWKV mixes the rows of a batch in generation
NEW = 5
# model_type -> (its configuration, the ends of the names of the matrices that the LoRAs adapt)
BASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, ("in_proj", "x_proj")),
    "falcon_mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, ("in_proj", "x_proj")),
    "mamba2": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
        ("in_proj",),
    ),
    "bamba": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
        ("in_proj", "q_proj", "up_proj"),
    ),
}
# Their state is an object of their own, which does not count tokens.
UNCOUNTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}, ("receptance", "key")),
}


def base(kind: str) -> tuple[Any, list[str]]:
    """(a random model, the matrices that the LoRAs adapt)."""
    settings, ends = {**BASES, **UNCOUNTED}[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TOKENS, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.25)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]
    return model, names


def randomised(mixture: Any) -> Any:
    """The mixture with gates that differ between inputs."""
    torch.manual_seed(5)
    with torch.no_grad():
        for gate in mixture.gate_modules().values():
            for parameter in gate.parameters():
                parameter.normal_(0, 1)
    return mixture


@pytest.fixture
def adapters(make_peft_adapter: Callable[..., Any], tmp_path: Path) -> Callable[[Any, list[str]], Mapping[str, str]]:
    def make(model: Any, names: list[str]) -> Mapping[str, str]:
        for seed, name in enumerate("ab"):
            make_peft_adapter(model, tmp_path / name, seed=seed, targets=names)
        return {name: str(tmp_path / name) for name in "ab"}

    return make


def generated(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(the tokens with the prompt, the logits [B, NEW, V] that chose them)."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
@pytest.mark.parametrize("kind", BASES)
def test_generation_equals_teacher_forcing(kind: str, pool: str, adapters: Any) -> None:
    model, names = base(kind)
    with torch.no_grad(), attach(model, loras=adapters(model, names), mode="gated", gate=GateConfig(pool=pool)) as mix:
        randomised(mix)
        sequences, logits = generated(model, IDS)
        labels = sequences.clone()
        labels[:, : IDS.shape[1]] = -100
        taught = model(input_ids=sequences, labels=labels, use_cache=False).logits[:, IDS.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, taught, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_the_gate_of_the_prompt_stays_and_each_row_has_its_own(kind: str, adapters: Any) -> None:
    model, names = base(kind)
    with torch.no_grad(), attach(model, loras=adapters(model, names), mode="gated") as mix:
        randomised(mix)
        model(input_ids=IDS)
        decided = mix.gates()
        together, _ = generated(model, IDS)
        after = mix.gates()
        alone = torch.cat([generated(model, IDS[i : i + 1])[0] for i in range(2)])
    assert all(torch.equal(after[name], value) for name, value in decided.items())
    assert any(not torch.allclose(value[0], value[1], atol=1e-3) for value in decided.values())
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", BASES)
def test_a_state_from_before_the_experts_is_refused(kind: str, adapters: Any) -> None:
    model, names = base(kind)
    loras = adapters(model, names)
    out = model(input_ids=IDS, use_cache=True)
    name = next(name for name in ("cache_params", "past_key_values") if hasattr(out, name))
    with torch.no_grad(), attach(model, loras=loras, mode="gated"), pytest.raises(RunError, match="from before"):
        model(input_ids=IDS[:, :1], **{name: getattr(out, name)})


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_a_state_that_counts_no_tokens_is_refused_where_a_gate_remembers(kind: str, adapters: Any) -> None:
    model, names = base(kind)
    loras = adapters(model, names)
    message = "generation: this kind of cache does not say whether it continues a prompt. Write use_cache=False"
    for pool in ("prompt", "running"):
        gate = GateConfig(pool=pool)
        with torch.no_grad(), attach(model, loras=loras, mode="gated", gate=gate), pytest.raises(RunError) as error:
            generated(model, IDS)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", UNCOUNTED)
@pytest.mark.parametrize("how", [{"mode": "linear"}, {"mode": "gated", "gate": GateConfig(pool="token")}])
def test_such_a_state_is_no_matter_to_weights_that_remember_nothing(kind: str, how: Any, adapters: Any) -> None:
    model, names = base(kind)
    with torch.no_grad(), attach(model, loras=adapters(model, names), **how) as mix:
        randomised(mix)
        sequences, logits = generated(model, ONE)
        taught = model(input_ids=sequences, use_cache=False).logits[:, ONE.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, taught, rtol=1e-4, atol=1e-4)
