"""One call of a model in every form that says the same, or that does not say which tokens count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from molecli.errors import RunError
from molecli.mixture.called_tokens import CalledTokens, KeyRange, by_name, key_ranges, positional, visible_memory
from tests.helpers.language_bases import LLAMA, apart, prompts, random_base, random_mixture

IDS, MASK = prompts()
PLACES = (MASK.cumsum(1) - 1).clamp_min(0)
SEEN = torch.tril(torch.ones(9, 9, dtype=torch.bool))[None, None] & MASK[:, None, None, :].bool()
ADDED = torch.zeros(SEEN.shape).masked_fill(~SEEN, torch.finfo(torch.float32).min)
BLOCKS = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool().tril().expand(2, 1, 9, 9)
ENDS = ("q_proj", "v_proj", "up_proj")


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_base("llama", **LLAMA)


def static(model: Any) -> transformers.StaticCache:
    return transformers.StaticCache(config=model.config, max_cache_len=20)


# Every one tells the model the same as model(input_ids=IDS, attention_mask=MASK).
FORMS: dict[str, Callable[[Any], Any]] = {
    "by position": lambda m: m(IDS, MASK),
    "all by position": lambda m: m(IDS, MASK, PLACES),
    "as a tuple": lambda m: m(IDS, MASK, return_dict=False),
    "embeddings": lambda m: m(inputs_embeds=m.get_input_embeddings()(IDS), attention_mask=MASK),
    "embeddings by position": lambda m: m(None, MASK, None, None, m.get_input_embeddings()(IDS)),
    "a mask of numbers": lambda m: m(IDS, attention_mask=MASK.float()),
    "a mask of truths": lambda m: m(IDS, attention_mask=MASK.bool()),
    "a 4-D mask of truths": lambda m: m(IDS, attention_mask=SEEN, position_ids=PLACES),
    "a 4-D mask to add": lambda m: m(IDS, attention_mask=ADDED, position_ids=PLACES),
    "a static cache": lambda m: m(IDS, attention_mask=MASK, position_ids=PLACES, past_key_values=static(m)),
    "a mask as long as a static cache": lambda m: m(
        IDS, attention_mask=nn.functional.pad(MASK, (0, 11)), position_ids=PLACES, past_key_values=static(m)
    ),
}
# None of these says which tokens are padding, or which belong to one sequence.
UNTOLD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "positions alone": (lambda m: m(IDS, position_ids=PLACES), "position_ids jump without an attention_mask"),
    "blocks": (lambda m: m(IDS, attention_mask=BLOCKS), "the attention_mask separates tokens of one row"),
    "packed": (
        lambda m: m(IDS, cu_seq_lens_q=torch.tensor([0, 4, 9])),
        r"packs several sequences into one row \(cu_seq_lens_q\)",
    ),
    "short mask": (lambda m: m(IDS, attention_mask=MASK[:, :7]), "over 7 tokens does not fit 9 tokens"),
    "long mask": (
        lambda m: m(IDS, attention_mask=nn.functional.pad(MASK, (0, 4), value=1)),
        "over 13 tokens does not fit 9 tokens",
    ),
}


@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
def test_every_form_gives_what_each_sequence_gives_alone(pool: str, llama: Any) -> None:
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        first, second = llama(input_ids=IDS[:1, 3:]).logits, llama(input_ids=IDS[1:]).logits
        for name, form in FORMS.items():
            logits = form(llama)[0]
            assert apart(logits[:1, 3:], first) < 1e-5, name
            assert apart(logits[1:], second) < 1e-5, name


@pytest.mark.parametrize("pool", ["prompt", "running"])
@pytest.mark.parametrize("name", UNTOLD)
def test_a_form_that_does_not_say_it_is_refused(name: str, pool: str, llama: Any) -> None:
    call, message = UNTOLD[name]
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool), pytest.raises(RunError, match=message):
        call(llama)


@pytest.mark.parametrize("name", UNTOLD)
def test_weights_that_pool_nothing_do_not_mind(name: str, llama: Any) -> None:
    with torch.no_grad():
        base = UNTOLD[name][0](llama).logits
        for how in ({"mode": "linear"}, {"pool": "token"}):
            with random_mixture(llama, ENDS, **how):
                assert not torch.allclose(UNTOLD[name][0](llama).logits, base, atol=1e-2)


def test_sliding_layers_have_masks_of_their_own() -> None:
    """Gemma's masks come as one for each kind of layer, from `generate` and by hand."""
    model = random_base("gemma2", **LLAMA, head_dim=8, sliding_window=4)
    with torch.no_grad(), random_mixture(model, ENDS):
        alone = model(input_ids=IDS[:1, 3:]).logits
        hidden = torch.finfo(torch.float32).min
        window = ADDED.masked_fill(torch.ones(9, 9).tril(-4).bool(), hidden)
        masks = {"full_attention": ADDED, "sliding_attention": window}
        assert apart(model(IDS, attention_mask=masks, position_ids=PLACES).logits[:1, 3:], alone) < 1e-5
        masks["full_attention"] = torch.zeros(BLOCKS.shape).masked_fill(~BLOCKS, hidden)
        with pytest.raises(RunError, match="separates tokens"):
            model(IDS, attention_mask=masks, position_ids=PLACES)


# -- CalledTokens ------------------------------------------------------------------------------------------------------


def test_the_last_tokens_of_a_static_mask_are_not_those_of_the_pass() -> None:
    mask = torch.zeros(1, 20, dtype=torch.long)
    mask[0, 2:8] = 1
    assert CalledTokens({"input_ids": IDS[1:, :3], "attention_mask": mask}, past=5).valid.tolist() == [[1, 1, 1]]
    assert CalledTokens({"input_ids": IDS[1:, :3], "attention_mask": mask}, past=6).valid.tolist() == [[1, 1, 0]]
    # A recurrent state does not count its tokens: then they are the last ones of the mask.
    assert CalledTokens({"input_ids": IDS[1:, :3], "attention_mask": mask}, past=None).valid.tolist() == [[0, 0, 0]]


def test_a_prepared_mask_of_a_sliding_cache_begins_where_its_layer_does() -> None:
    seen = torch.ones(1, 1, 2, 5, dtype=torch.bool).tril(3)
    seen[..., 3] = False  # the first of the two tokens

    def valid(offset: int) -> list[list[int]]:
        told = {"input_ids": IDS[1:, :2], "attention_mask": seen}
        return CalledTokens(told, past=10, keys=lambda: (KeyRange(5, offset),)).valid.tolist()

    assert valid(7) == [[0, 1]]
    assert valid(8) == [[1, 0]]


def test_a_cache_says_what_masks_cover(llama: Any) -> None:
    cache = static(llama)
    assert key_ranges(cache, 0, 4) == ((4, 0), (20, 0))
    assert key_ranges(None, 3, 4) == ((7, 0),)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"labels": [[-100, -100, 5, 6]]}, [[1, 1, 0, 0]]),
        ({"shift_labels": [[-100, 5, 6, -100]]}, [[1, 1, 0, 0]]),
        ({"labels": [[5, 6, 7, 8]]}, [[0, 0, 0, 0]]),
    ],
)
def test_labels_say_where_the_prompt_ends(labels: dict[str, Any], expected: list[list[int]]) -> None:
    told = {"input_ids": IDS[1:, :4], **{name: torch.tensor(value) for name, value in labels.items()}}
    tokens = CalledTokens(told)
    assert tokens.prompt.tolist() == expected
    assert tokens.all_answer() == (not any(expected[0]))


def test_generate_says_where_the_prompt_ends() -> None:
    assert CalledTokens({"input_ids": IDS[1:, :4]}, past=2, prompt_length=4).prompt.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "called without input_ids"),
        ({"input_ids": IDS, "labels": IDS[:, :4]}, r"labels of shape \(2, 4\) do not say"),
        ({"input_ids": IDS, "attention_mask": object()}, "a mask of the kind object"),
        ({"input_ids": IDS, "attention_mask": SEEN.long()}, "must be bool or floating point"),
        ({"input_ids": IDS, "attention_mask": SEEN[..., :4]}, "does not say which of 9 tokens are padding"),
    ],
)
def test_what_is_missing_is_named(told: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        _ = CalledTokens(told).prompt


def test_a_mask_of_the_encoder_may_be_prepared_too() -> None:
    memory = torch.zeros(2, 9, 4)
    assert visible_memory(memory, None).tolist() == [[1.0] * 9] * 2
    assert torch.equal(visible_memory(memory, MASK), MASK)
    spread = MASK[:, None, None, :].bool().expand(2, 1, 3, 9)
    assert torch.equal(visible_memory(memory, spread), MASK)
    assert torch.equal(visible_memory(memory, torch.zeros(2, 1, 3, 9).masked_fill(~spread, -1e38)), MASK)
    with pytest.raises(RunError, match="does not say which of the encoder's tokens are padding"):
        visible_memory(memory, SEEN)


def test_arguments_by_position_get_their_names() -> None:
    class Inner(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor | None = None, *, flag: bool = False) -> None: ...

    assert positional(Inner()) == ("ids", "mask")
    assert by_name(("ids", "mask"), (1, 2), {"flag": True}) == {"ids": 1, "mask": 2, "flag": True}
