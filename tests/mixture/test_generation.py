"""Every way of calling `generate` gives what teacher forcing gives for the same tokens, or is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from molecli.errors import RunError
from molecli.mixture.generation import Generations
from tests.helpers.language_bases import LLAMA, apart, prompts, random_base, random_mixture

IDS, MASK = prompts()
ENDS = ("q_proj", "v_proj", "up_proj")
NEW = 5
ONE = slice(1, 2)
POOLS = ("prompt", "running", "token")

# name -> (options of `generate`, the rows of the batch)
WAYS: dict[str, tuple[dict[str, Any], slice]] = {
    "dynamic": ({}, slice(None)),
    "no cache": ({"use_cache": False}, slice(None)),
    "static": ({"cache_implementation": "static"}, slice(None)),
    "hybrid": ({"cache_implementation": "hybrid"}, slice(None)),
    "embeddings": ({"embeds": True}, slice(None)),
    "embeddings, static": ({"embeds": True, "cache_implementation": "static"}, slice(None)),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, ONE),
    "prompt lookup with padding": ({"prompt_lookup_num_tokens": 3}, slice(0, 1)),
    "assistant": ({"assistant": True}, ONE),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_base("llama", **LLAMA)


@pytest.fixture(scope="module")
def small() -> Any:
    return random_base("llama", **{**LLAMA, "num_hidden_layers": 1})


def generated(model: Any, rows: slice = slice(None), *, embeds: bool = False, **options: Any) -> Any:
    given = {"inputs_embeds": model.get_input_embeddings()(IDS[rows])} if embeds else {"input_ids": IDS[rows]}
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True}
    return model.generate(**given, attention_mask=MASK[rows], return_dict_in_generate=True, **{**settings, **options})


def taught(model: Any, new: Tensor, rows: slice = slice(None)) -> Tensor:
    """The logits that choose the tokens `new`, with labels that say where the prompt ends."""
    mask, ids = MASK[rows], IDS[rows]
    mask, ids = (whole.repeat_interleave(len(new) // len(ids), 0) for whole in (mask, ids))
    whole = torch.cat([ids, new], 1)
    labels = whole.clone()
    labels[:, : ids.shape[1]] = -100
    mask = torch.cat([mask, torch.ones_like(new)], 1)
    return model(input_ids=whole, attention_mask=mask, labels=labels, use_cache=False).logits[:, ids.shape[1] - 1 : -1]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_teacher_forcing(way: str, pool: str, llama: Any, small: Any) -> None:
    options, rows = WAYS[way]
    if "assistant" in options:
        options = {"assistant_model": small}
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        out = generated(llama, rows, **options)
        logits = torch.stack(out.logits, 1)
        assert apart(logits, taught(llama, out.sequences[:, -NEW:], rows)) < 1e-5


@pytest.mark.parametrize("pool", POOLS)
def test_sampled_sequences_of_one_prompt_equal_teacher_forcing(pool: str, llama: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        out = generated(llama, num_return_sequences=2, do_sample=True)
        assert apart(torch.stack(out.logits, 1), taught(llama, out.sequences[:, -NEW:])) < 1e-5


def beams(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(the scores of the best beams, and those of their tokens by teacher forcing)."""
    out = generated(model, num_beams=3, output_scores=True, **options)
    new = out.sequences[:, -NEW:]
    chosen = F.log_softmax(taught(model, new), -1).gather(-1, new[..., None])
    return out.sequences_scores, chosen.sum((1, 2)) / NEW


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_beams_are_scored_as_in_teacher_forcing_or_refused(options: dict[str, Any], pool: str, llama: Any) -> None:
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        if pool == "running" and options.get("use_cache", True):
            with pytest.raises(RunError, match="put in another order since the last pass, as beam search does"):
                beams(llama, **options)
            return
        scores, expected = beams(llama, **options)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_the_models_own_generation_config_is_no_other(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.generation_config.cache_implementation = "static"
    with torch.no_grad(), random_mixture(model, ENDS):
        out = generated(model)
        assert apart(torch.stack(out.logits, 1), taught(model, out.sequences[:, -NEW:])) < 1e-5


def test_sliding_caches_tell_padding_too() -> None:
    """Masks of a static cache come prepared, one for each kind of layer, and longer than the prompt or shorter."""
    model = random_base("gemma2", **LLAMA, head_dim=8, sliding_window=4)
    with torch.no_grad():
        for pool in ("prompt", "running"):
            with random_mixture(model, ENDS, pool=pool):
                for options in ({}, {"cache_implementation": "static"}):
                    out = generated(model, **options)
                    assert apart(torch.stack(out.logits, 1), taught(model, out.sequences[:, -NEW:])) < 1e-5


# -- what cannot be exact ----------------------------------------------------------------------------------------------


def test_a_prompt_in_parts_is_refused_for_gates_that_read_it_as_a_whole(llama: Any) -> None:
    with torch.no_grad():
        for pool in ("running", "token"):
            with random_mixture(llama, ENDS, pool=pool):
                out = generated(llama, prefill_chunk_size=4)
                assert apart(torch.stack(out.logits, 1), taught(llama, out.sequences[:, -NEW:])) < 1e-5
        with random_mixture(llama, ENDS), pytest.raises(RunError) as caught:
            generated(llama, prefill_chunk_size=4)
    assert str(caught.value) == (
        "generation: a pass reads only 4 of the 9 tokens of the prompt, by which gates weigh LoRAs. "
        "Leave prefill_chunk_size and guidance_scale out, or use gates with --pool running or token."
    )


@pytest.mark.parametrize("pool", ["prompt", "running"])
def test_two_texts_in_turn_are_refused(pool: str, llama: Any) -> None:
    with torch.no_grad(), random_mixture(llama, ENDS, pool=pool):
        for options in ({"assistant_early_exit": 1}, {"assistant_model": llama}):
            with pytest.raises(RunError, match="the model reads two texts in turn"):
                generated(llama, ONE, **options)
        with pytest.raises(RunError, match=r"two texts in turn|reads only 1 of the 9 tokens"):
            generated(llama, guidance_scale=2.0)


def test_continuous_batching_is_refused_where_gates_average_over_tokens(llama: Any) -> None:
    for pool in ("prompt", "running"):
        with random_mixture(llama, ENDS, pool=pool), pytest.raises(RunError, match="generate_batch packs several"):
            llama.generate_batch(inputs=[[5, 6]])
    assert "generate_batch" not in vars(llama)
    with random_mixture(llama, ENDS, pool="token"), random_mixture(llama, ENDS, mode="linear"):
        assert "generate_batch" not in vars(llama)


def test_a_conversation_goes_on_only_where_its_new_tokens_are_no_prompt(llama: Any) -> None:
    with torch.no_grad(), random_mixture(llama, ENDS):
        whole = generated(llama)
        out = generated(llama, max_new_tokens=3, min_new_tokens=3)
        mask = torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], 1)
        settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "attention_mask": mask}
        more = llama.generate(out.sequences, past_key_values=out.past_key_values, **settings)
        assert torch.equal(more, whole.sequences)  # the same generation in two calls
        out = generated(llama)
        turn = torch.cat([out.sequences, IDS[:, :4]], 1)
        with pytest.raises(RunError, match="several tokens follow a cached prompt"):
            llama.generate(turn, past_key_values=out.past_key_values, max_new_tokens=2, do_sample=False)
    with torch.no_grad(), random_mixture(llama, ENDS, pool="running"):
        out = generated(llama, ONE)
        turn = torch.cat([out.sequences, IDS[ONE, :4]], 1)
        more = llama.generate(turn, past_key_values=out.past_key_values, max_new_tokens=3, do_sample=False)
        assert torch.equal(more, llama.generate(turn, max_new_tokens=3, do_sample=False))


# -- the watch itself --------------------------------------------------------------------------------------------------


def test_generate_is_watched_only_while_attached(llama: Any) -> None:
    with random_mixture(llama, ENDS):
        assert "generate" in vars(llama)
        copied = copy.deepcopy(llama)
        assert copied.generate.__self__ is copied
    assert "generate" not in vars(llama)


def test_a_generate_of_ones_own_comes_back(llama: Any) -> None:
    def own(*_: Any, **__: Any) -> str:
        return "own"

    llama.generate = own
    try:
        watching = Generations()
        (handle,) = watching.watch(llama, pools=False)
        assert llama.generate(IDS) == "own"
        assert watching.running == []
        handle.remove()
        assert llama.generate is own
    finally:
        del llama.generate


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((IDS,), {}, 9),
        ((), {"inputs": IDS[:, :4]}, 4),
        ((), {"input_ids": IDS[:, :7], "inputs_embeds": torch.zeros(2, 7, 32)}, 7),
        ((), {}, 1),
    ],
)
def test_the_prompt_is_what_generate_was_given(args: Any, kwargs: Any, expected: int, llama: Any) -> None:
    seen = []
    model = copy.deepcopy(llama)
    watching = Generations()
    model.register_forward_pre_hook(lambda *_: seen.append(watching.current))
    watching.watch(model, pools=False)
    model.generate(*args, **kwargs, max_new_tokens=1)
    assert [one.prompt for one in seen] == [expected]
