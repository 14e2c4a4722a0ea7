"""Inputs of other shapes than [sequences, tokens, d]: values reach the vectors they belong to, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from molecli.errors import RunError
from molecli.mixture.token_axes import Axes, as_tokens, axes_of, placed, routed
from tests.helpers.language_bases import LLAMA, apart, random_base, random_mixture

BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
LATENT = {
    **LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "qk_nope_head_dim": 4,
}  # fmt: skip
# kind -> (seq2seq, configuration, the ends of the adapted matrices)
SHAPES: dict[str, tuple[bool, dict[str, Any], tuple[str, ...]]] = {
    "led": (True, {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64}, ("query", "fc1", "k_proj")),
    "fsmt": (True, {**BART, "langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96}, ("k_proj", "fc1")),
    "xlnet": (False, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, ("layer_1", "layer_2")),
    "deepseek_v3": (False, {**LATENT, "n_group": 1, "topk_group": 1}, ("q_b_proj", "kv_b_proj")),
    "opt": (
        False,
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        ("q_proj", "fc1"),
    ),
    "llama": (False, LLAMA, ("q_proj", "up_proj")),
}
POOLS = ("auto", "running", "token")


def batch(rows: int, tokens: int, *, seq2seq: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 90, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    if tokens > 4:  # one row is shorter
        padding = slice(-2, None) if seq2seq else slice(0, 2)
        ids[0, padding] = mask[0, padding] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return given | ({"decoder_input_ids": torch.randint(4, 90, (rows, 4), generator=random)} if seq2seq else {})


@pytest.mark.parametrize("kind", SHAPES)
def test_a_batch_equals_its_rows_one_by_one(kind: str) -> None:
    seq2seq, settings, ends = SHAPES[kind]
    model = random_base(kind, seq2seq=seq2seq, **settings)
    # As many sequences as tokens: then shapes do not tell them apart.
    for rows, tokens in ((4, 4), (2, 8)):
        given = batch(rows, tokens, seq2seq=seq2seq)
        kept = torch.ones(rows, 4).bool() if seq2seq else given["attention_mask"].bool()
        for pool in POOLS:
            with torch.no_grad(), random_mixture(model, ends, pool=pool):
                together = model(**given).logits
                for row in range(rows):
                    alone = model(**{name: value[row : row + 1] for name, value in given.items()}).logits
                    assert apart(together[row][kept[row]], alone[0][kept[row]]) < 2e-5, (rows, tokens, pool, row)


@pytest.mark.parametrize("kind", ["led", "fsmt"])
def test_beams_over_token_first_inputs_equal_one_by_one(kind: str) -> None:
    _, settings, ends = SHAPES[kind]
    model = random_base(kind, seq2seq=True, **settings)
    ids = batch(2, 8, seq2seq=True)["input_ids"]
    ids[0, -2:] = 7
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    for granularity in ("layer", "network"):
        with torch.no_grad(), random_mixture(model, ends, granularity=granularity):
            together = model.generate(input_ids=ids, **options)
            alone = [model.generate(input_ids=ids[row : row + 1], **options) for row in range(2)]
            assert torch.equal(together, torch.cat(alone))


REFUSED: dict[str, tuple[str, bool, dict[str, Any], tuple[str, ...], int, str]] = {
    "padded inside": (
        "led", True, SHAPES["led"][1], ("query",), 7, r"pad the batch to 8 tokens yourself \(pad_to_multiple_of=8\)",
    ),
    "routed": (
        "switch_transformers", True,
        {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        ("wi",), 8, r"experts\.expert_\d\.wi: a gate reads the tokens here",
    ),
    "streams": (
        "prophetnet", True,
        {
            "hidden_size": 32, "encoder_ffn_dim": 48, "num_encoder_layers": 1, "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 48, "num_decoder_layers": 1, "num_decoder_attention_heads": 4, "ngram": 2,
            "decoder_start_token_id": 1,
        },
        ("relative_pos_embeddings",), 8, "2 x 2 x 4 vectors cannot be told apart as 2 sequences of 4 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_cannot_be_told_apart_are_refused_by_name(case: str) -> None:
    kind, seq2seq, settings, ends, tokens, message = REFUSED[case]
    model = random_base(kind, seq2seq=seq2seq, **settings)
    given = batch(2, tokens, seq2seq=seq2seq)
    with torch.no_grad():
        base = model(**given).logits
        with random_mixture(model, ends), pytest.raises(RunError, match=message):
            model(**given)
        with random_mixture(model, ends, mode="linear"):
            assert not torch.allclose(model(**given).logits, base, atol=1e-3)


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lead", "size", "first", "expected"),
    [
        ((2, 7), (2, 7), None, Axes(0, 1)),
        ((7, 2), (2, 7), None, Axes(1, 0)),
        ((14,), (2, 7), None, Axes(0, 0)),
        ((3,), (2, 7), None, Axes(None, None)),
        ((2, 1, 7), (2, 7), None, Axes(0, 2)),
        ((2, 7, 4), (2, 7), None, Axes(0, 1)),
        ((2, 7, 7), (2, 7), None, Axes(0, None)),
        ((2, 2, 7), (2, 7), None, Axes(None, None)),  # either may be the sequences
        ((2, 8), (2, 7), None, Axes(0, None)),
        ((8, 2), (2, 7), None, Axes(None, None)),
        ((2, 2), (2, 7), None, Axes(None, None)),
        ((5, 6), (2, 7), None, Axes(None, None)),
        ((3, 3), (3, 3), None, Axes(None, None)),
        ((3, 3), (3, 3), True, Axes(0, 1)),
        ((3, 3), (3, 3), False, Axes(1, 0)),
        ((3, 1, 3), (3, 3), True, Axes(0, 2)),
        ((1, 1), (1, 1), None, Axes(0, 1)),
    ],
)
def test_axes_are_found_by_their_sizes(lead: Any, size: Any, first: bool | None, expected: Axes) -> None:
    assert axes_of(lead, *size, first=first) == expected


@pytest.mark.parametrize(
    ("lead", "axes", "index"),
    [
        ((2, 3), Axes(0, 1), lambda b, t: (b, t)),
        ((3, 2), Axes(1, 0), lambda b, t: (t, b)),
        ((2, 1, 3), Axes(0, 2), lambda b, t: (b, 0, t)),
        ((6,), Axes(0, 0), lambda b, t: (3 * b + t,)),
    ],
)
def test_values_and_inputs_are_placed(lead: tuple[int, ...], axes: Axes, index: Any) -> None:
    size = (2, 3)
    x = torch.randn(*lead, 5)
    tokens = as_tokens(x, "m", axes, size)
    values, ones = torch.randn(2, 3, 4), torch.ones(*lead, 4)
    for given in (values, values[:, :1], values[:1, :1]):
        weighted = ones * placed(given, "m", lead, axes, size)
        for b in range(2):
            for t in range(3):
                assert torch.equal(tokens[b, t], x[index(b, t)])
                assert torch.equal(weighted[index(b, t)], given.expand(2, 3, 4)[b, t])
    repeated = placed(values[:1, :1].expand(2, 1, 4).clone(), "m", (4, 3), Axes(0, 1), (4, 3))
    assert repeated.shape == (4, 1, 4)  # beams repeat each sequence


def test_experts_get_their_own_tokens() -> None:
    assert routed("block.1.mlp.experts.expert_3.wi")
    assert routed("layers.0.moe.experts.7.w1")
    assert not routed("layers.0.mlp.shared_experts.up_proj")
    assert not routed("layers.0.mlp.shared_expert.up_proj")
    with pytest.raises(RunError, match=r"^m\.experts\.0\.w1: a gate weighs LoRAs for each sequence"):
        placed(torch.ones(2, 1, 4), "m.experts.0.w1", (6,), Axes(0, 0), (2, 3))
    assert placed(torch.ones(1, 1, 4), "m.experts.0.w1", (5,), Axes(None, None), (1, 3)).shape == (1, 4)
