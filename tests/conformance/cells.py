"""A cell of the table: a way of calling an architecture in one mode is exact, refused, or nothing the base does.

Contents: Cell, tried, cells_of.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molecli.errors import UserError
from tests.conformance.calls import PROMPTS, Call, Pairs
from tests.conformance.subject import FIXED, MODES, Subject
from tests.conformance.ways import WAYS

EXACT = "exact"  # the first column: a mode as it is
# False words: the LoRAs of the suite were made for their base, and it is the model that is called.
_FALSE = re.compile(r"made for another base|other LoRAs|outside the model")
State = Literal["exact", "refused", "base", "wrong"]
FIXED_TOLERANCE = 1e-5  # relative to the largest logit, against PEFT
BASE_TOLERANCE = 5e-6  # the base's own: less would be a fault of the base that LoRAs only enlarge
TOLERANCE = 1e-4  # between two ways of computing the same, through a cache or padding


@dataclass(frozen=True)
class Cell:
    """state: exact; refused by molecli or not kept by the base, with the words; or wrong, which is a fault."""

    state: State
    words: str = ""


def off(pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> str:
    """What is wrong with the pairs (result, expected), "" if nothing is."""
    worst = -1.0
    for found, expected in pairs:
        if found.shape != expected.shape:
            return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
            return "not finite"
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
    if worst < 0:
        return "nothing was compared"
    return f"off by {worst:.1e}" if worst > tolerance else ""


def tried(pairs: Pairs, tolerance: float) -> tuple[State, str]:
    """The state and words of a cell with these pairs (result, expected)."""
    try:
        words = off(pairs, tolerance)
    except UserError as error:
        return "wrong" if _FALSE.search(str(error)) else "refused", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ("wrong", words) if words else ("exact", "")


def cells_of(subject: Subject, way: str, modes: Sequence[str] = tuple(MODES)) -> dict[str, Cell]:
    """The cells of a way in these modes, if it is tried in them; one alone, "base", if the base does not keep it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == EXACT:
            return {mode: _cleaned(subject, _exactness(subject, mode)) for mode in modes}
        state, words = tried(WAYS[way].run(Call(subject, None)), BASE_TOLERANCE)
        if state != "exact":
            return {"base": Cell("base", words)}
        return {mode: _cleaned(subject, _in_mode(subject, way, mode)) for mode in modes if mode in WAYS[way].modes}


def _cleaned(subject: Subject, cell: Cell) -> Cell:
    return cell if subject.clean() else Cell("wrong", f"hooks were left on the base; {cell.words}")


def _in_mode(subject: Subject, way: str, mode: str) -> Cell:
    def pairs() -> Pairs:
        with nullcontext() if WAYS[way].attaches else subject.mixed(mode):
            yield from WAYS[way].run(Call(subject, mode))

    return Cell(*tried(pairs(), TOLERANCE))


def _exactness(subject: Subject, mode: str) -> Cell:
    """Whether the mode is PEFT's own result, masks reach the base and each LoRA, and leaving restores the base."""
    call = Call(subject, mode)
    batch = {**call.batch([PROMPTS[1], PROMPTS[1][::-1]]), **call.decoder(2), "use_cache": False}
    before = subject.base_logits(batch)

    def pairs() -> Pairs:
        with subject.mixed(mode) as mixture:
            logits = call.logits(**batch)
            if mode in FIXED:
                yield logits, subject.by_peft("sum", **batch)
            else:
                for name in subject.loras:
                    mixture.only(name)
                    yield call.logits(**batch), subject.by_peft(name, **batch)
            mixture.mask(*subject.loras)
            masked = call.logits(**batch)
            mixture.mask()
            if not torch.equal(masked, before):
                raise AssertionError("with all LoRAs masked it is not the base")
            if not torch.equal(call.logits(**batch), logits):
                raise AssertionError("after a mask it is not what it was")

    state, words = tried(pairs(), FIXED_TOLERANCE)
    if not torch.equal(subject.base_logits(batch), before):
        return Cell("wrong", "the base is not restored")
    return Cell(state, words)
