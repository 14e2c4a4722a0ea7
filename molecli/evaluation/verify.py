"""Whether another library loads an export as intended: the updates, and the model's output with them.

verify         compares the loaded adapter with the composition, in float32
Verification   the differences
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from molecli.adapters.fused import matrix_name
from molecli.errors import RunError
from molecli.experts import LowRank
from molecli.mixture.mixture import Mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

# Relative differences that can come from float32 arithmetic in another order, with a margin.
DELTA_TOLERANCE, OUTPUT_TOLERANCE = 1e-5, 1e-3


@dataclass(frozen=True)
class Verification:
    """Relative differences: of each ΔW in the Frobenius norm, of the output by its largest entry.

    file: the loaded ΔW against the written factors. delta: against the composition, including the error of a lower rank
    and of the number type. missing, surplus: matrices that the library leaves out, or adapts although they were not
    written. exact: the export lost nothing, so all differences must be rounding errors.
    """

    library: str
    exact: bool
    file: Mapping[str, float]
    delta: Mapping[str, float]
    output: float
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()

    @property
    def worst(self) -> str:
        """The matrix whose ΔW differs most from the composition's; "" if none was loaded."""
        return max(self.delta, key=self.delta.__getitem__, default="")

    def document(self) -> dict[str, Any]:
        """The verification as JSON stores it."""
        return {
            "library": self.library,
            "delta": {"worst": self.delta.get(self.worst), "matrix": self.worst, "by_matrix": dict(self.delta)},
            "file": max(self.file.values(), default=None),
            "output": self.output,
            "missing": list(self.missing),
            "surplus": list(self.surplus),
        }

    def line(self) -> str:
        """The verification as text."""
        if not self.delta:
            return f"{self.library}: nothing was loaded, output differs by {self.output:.1e}"
        worst = self.worst
        return f"{self.library}: ΔW differs by at most {self.delta[worst]:.1e} ({worst}), output by {self.output:.1e}"

    def check(self, folder: str) -> None:
        """Raises: RunError if the differences are more than rounding errors."""
        problem = self._problem()
        if problem is not None:
            raise RunError(folder, f"{self.library} {problem}", "The files are kept; report.json lists every matrix.")

    def _problem(self) -> str | None:
        if self.missing or self.surplus:
            kind, names = ("leaves out", self.missing) if self.missing else ("also adapts", self.surplus)
            return f"{kind} {len(names)} matrices, such as {names[0]!r}"
        for found in (self.file, self.delta if self.exact else {}):
            name = max(found, key=found.__getitem__, default="")
            if name and not found[name] <= DELTA_TOLERANCE:
                return f"loads another update of {name!r} (relative difference {found[name]:.1e})"
        if self.exact and not self.output <= OUTPUT_TOLERANCE:
            return f"gives another output (relative difference {self.output:.1e})"
        return None


@torch.no_grad()
def verify(
    model: Any,
    original: Mixture,
    loaded: AbstractContextManager[None],
    probe: Callable[[], Tensor],
    *,
    meant: Mapping[str, LowRank],
    written: Mapping[str, LowRank],
    exact: bool,
    library: str,
) -> Verification:
    """The differences between the adapter that `loaded` puts on `model` and `original`, with the updates `meant`.

    written: the factors in the file; probe: returns the model's output on some inputs.
    """
    # Otherwise convolutions on an accelerator would be rounded to fewer digits than float32 has.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with original:
            expected = probe()
        with loaded:
            file, delta, surplus = _deltas(model, meant, written)
            found = probe()
    missing = tuple(name for name in written if name not in file)
    output = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return Verification(library, exact, file, delta, output, missing, surplus)


def _deltas(
    model: Any, meant: Mapping[str, LowRank], written: Mapping[str, LowRank]
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """(differences of the loaded ΔW from the written ones, from the meant ones; adapted matrices not written)."""
    file: dict[str, float] = {}
    delta: dict[str, float] = {}
    surplus = []
    for name, found in _loaded(model):
        if name in written:
            file[name] = _relative(found, written[name])
            delta[name] = _relative(found, meant[name])
        else:
            surplus.append(name)
    return file, delta, tuple(surplus)


def _loaded(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, ΔW [d_out, d_in] or of a kernel's shape) of every matrix that PEFT adapts on the model."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        # They can be stored in half precision, in which ΔW would be rounded.
        module.lora_A.float()
        module.lora_B.float()
        found = module.get_delta_weight(next(iter(module.lora_A))).cpu()
        if not isinstance(module, ParamWrapper):
            yield name, found.T if getattr(module, "fan_in_fan_out", False) else found
            continue
        owner, parameter = name.replace(".base_layer", ""), module.parameter_name
        if module.get_param().dim() == 2:
            yield matrix_name(owner, parameter), found
            continue
        transposed = getattr(module.get_base_layer(), "is_transposed", False)
        for expert, own in enumerate(found.view(module.num_experts, *found.shape[-2:])):
            if own.any():  # a stack has zeros for experts that are not adapted
                yield matrix_name(owner, parameter, expert), own.T if transposed else own


def _relative(found: Tensor, low_rank: LowRank) -> float:
    wide = LowRank(low_rank.A.double(), low_rank.B.double(), low_rank.scaling)
    expected = wide.delta()
    if found.shape != expected.shape:
        return float("inf")
    return ((found.double() - expected).norm() / expected.norm()).item()
