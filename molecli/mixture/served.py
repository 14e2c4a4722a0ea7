"""Checks after each pass that every adapted matrix was served: that its module was called, and so its hook.

A hook sees only calls. Layers that another module computes from their weights, as fused projections, custom kernels and
replaced forwards do, would silently work without the LoRAs.

Contents: Served, Mark.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from molecli.errors import RunError
from molecli.mixture.sites import is_cross_key_or_value


class Mark:
    """seen: whether the module was called in this pass; ever: whether it was called in an earlier one.

    Plain attributes that a hook only writes, so that compiled code has no guard on them.
    """

    __slots__ = ("ever", "seen")

    def __init__(self) -> None:
        self.seen, self.ever = False, False


class _Part:
    """A part of a model whose calls are passes, with the marks of its matrices and of the modules around them."""

    def __init__(self, name: str, module: nn.Module, optional: Collection[str]) -> None:
        self.name, self.module, self.optional = name, module, optional
        self.matrices: dict[str, Mark] = {}
        self.around: dict[str, Mark] = {}  # matrix -> the mark of its enclosing module, if that may be skipped
        self.all: tuple[Mark, ...] = ()

    def begin(self, *_: Any) -> None:
        for mark in self.all:
            mark.seen = False

    def end(self, *_: Any) -> None:
        for mark in self.matrices.values():
            if not mark.seen:
                self._explain()
                break

    def _explain(self) -> None:
        """Raises: RunError if a matrix was bypassed, and not merely skipped together with the module around it."""
        missed = [matrix for matrix, mark in self.matrices.items() if not mark.seen and not self._cached(matrix)]
        idle = [matrix for matrix in missed if matrix in self.optional or self._skipped(matrix)]
        if len(idle) == len(self.matrices):  # not one layer was called: then it was not for its input
            idle = [matrix for matrix in idle if matrix in self.optional]
        bypassed = [matrix for matrix in missed if matrix not in idle]
        if bypassed:
            raise _bypassed(bypassed, len(self.matrices))

    def _cached(self, matrix: str) -> bool:
        """Whether it is a key or value of the encoder's tokens, which is computed once and then in the cache."""
        return self.matrices[matrix].ever and is_cross_key_or_value(matrix)

    def _skipped(self, matrix: str) -> bool:
        """Whether the module around it was not called: an expert without tokens, a dropped layer, a part without
        input."""
        around = self.around.get(matrix)
        return around is not None and not around.seen


class Served:
    """The marks of a mixture's matrices.

    parts: the modules whose calls are passes, inner ones first; optional: matrices that work on an input which a pass
    may lack, such as pictures.
    """

    def __init__(
        self, model: nn.Module, matrices: Iterable[str], parts: Sequence[nn.Module], optional: Collection[str] = ()
    ) -> None:
        modules = dict(model.named_modules())
        names = {id(module): name for name, module in modules.items()}
        self._modules = modules
        self._parts = [_Part(names[id(part)], part, optional) for part in parts]
        self._marks: dict[str, Mark] = {}
        self._witnesses: dict[str, Mark] = {}
        for matrix in matrices:
            part = next((part for part in self._parts if _within(matrix, part.name)), None)
            if part is not None:
                self._add(part, matrix)
        for part in self._parts:
            around = {id(mark): mark for mark in part.around.values()}
            part.all = (*part.matrices.values(), *around.values())

    def mark(self, matrix: str) -> Mark:
        """The mark that the hook of `matrix` sets."""
        return self._marks.setdefault(matrix, Mark())

    def setting(self, matrix: str) -> Callable[..., None]:
        """A hook that sets the mark of `matrix`, and does nothing else."""
        return _setting(self.mark(matrix))

    def watch(self) -> list[RemovableHandle]:
        """Hooks that check every pass of every part. A pass with a bypassed matrix raises RunError."""
        handles = []
        for part in self._parts:
            if part.matrices:
                handles.append(part.module.register_forward_pre_hook(part.begin))
                handles.append(part.module.register_forward_hook(part.end))
        for name, mark in self._witnesses.items():
            handles.append(self._modules[name].register_forward_pre_hook(_setting(mark)))
        return handles

    def _add(self, part: _Part, matrix: str) -> None:
        part.matrices[matrix] = self.mark(matrix)
        around = _enclosing(matrix, part.name, self._modules)
        if around is not None:
            part.around[matrix] = self._witnesses.setdefault(around, Mark())


def _setting(mark: Mark) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        mark.seen = mark.ever = True

    return hook


def _within(matrix: str, part: str) -> bool:
    return not part or matrix.startswith(f"{part}.")


def _enclosing(matrix: str, part: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module around a matrix that a pass may skip as a whole: the innermost entry of a list (a layer, an expert),
    else its parent; None if that is the part itself."""
    names = matrix.split(".")
    depth = len(part.split(".")) if part else 0
    for end in range(len(names) - 1, depth, -1):
        parent = modules.get(".".join(names[: end - 1]))
        if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
            return ".".join(names[:end])
    return ".".join(names[:-1]) if len(names) - 1 > depth else None


def _bypassed(matrices: Sequence[str], total: int) -> RunError:
    if len(matrices) == total:
        what = f"the model ran without calling any of the {total} matrices that the LoRAs adapt, such as {matrices[0]}"
    else:
        some = f"{len(matrices)} of the {total} matrices that the LoRAs adapt were bypassed, such as {matrices[0]}"
        what = f"{some}: the model computed with them in another way than by calling them"
    remedy = "Undo what replaces these calls (fused layers, custom kernels) and attach again, or adapt other matrices."
    return RunError("mixture", f"{what}, so the LoRAs had no effect there", remedy)
