"""The weights of a frozen model's matrices: dense, and as singular value decompositions.

Contents: BaseWeights.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molecli.errors import UsageError
from molecli.functional.fingerprint import fingerprint
from molecli.functional.layers import held, own_layer
from molecli.functional.spectral import Spectrum, decompose
from molecli.protocols import Shape


@dataclass(frozen=True)
class _Known:
    """A layer's spectrum, and a stamp that shows whether its weight is still the same."""

    stamp: tuple[int, int, float]
    spectrum: Spectrum


# Kept as long as the layer exists: a composition's LoRAs, its merge and every mask use the same ones.
_SPECTRA: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


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
        """The number type of the matrix."""
        return str(self._weight(matrix).dtype).removeprefix("torch.")

    def shape(self, matrix: str) -> Shape:
        """(d_out, d_in), or the shape of a convolution's kernel, whatever layout the layer uses."""
        shape = tuple(self._weight(matrix).shape)
        return shape[::-1] if isinstance(self._layer(matrix), Conv1D) else shape

    def dense(self, matrix: str) -> Tensor:
        """[d_out, d_in], or [c_out, c_in·k_h·k_w], in float32. Raises: UsageError for quantised weights."""
        layer, weight = self._layer(matrix), self._weight(matrix)
        if not weight.is_floating_point():
            kind = str(weight.dtype).removeprefix("torch.")
            what = f"its weights are quantised ({kind}), and singular values can be computed only of unquantised ones"
            raise UsageError(matrix, what, "Load the unquantised base.")
        return (weight.T if isinstance(layer, Conv1D) else weight.flatten(1)).float()

    def digest(self, matrix: str) -> str:
        """A hash of all bits of the matrix in float32: it changes if the base is rounded to another type."""
        numbers = self.dense(matrix).contiguous().cpu().numpy().astype("<f4", copy=False)
        return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def spectrum(self, matrix: str) -> Spectrum:
        """U, σ and V of the matrix, on its device; cached until its weight changes or the layer is deleted."""
        layer, weight = self._layer(matrix), self._weight(matrix)
        # Includes the sum, because writing through `.data`, as PEFT does to merge, does not change the version.
        stamp = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, float(weight.float().sum()))
        known = _SPECTRA.get(layer)
        if known is None or known.stamp != stamp:
            _SPECTRA[layer] = known = _Known(stamp, decompose(self.dense(matrix)))
        return known.spectrum

    def _weight(self, matrix: str) -> Tensor:
        return held(self._layer(matrix), "weight").detach()

    def _layer(self, matrix: str) -> nn.Module:
        return own_layer(self.model.get_submodule(matrix))
