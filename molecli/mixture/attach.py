"""Experts and compositions on a live model: the Python API (`molecli.attach`) and what the commands build on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from molecli.adapters import LoraLike, LoraSpec, parse_loras, read_expert
from molecli.adapters.source import is_there, resolve_source
from molecli.adapters.weights import Shape
from molecli.bases.weights import BaseWeights
from molecli.catalog.methods import ALONE, DEFAULT, SUM, Method, get_method
from molecli.config import BaseConfig, GateConfig, MethodConfig
from molecli.config.unread import check_options
from molecli.errors import UsageError
from molecli.experts import Expert, ExpertBank, LowRank
from molecli.files.composition import Composition, ExpertRecord, check_base, check_experts, load_composition
from molecli.files.concepts import Concept, read_concept
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import adaptable_matrices, host_of
from molecli.mixture.mixture import Mixture
from molecli.protocols import Matrices, Note

Loras = Mapping[str, str | Path] | Iterable[str]


def attach(
    model: Any,
    *,
    loras: Loras | None = None,
    composition: str | Path | None = None,
    mode: str | None = None,
    weights: Mapping[str, float] | None = None,
    only: str | None = None,
    gate: GateConfig | None = None,
    method: MethodConfig | None = None,
    triggers: Mapping[str, str] | None = None,
    allow_partial: bool = False,
) -> Mixture:
    """The LoRAs on `model`, a transformers model or a diffusers pipeline, as a context manager; inside it, the model's
    own API runs the mixture.

        with attach(model, loras={"a": "loras/a", "b": "loras/b"}, composition="runs/ab") as mixture:
            model.generate(**inputs)
        with attach(pipe, loras={"a": "loras/a", "b": "loras/b"}, mode="nla"):
            pipe("a photo of ...")

    loras: names to folders, files or hub ids; or a list of `name=PATH@WEIGHT`. A composition remembers its own.
    composition: the folder or file that `mole compose` wrote. It brings mode, weights and gates, which are checked
        against base and LoRAs.
    mode: how to compose without one; linear, the plain sum, by default. Gates made so are untrained and even.
    weights: the LoRAs' coefficients by name, 1 by default; they override `@WEIGHT`.
    only: the LoRA of mode `single`. gate: settings of a mode with gates. method: settings of the other modes.
    triggers: words that call each LoRA, by name, for modes that read the prompt; by default those of concept.json
        beside the LoRA. These modes also need `mixture.prepare(prompt)` before the pipeline is called.
    allow_partial: take a LoRA although some of its matrices are not in the model, but not most of its weights.
    Raises: UsageError, MismatchError.
    """
    model = host_of(model)
    if composition is not None:
        if any(given is not None for given in (mode, weights, gate, only, method, triggers)):
            raise UsageError("attach", "a composition brings its own mode, weights and gates", "Leave those out.")
        return attach_composition(model, load_composition(composition), loras=_specs(loras) if loras else None)
    specs = _specs(loras or ())
    if not specs:
        raise UsageError("attach", "no LoRA is named", "Write loras={'a': 'path/to/a'}.")
    row = get_method(mode or SUM)
    _check_read(row, gate=gate, only=only, weights=weights, method=method)
    experts = read_experts(model, specs, allow_partial=allow_partial)
    own = {spec.name: spec.weight for spec in specs} | dict(weights or {})
    concepts = _concepts(specs) if row.level == "output" else {}
    return build_mixture(
        model,
        experts,
        mode=row.name,
        gate=gate,
        weights=own,
        only=only,
        method=method,
        triggers={name: concept.trigger for name, concept in concepts.items()} | dict(triggers or {}),
        kinds={name: concept.kind for name, concept in concepts.items()},
    )


def _check_read(row: Method, *, gate: Any, only: Any, weights: Any, method: MethodConfig | None) -> None:
    """Raises: UsageError for an argument of `attach` that this mode does not read."""
    for name, value, mode, read in (
        ("gate", gate, DEFAULT, row.family == "gates"),
        ("only", only, ALONE, row.name == ALONE),
    ):
        if value is not None and not read:
            raise UsageError("attach", f"{name}= has an effect only in mode {mode!r}", f"Write mode={mode!r}.")
    if weights is not None and row.level == "site" and row.trained:
        raise UsageError("attach", f"the gates learn the weights in mode {row.name!r}", "Leave weights= out.")
    if method is not None:
        check_options(method, [row.name])


def read_experts(
    model: nn.Module, loras: Sequence[LoraLike], *, allow_partial: bool = False, note: Note | None = None
) -> list[Expert]:
    """The experts of `loras`, checked against the matrices of `model`.

    note: receives what the user has to know about them, by default as warnings.
    """
    matrices, base = adaptable_matrices(model), BaseWeights(model)
    experts = [read_expert(lora, matrices, allow_partial=allow_partial, base=base) for lora in loras]
    for text in [*(text for expert in experts for text in expert.notices), *_twice(experts)]:
        if note is None:
            warnings.warn(text, stacklevel=2)
        else:
            note(text)
    return experts


def _twice(experts: Sequence[Expert]) -> Iterator[str]:
    """A line for every LoRA that is there under two names."""
    first: dict[str, str] = {}
    for expert in experts:
        known = first.setdefault(expert.sha256, expert.name)
        if known != expert.name:
            yield f"{known} and {expert.name} are the same LoRA: it counts twice"


def attach_composition(
    model: nn.Module,
    composition: Composition,
    *,
    loras: Sequence[LoraLike] | None = None,
    base: str = "",
    experts: Sequence[Expert] | None = None,
) -> Mixture:
    """The composition on `model`, after its base and LoRAs are checked; `experts` are its LoRAs, if already read.

    A merge keeps its own factors, so its LoRAs may be missing: that is only a warning.
    Raises: MismatchError if base, LoRAs or gates are not those that it was made of.
    """
    check_base(composition, fingerprint(model), same_base, base=base)
    if experts is None:
        # A LoRA that only partly matched was accepted when the composition was made; its matrices are compared below.
        found = read_experts(model, loras or specs_of(composition), allow_partial=True)
        experts = found if loras else _with_absent(composition, found, Matrices.of(adaptable_matrices(model)).named)
    check_experts(composition, ExpertBank(experts))
    with torch.random.fork_rng(devices=[]):  # new gates are overwritten: their random numbers do not count
        mixture = build_mixture(
            model,
            experts,
            mode=composition.mode,
            gate=GateConfig.model_validate(composition.gate) if composition.gate else None,
            only=composition.settings.get("only"),
            method=MethodConfig.model_validate(composition.settings.get("method", {})),
            triggers=composition.settings.get("triggers"),
            kinds=composition.settings.get("kinds"),
        )
    mixture.load_state_dict(composition.tensors)
    return mixture


def not_found(composition: Composition) -> list[ExpertRecord]:
    """The LoRAs of a merge that are no longer where they were; none for other modes, which need all their LoRAs."""
    if get_method(composition.mode).family != "merges":
        return []
    return [record for record in composition.experts if not is_there(LoraSpec(record.name, record.source))]


def specs_of(composition: Composition) -> list[LoraSpec]:
    """The LoRAs that a composition remembers; a merge's missing ones are left out, with a warning."""
    gone = not_found(composition)
    if gone:
        listed = ", ".join(f"no {record.name} at {record.source}" for record in gone)
        what = f"the LoRAs of this composition ({composition.mode}) are not all there: {listed}"
        warnings.warn(f"{what}. The merge is used as it is; --mask and --only need the LoRAs", stacklevel=2)
    return [LoraSpec(record.name, record.source) for record in composition.experts if record not in gone]


def _with_absent(composition: Composition, found: Iterable[Expert], shapes: Mapping[str, Shape]) -> list[Expert]:
    """The composition's experts in its order; missing ones get empty factors, of the base's matrices `shapes`."""
    there = {expert.name: expert for expert in found}
    return [there.get(record.name) or _absent(record, shapes) for record in composition.experts]


def _absent(record: ExpertRecord, shapes: Mapping[str, Shape]) -> Expert:
    factors = {
        matrix: LowRank(torch.empty(0, *shapes[matrix][1:]), torch.empty(shapes[matrix][0], 0), 1.0)
        for matrix in record.matrices
        if matrix in shapes
    }
    return Expert(record.name, factors, record.source, record.sha256, record.rank, record.alpha, absent=True)


def _concepts(specs: Sequence[LoraSpec]) -> dict[str, Concept]:
    """The concept.json beside each LoRA that has one, by the LoRA's name."""
    found = {spec.name: read_concept(resolve_source(spec)) for spec in specs}
    return {name: concept for name, concept in found.items() if concept is not None}


def _specs(loras: Loras) -> tuple[LoraSpec, ...]:
    if isinstance(loras, Mapping):
        return tuple(LoraSpec(name, str(source)) for name, source in loras.items())
    return parse_loras(loras)


def base_of(base: BaseConfig | None, composition: Composition | None) -> BaseConfig:
    """The named base, else that of the composition, else the built-in one."""
    if base is not None:
        return base
    if composition is None:
        return BaseConfig()
    return BaseConfig.model_validate(yaml.safe_load(composition.recipe)["base"])
