"""The columns of the table: ways of calling a model, each with what it must equal.

A way yields pairs (result, expected). It is tried on the base first: where the base alone does not keep it, or raises,
there is nothing to keep. With LoRAs the same must hold, or molecli refuses. Contents: Call, Way, WAYS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from molecli.mixture.streams import CACHE_ARGUMENTS
from tests.conformance.subject import FIXED, Subject

Pairs = Iterator[tuple[Tensor, Tensor]]
PROMPTS = ([9, 23, 40, 7], [8, 12, 61, 33, 18, 5, 44])  # of different lengths, so that a batch is padded
REPEATED = [8, 12, 61, 8, 12, 61, 8]  # so that prompt lookup has candidates
DECODED = [2, 14, 71, 30]  # what an encoder-decoder's decoder is given in a plain forward pass
NEW = 4


class Call:
    """The model of a subject as a way calls it: inputs, passes, generation and teacher forcing.

    mode: that of the mixture that is on the model, None for the base.
    """

    def __init__(self, subject: Subject, mode: str | None) -> None:
        self.subject, self.mode, self.model = subject, mode, subject.model
        self.seq2seq = subject.seq2seq

    def given(self, name: str) -> bool:
        """Whether the model's `forward` has this argument."""
        return name in signature(self.model.forward).parameters

    def batch(self, rows: Sequence[Sequence[int]] = PROMPTS, side: str = "") -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T], padded on the side that is usual for the kind of model."""
        side = side or ("right" if self.seq2seq else "left")
        width = max(map(len, rows))
        pads = [[0] * (width - len(row)) for row in rows]
        join = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
        ids = torch.tensor([join(pad, list(row)) for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([join(pad, [1] * len(row)) for pad, row in zip(pads, rows, strict=True)])
        return {"input_ids": ids, "attention_mask": mask}

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """position_ids for padded rows, where the model takes them."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if self.given("position_ids") else {}

    def decoder(self, rows: int) -> dict[str, Tensor]:
        """The decoder's tokens in a plain forward pass; nothing for a causal model."""
        return {"decoder_input_ids": torch.tensor([DECODED] * rows)} if self.seq2seq else {}

    def logits(self, *args: Any, **inputs: Any) -> Tensor:
        """[B, T, V] of a plain forward pass."""
        rows = next(value for value in (*args, *inputs.values()) if isinstance(value, Tensor)).shape[0]
        with torch.no_grad():
            return self.model(*args, **{"use_cache": False, **self.decoder(rows), **inputs}).logits

    def alone(self, row: Sequence[int]) -> Tensor:
        """[T, V], the reference of plain passes: one row without padding, by keyword."""
        return self.logits(**self.batch([row]))[0]

    def taught(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """[answer, V], the reference of generation: teacher forcing of one row, without cache, labels on the answer."""
        answer = list(answer)
        with torch.no_grad():
            if self.seq2seq:
                decoded = torch.tensor([[self.start, *answer[:-1]]])
                ids = torch.tensor([list(prompt)])
                mask = torch.ones_like(ids)
                return self.model(
                    input_ids=ids, attention_mask=mask, decoder_input_ids=decoded, use_cache=False
                ).logits[0]
            ids = torch.tensor([[*prompt, *answer]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False)
            return out.logits[0, len(prompt) - 1 : -1]

    @property
    def start(self) -> int:
        """The token that an encoder-decoder's answer begins with."""
        found = self.model.generation_config.decoder_start_token_id
        return int(self.model.config.decoder_start_token_id if found is None else found)

    def generate(self, **inputs: Any) -> Any:
        """`model.generate`, greedily, always NEW tokens."""
        settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        settings |= {"return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            return self.model.generate(**{**settings, **inputs})

    def answered(self, out: Any, prompts: Sequence[Sequence[int]]) -> Pairs:
        """(logits that chose the answers, those of teacher forcing), row by row; rows may repeat each prompt."""
        logits = torch.stack(out.logits, 1)
        for i, answer in enumerate(out.sequences[:, -NEW:].tolist()):
            prompt = prompts[i * len(prompts) // len(logits)]
            yield logits[i], self.taught(prompt, answer)


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
    seen = seen | torch.eye(tokens, dtype=torch.bool)  # a row that sees nothing gives NaN
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


def cached(call: Call) -> Pairs:
    """The cache in the caller's hands: the prompt, then the answer in pieces of 1, 2 and 1 tokens."""
    prompt, answer = PROMPTS[1], [14, 71, 30, 25]
    pieces, logits, past = ([answer[0]], answer[1:3], answer[3:]), [], {}
    ids = torch.tensor([prompt])
    if call.seq2seq:
        pieces = ([call.start], [answer[0]], answer[1:3])
    seen = 0
    for piece in pieces if call.seq2seq else (prompt, *pieces):
        new = torch.tensor([piece])
        seen += len(piece)
        more = {"input_ids": ids, "decoder_input_ids": new} if call.seq2seq else {"input_ids": new}
        mask = torch.ones(1, len(prompt) if call.seq2seq else seen, dtype=torch.long)
        with torch.no_grad():
            out = call.model(**more, attention_mask=mask, use_cache=True, **past)
        name = next(name for name in CACHE_ARGUMENTS if getattr(out, name, None) is not None)
        past = {name: getattr(out, name)}
        logits.append(out.logits[0])
    if call.seq2seq:
        yield torch.cat(logits), call.taught(prompt, answer)
    else:
        yield torch.cat([logits[0][-1:], *logits[1:]])[: len(answer)], call.taught(prompt, answer)


# -- generation --------------------------------------------------------------------------------------------------------


def _greedy(**options: Any) -> Callable[[Call], Pairs]:
    def way(call: Call) -> Pairs:
        yield from call.answered(call.generate(**call.batch(), **options), PROMPTS)

    return way


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


def lookup(call: Call) -> Pairs:
    out = call.generate(**call.batch([REPEATED]), prompt_lookup_num_tokens=2)
    yield from call.answered(out, [REPEATED])


def assisted(call: Call) -> Pairs:
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
            expected = call.subject.gradients(call, between=False)
            call.model.gradient_checkpointing_enable({"use_reentrant": False})
            try:
                found = call.subject.gradients(call, between=between)
            finally:
                call.model.gradient_checkpointing_disable()
        finally:
            call.model.eval()
        yield found, expected

    return way


# -- wrappers ----------------------------------------------------------------------------------------------------------


def parallel(call: Call) -> Pairs:
    """`DataParallel` around the model, without devices: it calls the model as it is."""
    wrapped, batch = nn.DataParallel(call.model), {**call.batch(), **call.decoder(len(PROMPTS)), "use_cache": False}
    with torch.no_grad():
        yield wrapped(**batch).logits, call.model(**batch).logits


def compiled(call: Call) -> Pairs:
    """Compiled after the LoRAs were attached."""
    batch = {**call.batch(), **call.decoder(len(PROMPTS)), "use_cache": False}
    torch._dynamo.reset()
    with torch.no_grad():
        yield torch.compile(call.model, backend="eager")(**batch).logits, call.model(**batch).logits


@dataclass(frozen=True)
class Way:
    """A column: its head in the table, the function, and whether all modes or only some are tried with it."""

    head: str
    run: Callable[[Call], Pairs]
    modes: Sequence[str] | None = None


WAYS: Mapping[str, Way] = {
    "by_position": Way("inputs by position", by_position),
    "left": Way("padding left", _padded("left")),
    "right": Way("padding right", _padded("right")),
    "without_mask": Way("no mask", without_mask),
    "four_axes": Way("mask with four axes", four_axes),
    "embedded": Way("`inputs_embeds`", embedded),
    "cached": Way("own cache, in pieces", cached),
    "generate": Way("`generate`", _greedy()),
    "uncached": Way("`use_cache=False`", _greedy(use_cache=False)),
    "static": Way("static cache", _greedy(cache_implementation="static", disable_compile=True)),
    "chunks": Way("prefill in chunks", _greedy(prefill_chunk_size=3)),
    "generate_embedded": Way("`generate(inputs_embeds)`", generate_embedded),
    "beams": Way("beams", beams),
    "lookup": Way("prompt lookup", lookup),
    "assisted": Way("assistant model", assisted),
    "samples": Way("samples", samples),
    "checkpointed": Way("checkpointing", _checkpointed(between=False)),
    "between": Way("checkpointing, generation between", _checkpointed(between=True)),
    "parallel": Way("`DataParallel`", parallel),
    "compiled": Way("compiled after", compiled, ("linear", "prompt/block")),
}
__all__ = ["FIXED", "WAYS", "Call", "Way"]
