"""The matrices of a language model that the modules of a LoRA file mean.

One module has several names: wrappers add parts (`_orig_mod.`, `module.`), transformers moved modules between releases,
and a language model may be trained alone and used in a multimodal one.
Contents: resolved, plain, same_layer, taken_for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from molecli.errors import MismatchError
from molecli.protocols import Matrices, Shape

# Parts that wrappers put into names: torch.compile, DDP and DataParallel, FSDP, activation checkpointing, DeepSpeed,
# PEFT's layers and models.
_WRAPPERS = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "base_layer",
)
_PEFT = "base_model.model."
# Parts between a model and its language model, in the bases of transformers.
_INNER = {"model", "language_model", "text_model", "base_model", "transformer", "thinker", "llm", "lm", "vlm"}
# The other parts of a multimodal model: a module below one of them is not one of the language model.
_TOWER = re.compile(
    r"vis|\bvit|siglip|clip|image|img|qformer|resampler|perceiver|projector|adapter|audio|speech|talker|encoder|generat"
    r"|mtp|draft|critic|reward"
)


@dataclass(frozen=True)
class _Move:
    """One rewriting of names: `old`.`first` becomes `new`.`first`."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    first: str


def resolved(where: str, wanted: Mapping[str, Shape], base: Matrices) -> dict[str, str]:
    """module -> matrix of `base`, for the modules in `wanted` (name -> shape) that the base has.

    Tried in this order: the name itself, without wrappers' parts, by the base's own rules for older names, and by a
    common ending. The last must hold for all modules under the same prefix, and its choice must be unique.
    Raises: MismatchError if it is not.
    """
    known = base.named
    found = {name: name for name in wanted if name in known}
    for name in wanted:
        bare = plain(name)
        spellings = (bare, base.renamed(name), base.renamed(bare)) if name not in found else ()
        meant = next((spelling for spelling in spellings if spelling in known), None)
        if meant is not None:
            found[name] = meant
    rest = {name: shape for name, shape in wanted.items() if name not in found}
    return found | (_by_ending(where, rest, set(found), known) if rest else {})


def plain(name: str) -> str:
    """`name` without the parts of wrappers and PEFT's prefixes."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_PEFT):
        name = name.removeprefix(_PEFT)
    return name


def same_layer(name: str, base: Matrices) -> str:
    """A matrix of `base` that has the numbers and everything after them as `name` has, under another prefix; or ""."""
    bare = plain(name).split(".")
    at = next((i for i, part in enumerate(bare) if part.isdigit()), None)
    if not at or any(_TOWER.search(part) for part in bare[:at]):
        return ""
    ending = "." + ".".join(bare[at - 1 :])
    return next((matrix for matrix in base if f".{matrix}".endswith(ending) and not _TOWER.search(matrix)), "")


def taken_for(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """What was read as what, for (module, matrix) pairs: "visual.* taken for model.visual.*"."""
    said: dict[str, None] = {}
    for module, matrix in pairs:
        if module == matrix:
            continue
        old, new = module.split("."), matrix.split(".")
        shared = _common(old, new)
        tail = ["*"] if shared else []
        start, end = (_numberless([*parts[: len(parts) - shared], *tail]) for parts in (old, new))
        said[f"{start} taken for {end}"] = None
    return tuple(said)


def _numberless(parts: list[str]) -> str:
    return ".".join("N" if part.isdigit() else part for part in parts)


def _common(a: list[str], b: list[str]) -> int:
    """The number of parts in which two names agree, from the right."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


def _by_ending(where: str, rest: Mapping[str, Shape], named: set[str], known: Mapping[str, Shape]) -> dict[str, str]:
    """module -> matrix by a common ending, with one rewriting for all modules under a prefix."""
    by_leaf: dict[str, list[str]] = defaultdict(list)
    for matrix in known:
        by_leaf[matrix.rpartition(".")[2]].append(matrix)
    # prefix -> rewriting -> module -> matrix
    moves: dict[tuple[tuple[str, ...], str], dict[_Move, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in rest:
        for matrix in by_leaf[name.rpartition(".")[2]]:
            move = _move(plain(name), matrix)
            if move is not None:
                moves[move.old, move.first][move][name] = matrix
    found: dict[str, str] = {}
    for (old, first), options in moves.items():
        prefix = ".".join((*old, first, ""))
        if any(name.startswith(prefix) for name in named):
            continue  # the base has this prefix under its own name: the others are not elsewhere
        found |= _only(where, rest, known, options)
    return found


def _move(name: str, matrix: str) -> _Move | None:
    """The rewriting that makes `matrix` of `name`; None if they differ by more than parts of wrappers."""
    a, b = name.split("."), matrix.split(".")
    shared = _common(a, b)
    old, new, ending = tuple(a[: len(a) - shared]), tuple(b[: len(b) - shared]), a[len(a) - shared :]
    if any(part.isdigit() or _TOWER.search(part) for part in old) or not _INNER.issuperset(new):
        return None
    if new and not any(part.isdigit() for part in ending):
        return None  # too short an ending to be sure of
    return _Move(old, new, ending[0])


def _only(
    where: str, rest: Mapping[str, Shape], known: Mapping[str, Shape], options: Mapping[_Move, Mapping[str, str]]
) -> Mapping[str, str]:
    """The one rewriting that finds most modules in their shapes. Raises: MismatchError if several do."""
    fits = {move: sum(rest[n] == tuple(known[m]) for n, m in found.items()) for move, found in options.items()}
    best = max(fits.values())
    chosen = [move for move, count in fits.items() if count == best]
    if best and len(chosen) > 1:
        name = next(iter(options[chosen[0]]))
        meant = " or ".join(repr(options[move][name]) for move in chosen if name in options[move])
        what = f"{name!r} could mean {meant} in this base"
        raise MismatchError(where, what, "Rename its modules to those of the base.")
    return options[chosen[0]]
