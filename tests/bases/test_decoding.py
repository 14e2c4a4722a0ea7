"""What a checkpoint's generation config may do: its token ids count, and nothing else of it does."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from molecli.bases.causal import Causal
from molecli.bases.language import OWN_TOKENS, Decoding
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
    "max_new_tokens": 1,
    "use_mtp": True,
    "cache_config": {"batch_size": 1},
    "max_cache_len": 2,
    "length_penalty": 9.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "watermarking_config": WatermarkingConfig(bias=99.0),
    "output_hidden_states": True,
    "output_logits": True,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.1,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": CompileConfig(fullgraph=True),
    "disable_compile": False,
    "continuous_batching_config": {"max_batch_tokens": 1},
    "low_memory": True,
    "penalty_alpha": 0.9,
    "dola_layers": "high",
    "diversity_penalty": 5.0,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 1,
    "transformers_version": "4.20.0",
}
# The fields that a checkpoint does decide; these are tested one by one.
HONOURED = {*OWN_TOKENS}
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
PAGE = Path(__file__).parents[2] / "docs" / "prompts.md"


@pytest.fixture(params=["t5", "bart", "llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, make_tiny: Any) -> Causal | Seq2Seq:
    kind = request.param
    return Seq2Seq(*make_tiny(kind)) if kind in ("t5", "bart") else Causal(*make_tiny(kind))


def completions(backbone: Any) -> list[str]:
    greedy = backbone.generate(PROMPTS, max_new_tokens=8)
    return greedy + backbone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)


def decisions() -> dict[str, set[str]]:
    """decision -> the fields, as the table in the documentation has them."""
    lines = PAGE.read_text("utf-8").splitlines()
    start = lines.index("| decision | fields |") + 2
    rows = [line.strip("|").split("|") for line in takewhile(lambda line: line.startswith("|"), lines[start:])]
    return {decision.strip(): set(re.findall(r"`(\w+)`", fields)) for decision, fields in rows}


def test_every_field_is_hostile_or_honoured() -> None:
    assert set(HOSTILE) & HONOURED == set()
    assert set(HOSTILE) | HONOURED == FIELDS


def test_the_documentation_decides_every_field_once() -> None:
    table = decisions()
    assert set().union(*table.values()) == FIELDS
    assert sum(map(len, table.values())) == len(FIELDS)
    assert table["honoured"] == HONOURED
    settings = vars(Decoding(4, temperature=0.5)._settings([1], 0, use_cache=True))
    given = {name for name, value in settings.items() if value is not None and not name.startswith("_")}
    assert table["set by the recipe"] == given - HONOURED


def test_settings_that_an_old_configuration_holds_change_nothing(backbone: Any, tmp_path: Path) -> None:
    """Before there was a generation_config.json, config.json had these settings."""
    plain = completions(backbone)
    backbone.model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"num_beams": 4, "min_length": 30, "no_repeat_ngram_size": 1, "forced_eos_token_id": 9, "max_length": 3}
    own |= {"bad_words_ids": [[i] for i in range(10, 200)], "temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own}))
    loaded = type(backbone.model).from_pretrained(tmp_path)
    assert completions(type(backbone)(loaded, backbone.tokenizer)) == plain


def test_settings_of_the_models_configuration_change_nothing(backbone: Any) -> None:
    plain = completions(backbone)
    for name in (
        "num_beams",
        "min_length",
        "max_length",
        "forced_eos_token_id",
        "cache_implementation",
        "stop_strings",
    ):
        setattr(backbone.model.config, name, HOSTILE.get(name, 4))
    assert completions(backbone) == plain


@pytest.mark.parametrize("ban", [{"bad_words_ids": [[0]]}, {"suppress_tokens": [0, 9]}])
def test_a_ban_on_the_padding_token_counts(make_tiny: Any, ban: dict[str, Any]) -> None:
    backbone = Seq2Seq(*make_tiny("t5"))
    head = backbone.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[0] = 1e4  # as Marian's padding, whose logit nothing has trained
    assert set(completions(backbone)) == {""}
    for name, value in ban.items():
        setattr(backbone.model.generation_config, name, value)
    assert "" not in completions(backbone)


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
