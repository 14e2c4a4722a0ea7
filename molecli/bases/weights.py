"""The weights of a frozen model's matrices: dense, and as singular value decompositions.

Contents: BaseWeights.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from molecli.bases.fused import FusedPlace, fused_places
from molecli.errors import UsageError
from molecli.functional.fingerprint import fingerprint
from molecli.functional.layers import compute_dtype, dense_weight, dequantizable, is_packed, kernel_shape, linear_shape
from molecli.functional.spectral import Spectrum, decompose
from molecli.functional.wrapped import held, own_layer, there
from molecli.protocols import Shape


@dataclass(frozen=True)
class _Known:
    """A layer's spectrum, and a stamp that shows whether its weight is still the same."""

    stamp: tuple[int, int, float]
    spectrum: Spectrum


# By matrix, kept as long as its layer exists: a composition's LoRAs, its merge and every mask use the same ones.
_SPECTRA: weakref.WeakKeyDictionary[nn.Module, dict[str, _Known]] = weakref.WeakKeyDictionary()


class BaseWeights:
    """The matrices of `model` by name. Decomposing a wide one takes seconds, so it is done only once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """The fingerprint of the whole model; see `functional.fingerprint`."""
        self._fingerprint = self._fingerprint or fingerprint(self.model)
        return self._fingerprint

    def dtype(self, matrix: str) -> str:
        """The number type in which the matrix computes."""
        return str(compute_dtype(self._layer(matrix))).removeprefix("torch.")

    def shape(self, matrix: str) -> Shape:
        """(d_out, d_in), or the shape of a convolution's kernel, however the layer stores it."""
        if matrix in self._fused:
            return self._fused[matrix].shape
        layer = self._layer(matrix)
        shape = linear_shape(layer) or kernel_shape(layer)
        assert shape is not None, matrix
        return shape

    def parameter(self, name: str) -> Tensor | None:
        """The parameter `name` as it is stored; None if it is quantised."""
        owner, _, leaf = name.rpartition(".")
        module = self._layer(owner)
        found = held(module, leaf)
        return None if is_packed(module) or dequantizable(found) else found.detach()

    @torch.no_grad()
    def dense(self, matrix: str) -> Tensor:
        """[d_out, d_in], or [c_out, c_in·k_h·k_w], in float32; of quantised weights, the numbers that they stand for.

        Raises: UsageError for quantised weights that cannot be read.
        """
        layer = there(self._layer(matrix))
        dense = self._fused[matrix].weight(self.model) if matrix in self._fused else dense_weight(layer)
        if dense is None or not dense.is_floating_point():
            weight = dense if dense is not None else getattr(layer, "weight", None)
            kind = f"{weight.dtype}".removeprefix("torch.") if isinstance(weight, Tensor) else type(layer).__name__
            what = f"its weights are quantised ({kind}), and singular values can be computed only of unquantised ones"
            raise UsageError(matrix, what, "Load the unquantised base.")
        return dense.detach().flatten(1).float()

    def digest(self, matrix: str) -> str:
        """A hash of all bits of the matrix in float32: it changes if the base is rounded to another type."""
        numbers = self.dense(matrix).contiguous().cpu().numpy().astype("<f4", copy=False)
        return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def spectrum(self, matrix: str) -> Spectrum:
        """U, σ and V of the matrix, on its device; cached until its weight changes or the layer is deleted."""
        layer = self._layer(matrix)
        # Packed weights are compared by what they stand for: their storage may be reordered.
        packed = matrix not in self._fused and is_packed(layer)
        weight = self.dense(matrix) if packed else self._stored(matrix)
        place = (0, 0) if packed else (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        # Includes the sum, because writing through `.data`, as PEFT does to merge, does not change the version.
        stamp = (*place, float(weight.float().sum()))
        of_layer = _SPECTRA.setdefault(layer, {})
        known = of_layer.get(matrix)
        if known is None or known.stamp != stamp:
            of_layer[matrix] = known = _Known(stamp, decompose(self.dense(matrix)))
        return known.spectrum

    @cached_property
    def _fused(self) -> dict[str, FusedPlace]:
        return fused_places(self.model)

    def _layer(self, matrix: str) -> nn.Module:
        """The module that has the matrix."""
        return own_layer(self.model.get_submodule(self._fused[matrix].module if matrix in self._fused else matrix))

    def _stored(self, matrix: str) -> Tensor:
        if matrix in self._fused:
            return self._fused[matrix].weight(self.model)
        weight = there(self._layer(matrix)).weight
        assert isinstance(weight, Tensor)
        return weight.detach()
