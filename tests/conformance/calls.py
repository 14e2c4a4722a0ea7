"""A model as the ways of the table call it: inputs, passes, generation, and teacher forcing, the reference.

Contents: Call, Way, Pairs, PROMPTS, NEW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tests.conformance.subject import MODES, Subject

Pairs = Iterator[tuple[Tensor, Tensor]]
PROMPTS = ([9, 23, 40, 7], [8, 12, 61, 33, 18, 5, 44])  # of different lengths, so that a batch is padded
DECODED = [2, 14, 71, 30]  # what an encoder-decoder's decoder is given in a plain forward pass
NEW = 4


class Call:
    """The model of a subject as a way calls it: inputs, passes, generation and teacher forcing.

    mode: that of the mixture that is on the model, None for the base.
    """

    def __init__(self, subject: Subject, mode: str | None) -> None:
        self.subject, self.mode, self.model = subject, mode, subject.model
        self.seq2seq = subject.seq2seq

    def mixed(self, **changes: Any) -> AbstractContextManager[Any]:
        """The LoRAs on the model, for a way that attaches them itself; nothing for the base."""
        return nullcontext() if self.mode is None else self.subject.anew(self.mode, **changes)

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
        """`model.generate`, greedily, always NEW tokens, none of which is padding or another special one."""
        settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        settings |= {"suppress_tokens": [0, 1, 2], "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            return self.model.generate(**{**settings, **inputs})

    def answered(self, out: Any, prompts: Sequence[Sequence[int]]) -> Pairs:
        """(logits that chose the answers, those of teacher forcing), row by row; rows may repeat each prompt."""
        logits = torch.stack(out.logits, 1)
        for i, answer in enumerate(out.sequences[:, -NEW:].tolist()):
            prompt = prompts[i * len(prompts) // len(logits)]
            yield logits[i], self.taught(prompt, answer)

    def plain(self, model: Any) -> Tensor:
        """The logits of a batch by this model: the subject's, or a wrapper of it."""
        batch = {**self.batch(), **self.decoder(len(PROMPTS)), "use_cache": False}
        with torch.no_grad():
            return model(**batch).logits


@dataclass(frozen=True)
class Way:
    """A column.

    head: its head in the table; run: the function; attaches: it attaches the LoRAs itself; modes: those that it is
    tried in, by default all; costly: it takes seconds, so that `./check` leaves it out.
    """

    head: str
    run: Callable[[Call], Pairs]
    attaches: bool = False
    modes: Sequence[str] = tuple(MODES)
    costly: bool = False
