"""The columns of the table: ways of calling a model, each with what it must equal.

A way yields pairs (result, expected). It is tried on the base first: where the base alone does not keep it, or raises,
there is nothing to keep. With LoRAs the same must hold, or molecli refuses. Contents: WAYS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from molecli.mixture.streams import CACHE_ARGUMENTS
from tests.conformance.calls import NEW, PROMPTS, Call, Pairs, Way
from tests.conformance.files import FILES
from tests.conformance.naive import NaiveGates
from tests.conformance.subject import GATED

REPEATED = [8, 12, 61, 8, 12, 61, 8]  # so that prompt lookup has candidates
FEW = ("linear", "prompt/block")


def defined(call: Call) -> Pairs:
    """Teacher forcing with the gates is that with gates from their definition."""
    prompt, answer = PROMPTS[1], [14, 71, 30, 25]
    with call.mixed() as mixture:
        found = call.taught(prompt, answer)
    if mixture is None:
        yield found, found
        return
    size = {"prompt": 1, "length": NEW, "memory": len(prompt)} if call.seq2seq else {"prompt": len(prompt)}
    with NaiveGates(mixture, call.model, **{"length": len(prompt) + NEW, **size}):
        expected = call.taught(prompt, answer)
    yield found, expected


# -- forward passes ----------------------------------------------------------------------------------------------------


def by_position(call: Call) -> Pairs:
    batch = call.batch()
    named = {**batch, **call.decoder(len(PROMPTS))}
    order = {name: one.default for name, one in signature(call.model.forward).parameters.items()}
    last = max(list(order).index(name) for name in named)
    values = [named.get(name, default) for name, default in list(order.items())[: last + 1]]
    with torch.no_grad():
        yield call.model(*values, use_cache=False).logits, call.logits(**named)


def _padded(side: str) -> Callable[[Call], Pairs]:
    def way(call: Call) -> Pairs:
        batch = call.batch(side=side)
        logits = call.logits(**batch, **({} if call.seq2seq else call.positions(batch["attention_mask"])))
        for row, values, mask in zip(PROMPTS, logits, batch["attention_mask"], strict=True):
            yield values if call.seq2seq else values[mask.bool()], call.alone(row)

    return way


def without_mask(call: Call) -> Pairs:
    rows = (PROMPTS[1], PROMPTS[1][::-1])
    logits = call.logits(input_ids=torch.tensor(rows))
    for row, values in zip(rows, logits, strict=True):
        yield values, call.alone(row)


def four_axes(call: Call) -> Pairs:
    """The mask as [B, 1, T, T], as a static cache or packing code gives it."""
    if call.seq2seq:
        raise NotImplementedError("an encoder takes the mask of its rows")
    batch = call.batch()
    mask = batch["attention_mask"]
    tokens = mask.shape[1]
    seen = torch.ones(tokens, tokens).tril().bool() & mask.bool()[:, None, None, :]
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = call.logits(input_ids=batch["input_ids"], attention_mask=additive, **call.positions(mask))
    for row, values, real in zip(PROMPTS, logits, mask, strict=True):
        yield values[real.bool()], call.alone(row)


def embedded(call: Call) -> Pairs:
    batch = call.batch()
    ids = batch.pop("input_ids")
    embeds = call.model.get_input_embeddings()(ids) * getattr(
        call.model.get_encoder() if call.seq2seq else call, "embed_scale", 1.0
    )
    yield call.logits(inputs_embeds=embeds, **batch), call.logits(input_ids=ids, **batch)


def last_logits(call: Call) -> Pairs:
    """Only the logits of the last token, as generation asks for them."""
    if not call.given("logits_to_keep"):
        raise NotImplementedError("it always computes all logits")
    batch = call.batch([PROMPTS[1], PROMPTS[1][::-1]])
    yield call.logits(**batch, logits_to_keep=1), call.logits(**batch)[:, -1:]


def packed(call: Call) -> Pairs:
    """Two texts in one row, told apart by their positions."""
    ids = torch.tensor([[token for row in PROMPTS for token in row]])
    positions = torch.tensor([[place for row in PROMPTS for place in range(len(row))]])
    logits = call.logits(input_ids=ids, position_ids=positions)[0]
    for row, values in zip(PROMPTS, logits.split([len(row) for row in PROMPTS]), strict=True):
        yield values, call.alone(row)


def _cached(sizes: Sequence[int]) -> Callable[[Call], Pairs]:
    """The cache in the caller's hands: the prompt, then an answer in pieces of these sizes."""

    def way(call: Call) -> Pairs:
        prompt, answer = PROMPTS[1], [14, 71, 30, 25]
        fed = [call.start, *answer[:-1]] if call.seq2seq else answer
        pieces = torch.tensor(fed).split(list(sizes))
        yield _in_pieces(call, prompt, pieces)[: len(answer)], call.taught(prompt, answer)

    return way


def _in_pieces(call: Call, prompt: Sequence[int], pieces: Sequence[Tensor]) -> Tensor:
    """[T, V], the logits from the prompt's last token on, pass by pass with the model's own cache."""
    given, logits, past = torch.tensor([list(prompt)]), [], {}
    mask = torch.ones_like(given)
    for new in pieces if call.seq2seq else (given, *pieces):
        new = new.reshape(1, -1)
        inputs = {"input_ids": given, "decoder_input_ids": new} if call.seq2seq else {"input_ids": new}
        if past and not call.seq2seq:
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        with torch.no_grad():
            out = call.model(**inputs, attention_mask=mask, use_cache=True, **past)
        name = next(name for name in CACHE_ARGUMENTS if getattr(out, name, None) is not None)
        past = {name: getattr(out, name)}
        logits.append(out.logits[0, -1:] if not logits and not call.seq2seq else out.logits[0])
    return torch.cat(logits)


# -- generation --------------------------------------------------------------------------------------------------------


def _greedy(**options: Any) -> Callable[[Call], Pairs]:
    def way(call: Call) -> Pairs:
        yield from call.answered(call.generate(**call.batch(), **options), PROMPTS)

    return way


def static(call: Call) -> Pairs:
    """A static cache, asked for in the call and by the checkpoint's own settings."""
    yield from call.answered(
        call.generate(**call.batch(), cache_implementation="static", disable_compile=True), PROMPTS
    )
    own = call.model.generation_config
    own.cache_implementation = "static"
    try:
        out = call.generate(**call.batch(), disable_compile=True)
    finally:
        own.cache_implementation = None
    yield from call.answered(out, PROMPTS)


def continued(call: Call) -> Pairs:
    """`generate` on the cache of a pass before: its tokens are the prompt that gates see."""
    if call.seq2seq:
        raise NotImplementedError("the prompt of an encoder-decoder is not in its cache")
    first, ids = PROMPTS[1][:4], torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        out = call.model(input_ids=ids[:, :4], attention_mask=torch.ones(1, 4, dtype=torch.long), use_cache=True)
    name = next(name for name in CACHE_ARGUMENTS if getattr(out, name, None) is not None)
    out = call.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: getattr(out, name)})
    rest = out.sequences[0, len(first) :].tolist()
    yield torch.stack(out.logits, 1)[0], call.taught(first, rest)[-NEW:]


def generate_embedded(call: Call) -> Pairs:
    if call.seq2seq:
        raise NotImplementedError("an encoder-decoder generates from the tokens of its encoder")
    batch = call.batch()
    out = call.generate(
        inputs_embeds=call.model.get_input_embeddings()(batch["input_ids"]), attention_mask=batch["attention_mask"]
    )
    yield from call.answered(out, PROMPTS)


def beams(call: Call) -> Pairs:
    """Two beams: each prompt's are those that it has alone, and their scores are those of teacher forcing."""
    out = call.generate(**call.batch(), num_beams=2, output_scores=True)
    for i, prompt in enumerate(PROMPTS):
        answer = out.sequences[i, -NEW:]
        single = call.generate(**call.batch([prompt]), num_beams=2)
        yield answer.float(), single.sequences[0, -NEW:].float()
        chosen = call.taught(prompt, answer.tolist()).log_softmax(-1).gather(-1, answer[:, None])
        yield out.sequences_scores[i], chosen.sum() / NEW


def _several(call: Call) -> Pairs:
    """What proposals rest on, also where the base accepts none: that it reads several tokens on its cache."""
    if call.mode is None:
        yield from _cached((1, 2, 1))(call)


def lookup(call: Call) -> Pairs:
    yield from _several(call)
    out = call.generate(**call.batch([REPEATED]), prompt_lookup_num_tokens=2)
    yield from call.answered(out, [REPEATED])


def assisted(call: Call) -> Pairs:
    yield from _several(call)
    out = call.generate(**call.batch([PROMPTS[1]]), assistant_model=call.subject.assistant)
    yield from call.answered(out, [PROMPTS[1]])


def samples(call: Call) -> Pairs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = call.generate(**call.batch(), do_sample=True, num_return_sequences=2, top_k=0)
    yield from call.answered(out, PROMPTS)


# -- training ----------------------------------------------------------------------------------------------------------


def _checkpointed(between: bool) -> Callable[[Call], Pairs]:
    """Gradients with activation checkpointing are those without."""

    def way(call: Call) -> Pairs:
        call.model.train()
        try:
            call.model.gradient_checkpointing_enable({"use_reentrant": False})
            try:
                found = call.subject.gradients(call, between=between)
            finally:
                call.model.gradient_checkpointing_disable()
                call.model.disable_input_require_grads()
            expected = call.subject.gradients(call, between=False)
        finally:
            call.model.eval()
        yield found, expected

    return way


# -- wrappers ----------------------------------------------------------------------------------------------------------


def parallel(call: Call) -> Pairs:
    """`DataParallel` around the model; without devices it calls the model as it is."""
    yield call.plain(nn.DataParallel(call.model)), call.plain(call.model)


def parallel_before(call: Call) -> Pairs:
    """The LoRAs are attached to the wrapper."""
    with call.mixed():
        expected = call.plain(call.model)
    wrapper = nn.DataParallel(call.model)
    with call.mixed(model=wrapper):
        yield call.plain(wrapper), expected


def compiled(call: Call) -> Pairs:
    """Compiled with the LoRAs on it."""
    torch._dynamo.reset()
    yield call.plain(torch.compile(call.model, backend="eager")), call.plain(call.model)


def compiled_before(call: Call) -> Pairs:
    """Compiled and called before, so that the graph of the base exists; the LoRAs are attached to what was compiled."""
    with call.mixed():
        expected = call.plain(call.model)
    torch._dynamo.reset()
    wrapper = torch.compile(call.model, backend="eager")
    base = call.plain(wrapper)
    with call.mixed(model=wrapper):
        yield call.plain(wrapper), expected
    yield call.plain(wrapper), base


WAYS: Mapping[str, Way] = {
    "defined": Way("gates as defined", defined, attaches=True, modes=tuple(GATED)),
    "by_position": Way("inputs by position", by_position),
    "left": Way("padding left", _padded("left")),
    "right": Way("padding right", _padded("right")),
    "without_mask": Way("no mask", without_mask),
    "four_axes": Way("mask with four axes", four_axes),
    "embedded": Way("`inputs_embeds`", embedded),
    "last_logits": Way("`logits_to_keep`", last_logits),
    "packed": Way("texts packed in a row", packed),
    "cached": Way("own cache, by token", _cached((1, 1, 1, 1))),
    "pieces": Way("own cache, in pieces", _cached((1, 2, 1))),
    "generate": Way("`generate`", _greedy()),
    "uncached": Way("`use_cache=False`", _greedy(use_cache=False)),
    "static": Way("static cache", static),
    "chunks": Way("prefill in chunks", _greedy(prefill_chunk_size=3)),
    "continued": Way("`generate` on a cache", continued),
    "generate_embedded": Way("`generate(inputs_embeds)`", generate_embedded),
    "beams": Way("beams", beams),
    "lookup": Way("prompt lookup", lookup),
    "assisted": Way("assistant model", assisted),
    "samples": Way("samples", samples),
    "checkpointed": Way("checkpointing", _checkpointed(between=False)),
    "between": Way("checkpointing, generation between", _checkpointed(between=True)),
    "parallel": Way("`DataParallel`", parallel),
    "parallel_before": Way("attached to `DataParallel`", parallel_before, attaches=True, modes=FEW),
    "compiled": Way("compiled with LoRAs", compiled, modes=FEW, costly=True),
    "compiled_before": Way("compiled before", compiled_before, attaches=True, modes=FEW, costly=True),
    **FILES,
}
