"""Gates that weight the experts by the input (MoLE, Wu et al., ICLR 2024), and their variants.

Each site has one gate: pool the site's reading over positions, normalise, reduce to one logit per expert, softmax with
a learnable temperature. Source: Eq. 9-11. Departs: docs/method.md lists each departure and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molecli.config import GateConfig
from molecli.errors import UsageError
from molecli.experts import ExpertBank
from molecli.functional.gating import gate_values, mean_pool, running_mean, span, unit
from molecli.functional.tensor_version import Stamp, stamp
from molecli.methods.gates.heads import FeatureHead, OutputHead, PerExpertHead
from molecli.protocols import Reading, Site, Stream


def resolve_pool(pool: str, stream: Stream, *, seq2seq: bool, reads: str = "hidden") -> str:
    """How a gate that reads `hidden` or `experts` pools positions at a site: mean, running, prompt or token.

    `auto` is the prompt, which all positions can see. In a seq2seq decoder the experts' outputs see the prompt only
    position by position, so there `auto` is the running mean. In a diffusion pipeline, where every position sees every
    other, it is the mean.
    Raises: UsageError for `mean` on a causal model, whose tokens must not see later ones; for `running` and `prompt` on
    a pipeline, which does not read token by token.
    """
    if stream in ("spatial", "text", "time") and pool in ("prompt", "running"):
        raise UsageError(
            "gate.pool", f"{pool!r} is for language models, and this base draws pictures", "Use auto, mean or token."
        )
    if pool == "token":
        return "token"
    if stream in ("spatial", "text", "time"):
        return "mean"
    if stream in ("encoder", "memory"):
        return "mean"  # every token of an encoder belongs to the prompt and sees every other
    if pool == "auto":
        return "running" if seq2seq and reads == "experts" else "prompt"
    if pool == "mean" and not seq2seq:
        raise UsageError(
            "gate.pool", "'mean' would let a causal model see later tokens", "Use prompt, running or token."
        )
    return "running" if pool == "mean" else pool


class StaticGate(nn.Module):
    """The gate of `input: none`: learned weights per site, the same for every input (LoRA Soups, with a softmax)."""

    per_sequence = True
    remembers = False
    constant = True

    def __init__(self, experts: int, config: GateConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.logits = nn.Parameter(torch.zeros(experts))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)), config.learn_temperature)

    def forward(self, reading: Reading | None, keep: Tensor | None = None) -> Tensor:
        """[N], whatever the reading."""
        return gate_values(self.logits, self.log_temperature, top_k=self.top_k, keep=keep)


class InputGate(nn.Module):
    """A gate that computes weights from the site's input (`hidden`) or from the experts' outputs there (`experts`)."""

    constant = False
    mean: Tensor
    std: Tensor

    def __init__(self, config: GateConfig, *, pool: str, width: int, head: nn.Module) -> None:
        super().__init__()
        self.pool, self.top_k = pool, config.top_k
        self.reads = "x" if config.input == "hidden" else "u"
        self.normalize = config.normalize
        self.head = head
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)), config.learn_temperature)
        self.observed: _Moments | None = None
        # The head with moments and temperature folded in, if possible: its sources, their stamp, weight and bias.
        self._folds = config.normalize == "standardize" and isinstance(head, FeatureHead)
        self._fold: tuple[tuple[Tensor, ...], Stamp, Tensor, Tensor] | None = None
        if self.normalize == "standardize":
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("std", torch.ones(width))

    @property
    def per_sequence(self) -> bool:
        return self.pool in ("mean", "prompt")

    @property
    def remembers(self) -> bool:
        return self.pool != "token"

    def reads_entry(self, *, memory: bool) -> bool:
        """Whether it reads the tokens at its site; a decoder's gate that reads the prompt reads only the memory."""
        return not (memory and self.pool == "prompt" and self.reads == "x")

    def forward(self, reading: Reading, keep: Tensor | None = None) -> Tensor:
        """[B, N] for pools over a sequence, [B, T, N] for `running` and `token`."""
        features = self.features(reading)
        if self.observed is not None:
            self.observed.add(features.detach(), reading.valid if features.dim() == 3 else None)
            # Uniform whatever the weights: random weights are meant for standardised features, which these are not yet.
            even = torch.zeros_like(self.head.get_parameter("bias")).expand(*features.shape[:-1], -1)
            return gate_values(even, top_k=self.top_k, keep=keep)
        if self._folds and not torch.is_grad_enabled():
            weight, bias = self._folded()
            return gate_values(F.linear(features, weight, bias), top_k=self.top_k, keep=keep)
        logits = self.head(self._normalized(features))
        return gate_values(logits, self.log_temperature, top_k=self.top_k, keep=keep)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The head's weight and bias with moments and temperature folded in; computed again if one of these changed.

        This saves six small operations per gate, for which an accelerator would wait at small batches.
        """
        fold = self._fold
        if fold is None or fold[1] != stamp(fold[0]):
            assert isinstance(self.head, FeatureHead)
            cooled = torch.exp(-self.log_temperature)
            scale = cooled / (self.std * math.sqrt(len(self.std)))
            weight = self.head.matrix().double() * scale
            bias = self.head.bias * cooled - weight @ self.mean.double()
            tensors = (*self.parameters(), *self.buffers())
            self._fold = fold = tensors, stamp(tensors), weight.float(), bias.float()
        return fold[2], fold[3]

    def features(self, reading: Reading) -> Tensor:
        """The pooled reading in float32: [B, width] or [B, T, width]."""
        if self.pool == "prompt" and self.reads == "x" and reading.memory is not None:
            assert reading.memory_valid is not None
            if reading.memory.requires_grad:  # a layer may be computed again (checkpointing), also what it shares
                return _mean(reading, reading.memory, reading.memory_valid)
            key = "memory", id(reading.memory)  # the same for every site of the decoder
            if key not in reading.shared:
                reading.shared[key] = _mean(reading, reading.memory, reading.memory_valid)
            return reading.shared[key]
        source = reading.x if self.reads == "x" else reading.u
        if self.pool == "running":
            assert reading.valid is not None
            pooled, reading.state = running_mean(source, reading.valid, reading.state, kept=reading.kept)
            return pooled
        if self.pool == "token":
            return source.float()
        return _mean(reading, source, reading.prompt if self.pool == "prompt" else reading.valid)

    def _normalized(self, features: Tensor) -> Tensor:
        if self.normalize == "standardize":
            # Norm about 1 whatever the width: Adam moves a logit by lr · Σ|f|, which would otherwise grow with width.
            return (features - self.mean) / self.std / math.sqrt(features.shape[-1])
        if self.normalize == "unit" and not isinstance(self.head, OutputHead):
            return unit(features)
        return features

    def observe(self) -> None:
        """Starts to collect the features' mean and spread, until `settle`."""
        if self.normalize == "standardize":
            self.observed = _Moments()

    def settle(self) -> None:
        """Standardises with the collected mean and spread from now on; both are saved with the gate."""
        if self.observed is not None:
            mean, std = self.observed.result()
            self.mean.copy_(mean)
            self.std.copy_(std)
            self.observed = None


def _mean(reading: Reading, x: Tensor, weight: Tensor | None) -> Tensor:
    """`mean_pool` of x, over all positions without a `weight`. Values computed from `weight` are shared in a pass."""
    if weight is None:
        return x.mean(1, dtype=torch.float32)
    key = "span", id(weight), x.dtype
    if key not in reading.shared:
        reading.shared[key] = span(weight, x.dtype)
    return mean_pool(x, *reading.shared[key])


class _Moments:
    """The mean and standard deviation over all rows, from sums in float64."""

    def __init__(self) -> None:
        self.count: Tensor | float = 0.0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, features: Tensor, valid: Tensor | None) -> None:
        rows = features.double().flatten(0, -2)
        keep = torch.ones_like(rows[:, :1]) if valid is None else valid.reshape(-1, 1).double()
        self.count = self.count + keep.sum()
        self.sum = self.sum + (rows * keep).sum(0)
        self.squares = self.squares + (rows.square() * keep).sum(0)

    def result(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.sum / self.count)
        std = torch.as_tensor(self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        # A constant feature carries no information: the floor keeps its rounding noise from being amplified.
        return mean, std.clamp_min(1e-3 * float(std.mean()) + 1e-8)


def build_gates(
    config: GateConfig,
    bank: ExpertBank,
    sites: Sequence[Site],
    *,
    seq2seq: bool,
    memory_width: int | None = None,
) -> dict[str, nn.Module]:
    """A new gate for each site; `memory_width` is the width of the encoder's output.

    They are uniform. With `config.init_std` their weights are random with that spread (torch's global generator).
    """
    gates = {site.name: _build_gate(config, bank, site, seq2seq, memory_width) for site in sites}
    if config.init_std > 0:
        for gate in gates.values():
            nn.init.normal_(gate.get_parameter(_weight_of(gate)), std=config.init_std)
    return gates


def _weight_of(gate: nn.Module) -> str:
    """The parameter that a gate's logits come from: if it and the bias are zero, the gate is uniform."""
    return "logits" if isinstance(gate, StaticGate) else "head.weight"


def _build_gate(config: GateConfig, bank: ExpertBank, site: Site, seq2seq: bool, memory_width: int | None) -> nn.Module:
    if config.input == "none":
        return StaticGate(len(bank), config)
    pool = resolve_pool(config.pool, site.stream, seq2seq=seq2seq, reads=config.input)
    owner = torch.cat([bank.owner(m) for m in site.entry.matrices])
    head: nn.Module
    if config.input == "hidden":
        width = bank.width(site.entry.matrices[0])
        if seq2seq and pool == "prompt" and memory_width is not None:
            width = memory_width
        head = FeatureHead(width, len(bank), rank=config.head_rank if config.head == "low_rank" else None)
    else:
        width = len(owner)
        if config.normalize != "standardize":
            head = OutputHead([bank.stacked(m) for m in site.entry.matrices], len(bank), config)
        elif config.head == "per_expert":
            head = PerExpertHead(owner, len(bank))
        else:
            head = FeatureHead(width, len(bank), rank=config.head_rank if config.head == "low_rank" else None)
    return InputGate(config, pool=pool, width=width, head=head)
