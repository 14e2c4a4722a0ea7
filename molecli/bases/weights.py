"""The matrices of a frozen model as numbers: dense, and by their singular values.

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
from molecli.functional.spectral import Spectrum, decompose
from molecli.protocols import Shape


@dataclass(frozen=True)
class _Known:
    """A layer's spectrum, and what tells whether the weight that it was made of is still the same."""

    stamp: tuple[int, int, float]
    spectrum: Spectrum


# As long as the layer lives: a composition's LoRAs, its merge and every mask ask for the same ones.
_SPECTRA: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class BaseWeights:
    """The matrices of `model` by name. Decomposing one takes seconds where it is wide, so that it is done once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """That of the whole model; see `functional.fingerprint`."""
        self._fingerprint = self._fingerprint or fingerprint(self.model)
        return self._fingerprint

    def dtype(self, matrix: str) -> str:
        """The type that the matrix is held in."""
        return str(self._weight(matrix).dtype).removeprefix("torch.")

    def shape(self, matrix: str) -> Shape:
        """(d_out, d_in), or that of a convolution's kernel, whatever layout the layer stores."""
        shape = tuple(self._weight(matrix).shape)
        return shape[::-1] if isinstance(self.model.get_submodule(matrix), Conv1D) else shape

    def dense(self, matrix: str) -> Tensor:
        """[d_out, d_in], or [c_out, c_in·k_h·k_w], in float32. Raises: UsageError for quantised weights."""
        layer, weight = self.model.get_submodule(matrix), self._weight(matrix)
        if not weight.is_floating_point():
            kind = str(weight.dtype).removeprefix("torch.")
            what = f"its weights are quantised ({kind}), and singular values need the numbers themselves"
            raise UsageError(matrix, what, "Load the base unquantised.")
        return (weight.T if isinstance(layer, Conv1D) else weight.flatten(1)).float()

    def digest(self, matrix: str) -> str:
        """A hash of the matrix to the last bit of float32: a base rounded to another type is another."""
        numbers = self.dense(matrix).contiguous().cpu().numpy().astype("<f4", copy=False)
        return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def spectrum(self, matrix: str) -> Spectrum:
        """U, σ and V of the matrix, on its device; kept until its weight changes or the layer is gone."""
        layer, weight = self.model.get_submodule(matrix), self._weight(matrix)
        # The sum too: what is written through `.data`, as PEFT merges, leaves the version as it was.
        stamp = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, float(weight.float().sum()))
        known = _SPECTRA.get(layer)
        if known is None or known.stamp != stamp:
            _SPECTRA[layer] = known = _Known(stamp, decompose(self.dense(matrix)))
        return known.spectrum

    def _weight(self, matrix: str) -> Tensor:
        weight = self.model.get_submodule(matrix).weight
        assert isinstance(weight, Tensor)
        return weight.detach()
