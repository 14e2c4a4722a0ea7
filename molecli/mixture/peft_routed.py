"""Experts that PEFT hosts and routes, by its own code, on a language model.

routed          the mixture for a configuration of PEFT's
ArrowMixture    PEFT's Arrow: a router over the experts in every layer
XLoraMixture    PEFT's X-LoRA: a classifier that weighs them, from a first pass of the model without them
PeftMixture     what both share: inside its context the model has PEFT's layers, afterwards it is as it was

PEFT changes the model in place; whatever it may leave there is put back by `as_it_was`, which trusts none of it. The
names that PEFT needs ("task_0"; "0", "1", ...) are its own, a user's LoRAs keep theirs.

It puts adapters in one by one and walks over all that are there each time: entering the context grows with N².
"""

from __future__ import annotations

import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
from molecli.errors import MismatchError, RunError
from molecli.experts import Expert, ExpertBank, LowRank
from molecli.files.lora_spec import WEIGHTS_FILE
from molecli.mixture.mixture import Mixture
from molecli.mixture.site_state import reference
from molecli.mixture.streams import CACHE_ARGUMENTS, Streams
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
    """The experts as PEFT routes them by `config`; `weights` [N] are for a router that learns nothing."""
    if isinstance(config, peft.XLoraConfig):
        return XLoraMixture(model, bank, sites, config, streams=streams)
    return ArrowMixture(model, bank, sites, config, weights, streams=streams)


def weighed_at(config: peft.ArrowConfig | peft.XLoraConfig) -> Granularity:
    """Where a router of this configuration decides: at every matrix apart, or once for all."""
    once = isinstance(config, peft.XLoraConfig) and not config.layerwise_scalings
    return "network" if once else "matrix"


class PeftMixture(Mixture, ABC):
    """Experts on a language model through PEFT; to its users a mixture like every other.

    sites: where it weighs the experts. Raises: MismatchError as every mixture, and on entering for a model that has
    adapters of PEFT already.
    """

    def __init__(self, model: nn.Module, bank: ExpertBank, sites: Sequence[Site], *, streams: Streams) -> None:
        super().__init__(model, bank, (), {}, streams=streams)
        self.sites = tuple(sites)
        self._inside: ExitStack | None = None

    def attach(self) -> None:
        """Put PEFT's layers into the model."""
        if self._inside is not None:
            raise RunError("mixture", "it is attached already", "Leave its context first.")
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            what = "it has adapters of PEFT already, which would mix with the LoRAs"
            raise MismatchError("base", what, "Give the model without them.")
        with ExitStack() as stack:
            if not self._off:  # else the base alone
                stack.enter_context(as_it_was(self.model, self.bank.matrices))
                # Layers are created with random factors, which the experts' replace.
                with seeded(0, reference(self.model).device), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._host(stack)
            self._inside = stack.pop_all()

    def detach(self) -> None:
        """Take PEFT's layers out; the model is the base again, bit for bit."""
        if self._inside is not None:
            self._inside.close()
            self._inside = None

    def mask(self, *names: str) -> None:
        """Switch off exactly the named experts, and all others on."""
        super().mask(*names)
        if self._inside is not None:
            self.detach()
            self.attach()

    def gates(self) -> dict[str, Tensor]:
        """Nothing, where PEFT keeps no weights."""
        return {}

    @abstractmethod
    def _host(self, stack: ExitStack) -> None:
        """Put PEFT's layers in; what must be undone goes on the stack."""

    @property
    def _kept(self) -> list[int]:
        """The experts that are not masked."""
        return list(range(len(self.bank))) if self._keep is None else self._keep.nonzero().flatten().tolist()


class ArrowMixture(PeftMixture):
    """Experts routed by Arrow token by token, at every matrix apart; masked ones are left out as if never there.

    weights [N]: the users' coefficients of the experts. The model's key-value cache works as always.
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
        """The experts' weights; all else follows from the experts."""
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
        # What PEFT's create_arrow_model does, except that the router goes to the experts' matrices and to no other of
        # the same last name, where there would be nothing to route.
        router.task_adapter_names, router.gks_adapter_names = names, []
        settings = _settings(self.model, experts[0].factors)
        settings.arrow_config = router
        _add(tuner, _ROUTER, settings)
        tuner.set_adapter(_ROUTER, inference_mode=True)


class XLoraMixture(PeftMixture):
    """Experts weighed by X-LoRA's classifier token by token, for all matrices alike or (layerwise) for each.

    classifier: PEFT's, in float32 also on a base of another type, as gates are; it is what trains. Masked experts get
    the logit −∞, which rescales the others in proportion. The model runs twice a call, and without a key-value cache.
    """

    def __init__(
        self, model: nn.Module, bank: ExpertBank, sites: Sequence[Site], config: peft.XLoraConfig, *, streams: Streams
    ) -> None:
        super().__init__(model, bank, sites, streams=streams)
        self.config = config
        device = reference(model).device
        self.classifier = XLoraClassifier(model, config, len(bank), len(bank.matrices), device).float().eval()
        first, last = self.classifier.layers[0], self.classifier.layers[-1]
        first.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        last.register_forward_hook(self._masked)
        self._tuner: peft.XLoraModel | None = None
        self._valid: Tensor | None = None

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
        valid = torch.ones(values.shape[:2]) if self._valid is None else self._valid
        weight = valid.to(values)[..., None, None]
        means = (values * weight).sum(1) / weight.sum(1).clamp_min(1)
        return {site.name: means[:, place] for place, site in enumerate(self.sites)}

    def _host(self, stack: ExitStack) -> None:
        stack.enter_context(uncached(self.model))
        stack.callback(self.model.register_forward_pre_hook(self._look, with_kwargs=True).remove)
        with tempfile.TemporaryDirectory() as folder:
            # PEFT reads adapters from folders. These hold no tensors: its renaming of keys fits Llama's names alone.
            self.config.adapters = {str(i): f"{folder}/{i}" for i in range(len(self.bank))}
            for i, expert in enumerate(self.bank.experts):
                _settings(self.model, expert.factors).save_pretrained(f"{folder}/{i}")
                save_file({}, Path(folder) / str(i) / WEIGHTS_FILE)
            tuner = peft.XLoraModel(self.model, self.config, "xlora", torch_device="cpu")
        for i, expert in enumerate(self.bank.experts):
            _fill(self.model, str(i), expert)
        tuner.internal_xlora_classifier = self.classifier
        # The context in which PeftModel.forward and PeftModel.generate call the model: here the model is called itself.
        stack.enter_context(tuner._enable_peft_forward_hooks())
        self._tuner, self._valid = tuner, None
        stack.callback(self._drop)

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which tokens are padding. Raises: RunError for a call with a key-value cache."""
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS):
            what = "X-LoRA runs the model twice a call, and a key-value cache would take in every token twice"
            raise RunError("generation", what, "Write use_cache=False.")
        self._valid = kwargs.get("attention_mask")

    def _masked(self, _: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        """The logits [..., N] or [..., matrices * N] with those of masked experts at −∞."""
        if self._keep is None:
            return None
        off = (self._keep == 0).repeat(logits.shape[-1] // len(self.bank))
        return logits.masked_fill(off, float("-inf"))

    def _drop(self) -> None:
        self._tuner, self._valid = None, None


@contextmanager
def as_it_was(model: nn.Module, matrices: Sequence[str]) -> Iterator[None]:
    """Afterwards the model's `matrices` are the modules that they were, and nothing about it has changed."""
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


def _settings(model: nn.Module, factors: Any) -> peft.LoraConfig:
    """What PEFT must be told to put an adapter of these factors on exactly their matrices."""
    exactly = "|".join(re.escape(matrix) for matrix in factors)
    transposed = any(isinstance(model.get_submodule(matrix), Conv1D) for matrix in factors)
    return peft.LoraConfig(**{**lora_config(factors), "target_modules": exactly, "fan_in_fan_out": transposed})


def _add(tuner: peft.LoraModel, name: str, config: peft.LoraConfig) -> None:
    """One more adapter beside those that are there."""
    tuner.peft_config[name] = config
    tuner.inject_adapter(tuner.model, name)


def _fill(model: nn.Module, adapter: str, expert: Expert) -> None:
    """Give the adapter the expert's factors, frozen and in float32, as PEFT loads them."""
    for matrix, low_rank in expert.factors.items():
        layer: Any = model.get_submodule(matrix)
        for part, factor in ((layer.lora_A, low_rank.A), (layer.lora_B, low_rank.B)):
            weight = part[adapter].weight
            weight.data = factor.to(weight.device, torch.float32, copy=True)
            weight.requires_grad_(False)


def _equal_ranks(bank: ExpertBank, index: int, weight: float) -> Expert:
    """The expert times `weight`, of the largest rank of each matrix: rows and columns of zeros change no update."""

    def padded(matrix: str, low_rank: LowRank) -> LowRank:
        more = max(expert.factors[matrix].rank for expert in bank.experts) - low_rank.rank
        A = nn.functional.pad(low_rank.A, (0, 0, 0, more))
        return LowRank(A, nn.functional.pad(low_rank.B, (0, more)), low_rank.scaling * weight)

    expert = bank.experts[index]
    return replace(expert, factors={matrix: padded(matrix, f) for matrix, f in expert.factors.items()})
