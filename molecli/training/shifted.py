"""A frozen model with hooks that shift its singular values, to train the shifts: y = W x + U (Δσ ⊙ Vᵀ x).

Contents: Shifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molecli.bases.weights import BaseWeights
from molecli.errors import UsageError
from molecli.functional.layers import compute_dtype
from molecli.functional.low_rank import add_expanded, add_expanded_maps, project, project_maps
from molecli.functional.spectral import Spectrum, moved, spread
from molecli.protocols import Progress


@dataclass(frozen=True)
class _Vectors:
    """A layer's singular vectors in its own type: A is Vᵀ, [r, d_in] or [r, c_in, k_h, k_w], Bt is Uᵀ, [r, d_out]."""

    layer: nn.Module
    spectrum: Spectrum
    A: Tensor
    Bt: Tensor

    def add(self, y: Tensor, x: Tensor, moves: Tensor) -> Tensor:
        """y + U (moves ⊙ Vᵀ x), in place where `add_expanded` is."""
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            u = project_maps(x, self.A, stride=conv.stride, padding=conv.padding, dilation=conv.dilation).flatten(2)
            return add_expanded_maps(y, (u * moves[:, None]).to(u.dtype), self.Bt)
        u = project(x, self.A)
        # float32 until the product: a small shift would be lost in half precision.
        return add_expanded(y, (u * moves).to(u.dtype).flatten(0, -2), self.Bt)


class Shifted(nn.Module):
    """The shifts of the singular values of `matrices`, which are 0 at first, in float32. They are the only parameters.

    As a context manager it applies them. Equal singular values have one common shift, zeros have none (see
    `functional.spectral`). Decomposing the matrices takes long, so `progress` is called. It has the methods of a
    PeftModel that training needs. Raises: UsageError for a matrix without a dense weight.
    """

    def __init__(self, weights: BaseWeights, matrices: Sequence[str], *, progress: Progress | None = None) -> None:
        super().__init__()
        self.weights, self.targeted_module_names = weights, list(matrices)
        self._vectors: dict[str, _Vectors] = {}
        self._handles: list[RemovableHandle] = []
        for done, matrix in enumerate(matrices, start=1):
            vectors = _vectors(weights, matrix)
            if vectors.spectrum.distinct:
                start = torch.zeros(vectors.spectrum.distinct, device=vectors.spectrum.S.device)
                # Modules have the base's names, so that a parameter's name contains its matrix.
                self._leaf(matrix).register_parameter("delta", nn.Parameter(start))
            self._vectors[matrix] = vectors
            if progress is not None:
                progress("singular values", done, len(matrices))

    def __enter__(self) -> Shifted:
        for matrix, vectors in self._vectors.items():
            if vectors.spectrum.distinct:
                self._handles.append(vectors.layer.register_forward_hook(self._hook(matrix)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context without the shifts."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def shifts(self) -> dict[str, Tensor]:
        """matrix -> [min(d_out, d_in)], the shift of every singular value, as files store it."""
        found = {}
        for matrix, vectors in self._vectors.items():
            own = vectors.spectrum
            moves = moved(spread(self._delta(matrix).detach(), own), own) if own.distinct else own.S
            found[matrix] = nn.functional.pad(moves, (0, own.width - len(moves)))
        return found

    def _delta(self, matrix: str) -> nn.Parameter:
        return self.get_parameter(f"{matrix}.delta")

    def _leaf(self, matrix: str) -> nn.Module:
        module: nn.Module = self
        for part in matrix.split("."):
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    def _hook(self, matrix: str) -> Any:
        vectors, delta = self._vectors[matrix], self._delta(matrix)

        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return vectors.add(y, args[0], moved(spread(delta, vectors.spectrum), vectors.spectrum))

        return hook


def _vectors(weights: BaseWeights, matrix: str) -> _Vectors:
    layer, own = weights.model.get_submodule(matrix), weights.spectrum(matrix)
    A = own.Vt
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            kind = "with groups" if layer.groups != 1 else f"with {layer.padding_mode!r} padding"
            what = f"it is a convolution {kind}, whose singular values cannot be shifted"
            raise UsageError(matrix, what, "Leave it out of adapter.targets.")
        A = A.view(len(A), *weights.shape(matrix)[1:])
    dtype = compute_dtype(layer)
    return _Vectors(layer, own, A.to(dtype), own.U.T.to(dtype))
