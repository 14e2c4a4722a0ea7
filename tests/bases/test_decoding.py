"""What a checkpoint's generation config may do: its token ids count, and nothing else of it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from molecli.bases.causal import Causal
from molecli.bases.language import OWN_TOKENS
from molecli.bases.seq2seq import Seq2Seq

PROMPTS = ["hello you", "What is this thing? now", "a"]
# A value of each kind of setting that would change, or break, plain decoding.
HOSTILE: dict[str, Any] = {
    "max_length": 3,
    "min_length": 30,
    "min_new_tokens": 6,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": ["a", "e", "o"],
    "do_sample": True,
    "num_beams": 4,
    "num_return_sequences": 2,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(10, 200)],
    "suppress_tokens": list(range(10, 200)),
    "begin_suppress_tokens": list(range(10, 200)),
    "sequence_bias": [[[7], 100.0]],
    "forced_eos_token_id": 9,
    "exponential_decay_length_penalty": [1, 50.0],
    "guidance_scale": 3.0,
    "token_healing": True,
    "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static",
    "output_scores": True,
    "output_attentions": True,
    "return_dict_in_generate": True,
    "use_cache": False,
}


@pytest.fixture(params=["t5", "bart", "llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, make_tiny: Any) -> Causal | Seq2Seq:
    kind = request.param
    return Seq2Seq(*make_tiny(kind)) if kind in ("t5", "bart") else Causal(*make_tiny(kind))


def completions(backbone: Any) -> list[str]:
    greedy = backbone.generate(PROMPTS, max_new_tokens=8)
    return greedy + backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)


def test_the_values_are_those_of_real_settings() -> None:
    assert set(HOSTILE) <= set(vars(GenerationConfig()))


def test_no_setting_of_a_checkpoint_changes_a_completion(backbone: Any) -> None:
    plain = completions(backbone)
    own = backbone.model.generation_config
    for name, value in HOSTILE.items():
        was = getattr(own, name)
        setattr(own, name, value)
        assert completions(backbone) == plain, name
        assert (backbone.model.generation_config is own, getattr(own, name)) == (True, value)
        setattr(own, name, was)


def test_a_failed_completion_leaves_the_checkpoints_settings(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = backbone.model.generation_config

    def fail(**_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(backbone.model, "generate", fail)
    with pytest.raises(ValueError, match="no"):
        backbone.generate(PROMPTS, max_new_tokens=2)
    assert backbone.model.generation_config is own


def test_the_token_ids_of_a_checkpoint_count(make_tiny: Any) -> None:
    backbone = Seq2Seq(*make_tiny("bart"))
    assert {"decoder_start_token_id", "forced_bos_token_id", "eos_token_id"} <= set(OWN_TOKENS)
    seen: list[torch.Tensor] = []
    backbone.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    backbone.model.generation_config.forced_bos_token_id = 77
    backbone.generate(["hello"], max_new_tokens=2)
    assert seen[1][-1] == 77  # such as mBART's language
