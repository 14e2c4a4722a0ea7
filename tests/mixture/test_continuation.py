"""Passes by hand with a cache: what goes on from what is known, or the pass is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from molecli.errors import RunError
from molecli.mixture.continuation import SHORT, Trace, Witness, rolled_back
from tests.helpers.language_bases import LLAMA, apart, prompts, random_base, random_mixture

IDS, MASK = prompts(padding=0)
ENDS = ("q_proj", "v_proj", "up_proj")
MOVED = "the rows of the cache were changed or put in another order"


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_base("llama", **LLAMA)


@pytest.fixture(params=["none", "dynamic", "static"])
def cache(request: pytest.FixtureRequest, llama: Any) -> Any:
    """A cache given by hand, or none, so that the model makes its own."""
    kinds = {
        "none": lambda: None,
        "dynamic": transformers.DynamicCache,
        "static": lambda: transformers.StaticCache(config=llama.config, max_cache_len=20),
    }
    return kinds[request.param]()


@pytest.mark.parametrize("pool", ["prompt", "running", "token"])
def test_decoding_by_hand_equals_teacher_forcing(pool: str, cache: Any, llama: Any) -> None:
    labels = IDS.clone()
    labels[:, :5] = -100
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        out = llama(IDS[:, :5], past_key_values=cache, use_cache=True)
        logits = [out.logits]
        for place in range(5, 9):
            out = llama(IDS[:, place : place + 1], past_key_values=out.past_key_values, return_dict=True)
            logits.append(out.logits)
        assert apart(torch.cat(logits, 1), llama(IDS, labels=labels, use_cache=False).logits) < 1e-5


def test_a_prompt_in_two_passes_is_refused_or_exact(cache: Any, llama: Any) -> None:
    def both() -> torch.Tensor:
        first = llama(IDS[:, :5], attention_mask=MASK[:, :5], past_key_values=cache, use_cache=True)
        second = llama(IDS[:, 5:], attention_mask=MASK, past_key_values=first.past_key_values)
        return torch.cat([first.logits, second.logits], 1)

    with torch.no_grad(), random_mixture(llama, ENDS):
        with pytest.raises(RunError) as caught:
            both()
        assert str(caught.value) == (
            "generation: several tokens follow a cached prompt, and whether they are prompt too is not known. "
            "Give the whole prompt in one pass, or use gates with --pool running or token."
        )
    if cache is not None:
        cache.reset() if isinstance(cache, transformers.StaticCache) else cache.crop(-cache.get_seq_length())
    with torch.no_grad(), random_mixture(llama, ENDS, pool="running"):
        assert apart(both(), llama(IDS, use_cache=False).logits) < 1e-5


def test_labels_say_that_later_tokens_are_the_answer(llama: Any) -> None:
    labels = IDS.clone()
    labels[:, :5] = -100
    with torch.no_grad(), random_mixture(llama, ENDS):
        cached = llama(IDS[:, :5], use_cache=True).past_key_values
        rest = llama(IDS[:, 5:], labels=labels[:, 5:], past_key_values=cached).logits
        assert apart(rest, llama(IDS, labels=labels, use_cache=False).logits[:, 5:]) < 1e-5
        cached = llama(IDS[:, :4], use_cache=True).past_key_values
        with pytest.raises(RunError, match="several tokens follow a cached prompt"):
            llama(IDS[:, 4:], labels=labels[:, 4:], past_key_values=cached)


@pytest.mark.parametrize("pool", ["prompt", "running"])
def test_a_cache_in_other_hands_is_refused(pool: str, llama: Any) -> None:
    changes = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), MOVED),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), MOVED),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), MOVED),
        "crop": (lambda cache: cache.crop(-2), "cut back into the prompt" if pool == "prompt" else MOVED),
    }
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        for change, message in changes.values():
            cache = llama(IDS, use_cache=True).past_key_values
            change(cache)
            rows = cache.layers[0].keys.shape[0]
            with pytest.raises(RunError, match=message):
                llama(IDS[:1, :1].expand(rows, 1), past_key_values=cache)
        cache = llama(IDS, use_cache=True).past_key_values
        with pytest.raises(RunError, match="is not that of the last prompt"):
            llama(IDS[:, :1], past_key_values=copy.deepcopy(cache))
        llama(IDS, use_cache=False)
        with pytest.raises(RunError, match="is not that of the last prompt"):
            llama(IDS[:, :1], past_key_values=cache)


def test_a_gate_per_token_follows_a_cache_in_any_hands(llama: Any) -> None:
    with torch.no_grad(), random_mixture(llama, ENDS, pool="token"):
        cache = llama(IDS, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = llama(IDS[:, :1].flip(0), past_key_values=cache).logits
        whole = llama(torch.cat([IDS.flip(0), IDS[:, :1].flip(0)], 1), use_cache=False).logits[:, -1:]
        assert apart(swapped, whole) < 1e-5


def test_candidates_of_one_sequence_may_be_taken_back(llama: Any) -> None:
    one, other = IDS[:1], IDS[1:]
    with torch.no_grad(), random_mixture(llama, ENDS, pool="running"):
        cache = llama(one, use_cache=True).past_key_values
        llama(other[:, :4], past_key_values=cache)
        cache.crop(-3)
        went_on = llama(one[:, :2], past_key_values=cache).logits
        whole = torch.cat([one, other[:, :1], one[:, :2]], 1)
        assert apart(went_on, llama(whole, use_cache=False).logits[:, -2:]) < 1e-5


def test_a_cache_is_used_again_for_a_new_prompt(llama: Any) -> None:
    cache = transformers.StaticCache(config=llama.config, max_cache_len=20)
    with torch.no_grad(), random_mixture(llama, ENDS):
        for ids in (IDS, IDS.flip(1)):
            cache.reset()
            llama(ids, past_key_values=cache)
            went_on = llama(IDS[:, :1], past_key_values=cache).logits
            labels = torch.cat([torch.full_like(ids, -100), IDS[:, :1]], 1)
            whole = llama(torch.cat([ids, IDS[:, :1]], 1), labels=labels, use_cache=False).logits
            assert apart(went_on, whole[:, -1:]) < 1e-5


def test_shared_gates_follow_the_encoder_that_the_decoder_reads(tiny_t5: Any) -> None:
    model = tiny_t5.model
    with torch.no_grad(), random_mixture(model, ("q", "v", "wi_0"), granularity="network"):
        first = model.get_encoder()(input_ids=IDS)
        model(encoder_outputs=first, decoder_input_ids=IDS[:, :2])
        model.get_encoder()(input_ids=IDS.flip(0))
        with pytest.raises(RunError, match="the decoder reads another"):
            model(encoder_outputs=first, decoder_input_ids=IDS[:, :2])
        greedy = model.generate(input_ids=IDS, max_new_tokens=3, num_beams=2)  # repeats the encoder's output
        given = model.generate(encoder_outputs=model.get_encoder()(input_ids=IDS), max_new_tokens=3)
        assert greedy.shape[0] == given.shape[0] == 2


def test_a_decoder_alone_is_refused_where_gates_read_the_encoder(tiny_t5: Any) -> None:
    decoder = tiny_t5.model.get_decoder()
    message = "the decoder was called without the encoder's output"
    with torch.no_grad(), random_mixture(tiny_t5.model, ("q", "v")), pytest.raises(RunError, match=message):
        decoder(input_ids=IDS, use_cache=False)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_states_are_kept_for_some_tokens() -> None:
    sums, counts = torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[1.0, 2.0, 3.0]])
    last = Trace(rows=1, start=4, end=7)
    for start, place in ((7, 2), (6, 1), (5, 0)):
        state = rolled_back((sums, counts), last, start)
        assert state is not None
        assert torch.equal(state[0], sums[:, place])
        assert torch.equal(state[1], counts[:, place])
    for start in (4, 8):
        with pytest.raises(RunError, match="tokens were taken from the cache"):
            rolled_back((sums, counts), last, start)
    assert rolled_back(None, last, 7) is None
    assert SHORT >= 32


def test_a_witness_sees_when_rows_move(llama: Any) -> None:
    with torch.no_grad():
        cache = llama(IDS, use_cache=True).past_key_values
    seen = Witness.of(cache)
    assert seen.unchanged(cache)
    cache.reorder_cache(torch.tensor([0, 1]))
    assert not seen.unchanged(cache)
    assert not seen.unchanged(transformers.DynamicCache())
