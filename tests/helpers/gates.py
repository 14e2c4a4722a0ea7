"""What the tests of identities do to gates and experts: randomise, permute, drop matrices, compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from molecli.experts import Expert
from molecli.mixture.mixture import Mixture


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < tolerance


def randomise(mixture: Mixture, seed: int = 0, *, sharpness: float = 4.0) -> None:
    """Gates far from uniform, so that nothing holds by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in mixture.named_parameters().items():
        width = parameter.shape[-1] if parameter.dim() else 1
        scale = 0.3 if name.endswith("log_temperature") else sharpness if parameter.dim() > 1 else 1.0
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise if width else parameter.data
    for gate in mixture.gate_modules().values():
        if hasattr(gate, "mean"):
            gate.mean.copy_(torch.randn(gate.mean.shape, generator=generator) * 0.1)
            gate.std.copy_(torch.rand(gate.std.shape, generator=generator) + 0.5)


def copy_permuted(
    source: nn.Module, target: nn.Module, order: list[int], experts: list[Expert], mixture: Mixture, site: str
) -> None:
    """Copies a gate's tensors with its expert axes (rows), and its rank axis where it reads ranks, put in `order`."""
    matrices = next(s for s in mixture.sites if s.name == site).entry.matrices
    owner = torch.cat([mixture.bank.owner(m) for m in matrices])
    start, ranks = 0, []
    for matrix in matrices:
        own = mixture.bank.owner(matrix)
        ranks += [start + int(k) for i in order for k in (own == i).nonzero().flatten()]
        start += len(own)

    def by_rank(tensor: Tensor) -> Tensor:
        reads_ranks = getattr(source, "reads", "x") == "u" and tensor.dim() and tensor.shape[-1] == len(owner)
        return tensor[..., ranks] if reads_ranks else tensor

    tensors = source.state_dict()
    out = {}
    for key, tensor in tensors.items():
        if key in ("logits", "head.bias") or (key == "head.weight" and type(source.head).__name__ == "FeatureHead"):
            out[key] = by_rank(tensor)[order]
        elif type(getattr(source, "head", None)).__name__ == "OutputHead" and key in ("head.weight", "head.down"):
            low_rank = source.head.down is not None
            moved = tensor if low_rank and key == "head.weight" else tensor[order]
            out[key] = moved[order] if low_rank and key == "head.weight" else moved
            if key == "head.weight" and not low_rank and tensor.shape[1] == 3:
                out[key] = moved[:, order]
        else:
            out[key] = by_rank(tensor)
    target.load_state_dict(out)


def drop(expert: Expert, keep: Callable[[str], bool]) -> Expert:
    return Expert(
        expert.name, {m: f for m, f in expert.factors.items() if keep(m)}, rank=expert.rank, alpha=expert.alpha
    )
