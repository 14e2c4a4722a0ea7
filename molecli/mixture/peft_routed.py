"""Experts on a language model that PEFT holds and routes with its own code.

routed          the mixture for one of PEFT's configurations
weighed_at      where its router acts
ArrowMixture    PEFT's Arrow: a router over the experts in every layer
XLoraMixture    PEFT's X-LoRA: a classifier that weights them, after a first pass of the model without them
PeftMixture     the shared base class: inside its context the model has PEFT's layers, afterwards it is as it was

PEFT changes the model in place; `as_it_was` undoes all its changes. PEFT has its own names for adapters ("task_0"; "0",
"1", ...); for users the LoRAs keep their names. PEFT adds adapters one by one and visits all existing ones each time:
the time to enter the context grows with N².
"""

from __future__ import annotations

import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.xlora.classifier import XLoraClassifier
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molecli.adapters.lora_config import lora_config
from molecli.bases.language import seeded, uncached
from molecli.bases.peft_layers import explained
from molecli.errors import MismatchError, RunError, UsageError
from molecli.experts import Expert, ExpertBank, LowRank
from molecli.files.lora_spec import WEIGHTS_FILE
from molecli.functional.wrapped import device_of
from molecli.mixture.called_tokens import CalledTokens, by_name, positional
from molecli.mixture.mixture import Mixture
from molecli.mixture.output_head import output_head
from molecli.mixture.streams import CACHE_ARGUMENTS, Streams
from molecli.mixture.uncompiled import run_eagerly
from molecli.protocols import Granularity, Site

_ROUTER = "arrow_router"


def routed(
    model: nn.Module,
    bank: ExpertBank,
    sites: Sequence[Site],
    config: peft.ArrowConfig | peft.XLoraConfig,
    weights: Tensor,
    *,
    streams: Streams,
) -> PeftMixture:
    """The experts with PEFT's routing by `config`; `weights` [N] are used by a router that learns nothing.

    Raises: UsageError for X-LoRA on an output head, to which PEFT gives the weights of tokens that it does not read.
    """
    if isinstance(config, peft.XLoraConfig):
        if output_head(model, bank.matrices) is not None:
            what = "it weighs LoRAs token by token, and one adapts the output head, which reads only some of the tokens"
            raise UsageError("X-LoRA", what, "Use LoRAs that do not adapt the head, or another mode.")
        return XLoraMixture(model, bank, sites, config, streams=streams)
    return ArrowMixture(model, bank, sites, config, weights, streams=streams)


def weighed_at(config: peft.ArrowConfig | peft.XLoraConfig) -> Granularity:
    """Where a router of this configuration acts: at each matrix separately, or once for all."""
    once = isinstance(config, peft.XLoraConfig) and not config.layerwise_scalings
    return "network" if once else "matrix"


class PeftMixture(Mixture, ABC):
    """Experts on a language model through PEFT; it is used like every mixture.

    sites: where it weights the experts. Raises: MismatchError like every mixture, and on entering for a model that
    already has PEFT adapters.
    """

    def __init__(self, model: nn.Module, bank: ExpertBank, sites: Sequence[Site], *, streams: Streams) -> None:
        super().__init__(model, bank, (), {}, streams=streams)
        self.sites = tuple(sites)
        self._inside: ExitStack | None = None

    def attach(self) -> None:
        """Adds PEFT's layers to the model."""
        if self._inside is not None:
            raise RunError("mixture", "it is attached already", "Leave its context first.")
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            what = "it already has PEFT adapters, which would mix with the LoRAs"
            raise MismatchError("base", what, "Give the model without them.")
        with ExitStack() as stack:
            stack.callback(run_eagerly().remove)
            if not self._off:  # if all experts are off, the model stays the base
                stack.enter_context(as_it_was(self.model, self.bank.matrices))
                # Layers are created with random factors, which the experts' factors replace.
                refused = explained("mixture", "Use another mode, or an unquantised base.")
                with seeded(0, device_of(self.model)), warnings.catch_warnings(), refused:
                    warnings.simplefilter("ignore")
                    self._host(stack)
            self._inside = stack.pop_all()

    def detach(self) -> None:
        """Removes PEFT's layers; the model is the base again, bit for bit."""
        if self._inside is not None:
            self._inside.close()
            self._inside = None

    def mask(self, *names: str) -> None:
        """Switches off exactly the named experts and switches on all others."""
        super().mask(*names)
        if self._inside is not None:
            self.detach()
            self.attach()

    def gates(self) -> dict[str, Tensor]:
        """Empty, if PEFT keeps no weights."""
        return {}

    @abstractmethod
    def _host(self, stack: ExitStack) -> None:
        """Adds PEFT's layers; everything that must be undone goes on the stack."""

    @property
    def _kept(self) -> list[int]:
        """The experts that are not masked."""
        return list(range(len(self.bank))) if self._keep is None else self._keep.nonzero().flatten().tolist()


class ArrowMixture(PeftMixture):
    """Experts routed by Arrow, for each token and at each matrix separately; masked ones are left out completely.

    weights [N]: the user's coefficients of the experts. The model's key-value cache works as usual.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: ExpertBank,
        sites: Sequence[Site],
        config: peft.ArrowConfig,
        weights: Tensor,
        *,
        streams: Streams,
    ) -> None:
        super().__init__(model, bank, sites, streams=streams)
        self.config, self.weights = config, weights

    def state_dict(self) -> dict[str, Tensor]:
        """The experts' weights; everything else is computed from the experts."""
        return {"weights": self.weights}

    def _host(self, stack: ExitStack) -> None:
        experts = [_equal_ranks(self.bank, i, float(self.weights[i])) for i in self._kept]
        names = [f"task_{place}" for place in range(len(experts))]
        configs = [_settings(self.model, expert.factors) for expert in experts]
        tuner = peft.LoraModel(self.model, configs[0], names[0])
        for name, config in list(zip(names, configs, strict=True))[1:]:
            _add(tuner, name, config)
        for name, expert in zip(names, experts, strict=True):
            _fill(self.model, name, expert)
        router = replace(self.config, top_k=min(self.config.top_k, len(experts)))
        # As in PEFT's create_arrow_model, except that the router is added only to the experts' matrices, and not to
        # others with the same last name, where there would be nothing to route.
        router.task_adapter_names, router.gks_adapter_names = names, []
        settings = _settings(self.model, experts[0].factors)
        settings.arrow_config = router
        _add(tuner, _ROUTER, settings)
        _check_reached(self.model, self.bank, "Arrow", lambda layer: _ROUTER in layer.lora_variant)
        tuner.set_adapter(_ROUTER, inference_mode=True)


class XLoraMixture(PeftMixture):
    """Experts weighted by X-LoRA's classifier for each token, the same for all matrices or (layerwise) for each.

    classifier: PEFT's, which is trained; like gates it is in float32 on every base. Masked experts get the logit −∞,
    which rescales the others in proportion. The model runs twice per call, without a key-value cache.
    """

    def __init__(
        self, model: nn.Module, bank: ExpertBank, sites: Sequence[Site], config: peft.XLoraConfig, *, streams: Streams
    ) -> None:
        super().__init__(model, bank, sites, streams=streams)
        self.config = config
        device = device_of(model)
        self.classifier = XLoraClassifier(model, config, len(bank), len(bank.matrices), device).float().eval()
        first, last = self.classifier.layers[0], self.classifier.layers[-1]
        first.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        last.register_forward_hook(self._masked)
        self._tuner: peft.XLoraModel | None = None
        self._tokens: CalledTokens | None = None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The classifier's parameters as `classifier/<parameter>`."""
        return {f"classifier/{name}": parameter for name, parameter in self.classifier.named_parameters()}

    def state_dict(self) -> dict[str, Tensor]:
        """The classifier, as `classifier/<tensor>`."""
        return {f"classifier/{name}": tensor.detach() for name, tensor in self.classifier.state_dict().items()}

    def gates(self) -> dict[str, Tensor]:
        """{site: [batch, expert]} of the last forward pass, averaged over the tokens that are not padding."""
        scalings = None if self._tuner is None else self._tuner.get_latest_scalings()
        if scalings is None:
            return {}
        values = scalings.detach().float()  # [B, T, matrices, N]
        if self.config.top_k_lora is not None:
            chosen = values.topk(self.config.top_k_lora, dim=-1).indices
            values = values * torch.zeros_like(values).scatter_(-1, chosen, 1.0)
        valid = torch.ones(values.shape[:2]) if self._tokens is None else self._tokens.valid
        weight = valid.to(values)[..., None, None]
        means = (values * weight).sum(1) / weight.sum(1).clamp_min(1)
        return {site.name: means[:, place] for place, site in enumerate(self.sites)}

    def _host(self, stack: ExitStack) -> None:
        stack.enter_context(uncached(self.model))
        stack.callback(self.model.register_forward_pre_hook(self._look, with_kwargs=True).remove)
        with tempfile.TemporaryDirectory() as folder:
            # PEFT reads adapters from folders. These have no tensors: its renaming of keys works only for Llama.
            self.config.adapters = {str(i): f"{folder}/{i}" for i in range(len(self.bank))}
            for i, expert in enumerate(self.bank.experts):
                _settings(self.model, expert.factors).save_pretrained(f"{folder}/{i}")
                save_file({}, Path(folder) / str(i) / WEIGHTS_FILE)
            tuner = peft.XLoraModel(self.model, self.config, "xlora", torch_device="cpu")
        # PEFT weighs only layers of these classes, and those of most quantisers are of others.
        _check_reached(self.model, self.bank, "X-LoRA", lambda layer: isinstance(layer, peft.tuners.lora.Linear))
        for i, expert in enumerate(self.bank.experts):
            _fill(self.model, str(i), expert)
        tuner.internal_xlora_classifier = self.classifier
        # PeftModel.forward and PeftModel.generate call the model in this context; here the model is called directly.
        stack.enter_context(tuner._enable_peft_forward_hooks())
        self._tuner, self._tokens = tuner, None
        stack.callback(self._drop)

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes which tokens are padding. Raises: RunError for a call with a key-value cache."""
        told = by_name(positional(model), args, kwargs) if args else kwargs
        if told.get("use_cache") or any(told.get(name) is not None for name in CACHE_ARGUMENTS):
            what = "X-LoRA runs the model twice per call, so a key-value cache would get every token twice"
            raise RunError("generation", what, "Write use_cache=False.")
        self._tokens = CalledTokens(told)

    def _masked(self, _: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """The logits [..., N] or [..., matrices * N], with −∞ for masked experts."""
        if self._keep is None:
            return None
        off = (self._keep.to(logits.device) == 0).repeat(logits.shape[-1] // len(self.bank))
        return logits.masked_fill(off, float("-inf"))

    def _drop(self) -> None:
        self._tuner, self._tokens = None, None


@contextmanager
def as_it_was(model: nn.Module, matrices: Sequence[str]) -> Iterator[None]:
    """A context after which the model's `matrices` are the same modules as before and everything else is restored."""
    modules = {matrix: model.get_submodule(matrix) for matrix in matrices}
    training = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for matrix, module in modules.items():
            parent, _, leaf = matrix.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        vars(model).pop("peft_config", None)
        for module, was in training:
            module.training = was
        for parameter, wanted in learning:
            parameter.requires_grad_(wanted)


def _check_reached(model: nn.Module, bank: ExpertBank, router: str, reached: Callable[[Any], bool]) -> None:
    """Raises: UsageError if PEFT has put a layer on one of the experts' matrices that its router does not act on."""
    for matrix in bank.matrices:
        layer: Any = model.get_submodule(matrix)
        if not isinstance(layer, BaseTunerLayer) or not reached(layer):
            kind = type(layer.base_layer if isinstance(layer, BaseTunerLayer) else layer).__name__
            what = f"PEFT's {router} does not act on a {kind}, and {matrix} is one"
            raise UsageError(
                f"--mode {router.lower().replace('-', '')}", what, "Use another mode, or an unquantised base."
            )


def _settings(model: nn.Module, factors: Any) -> peft.LoraConfig:
    """The PEFT configuration that puts an adapter with these factors on exactly their matrices."""
    exactly = "|".join(re.escape(matrix) for matrix in factors)
    transposed = any(isinstance(model.get_submodule(matrix), Conv1D) for matrix in factors)
    return peft.LoraConfig(**{**lora_config(factors), "target_modules": exactly, "fan_in_fan_out": transposed})


def _add(tuner: peft.LoraModel, name: str, config: peft.LoraConfig) -> None:
    """Adds one more adapter."""
    tuner.peft_config[name] = config
    tuner.inject_adapter(tuner.model, name)


def _fill(model: nn.Module, adapter: str, expert: Expert) -> None:
    """Copies the expert's factors into the adapter, frozen and in float32, as when PEFT loads them."""
    for matrix, low_rank in expert.factors.items():
        layer: Any = model.get_submodule(matrix)
        for part, factor in ((layer.lora_A, low_rank.A), (layer.lora_B, low_rank.B)):
            weight = part[adapter].weight
            weight.data = factor.to(weight.device, torch.float32, copy=True)
            weight.requires_grad_(False)


def _equal_ranks(bank: ExpertBank, index: int, weight: float) -> Expert:
    """The expert times `weight`, padded with zeros to the largest rank at each matrix, which changes no update."""

    def padded(matrix: str, low_rank: LowRank) -> LowRank:
        more = max(expert.factors[matrix].rank for expert in bank.experts) - low_rank.rank
        A = nn.functional.pad(low_rank.A, (0, 0, 0, more))
        return LowRank(A, nn.functional.pad(low_rank.B, (0, more)), low_rank.scaling * weight)

    expert = bank.experts[index]
    return replace(expert, factors={matrix: padded(matrix, f) for matrix, f in expert.factors.items()})
