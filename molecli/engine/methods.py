"""What an evaluation compares: the base, each LoRA alone, the fixed mixtures, and compositions, each attached in turn.

Everything is built and checked before the first method is scored, so that a mismatch shows at once.
Contents: Method, static_methods, check_language, composition_methods, distinct, folder_names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from molecli.backbones.hosting import Mixture
from molecli.compose import get_method
from molecli.engine.attach import attach_composition
from molecli.engine.mixing import build_mixture
from molecli.engine.names import numbered
from molecli.engine.sample import switch
from molecli.errors import UsageError
from molecli.experts import Expert
from molecli.files.adapters import LoraLike
from molecli.files.composition import Composition
from molecli.files.recipe import MethodConfig, Switched

STATIC = ("base", "single", "linear", "nla")
ALL_ON = (Switched(),)


@dataclass(frozen=True)
class Method:
    """One column of the table: its name, and the context in which the model is scored; `single` is a LoRA alone."""

    name: str
    context: AbstractContextManager[Any]
    single: bool = False


@dataclass(frozen=True)
class _Switching(AbstractContextManager[Mixture]):
    """A mixture with some LoRAs off while it is attached: the columns of several choices share its memory."""

    mixture: Mixture
    choice: Switched

    def __enter__(self) -> Mixture:
        switch(self.mixture, mask=self.choice.mask, only=self.choice.only)
        return self.mixture.__enter__()

    def __exit__(self, *error: object) -> None:
        self.mixture.__exit__(*error)


def static_methods(
    model: nn.Module,
    experts: Sequence[Expert],
    *,
    modes: Sequence[str] = STATIC,
    weights: Mapping[str, float] | None = None,
    method: MethodConfig | None = None,
    switched: Sequence[Switched] = ALL_ON,
) -> list[Method]:
    """The methods of `modes` that need no training; each mixture of several LoRAs once for every choice in `switched`.

    Raises: UsageError where a mode needs LoRAs and there are none.
    """
    methods = []
    for mode in modes:
        if mode != "base" and not experts:
            raise UsageError("--modes", f"{mode!r} needs LoRAs, and none are named", "Write --loras a=PATH,b=PATH.")
        if mode == "base":
            methods.append(Method("base", nullcontext()))
        elif mode == "single":
            for expert in experts:
                # Eq. 1 of one LoRA with weight 1: the LoRA as it was trained.
                methods.append(Method(expert.name, build_mixture(model, [expert], mode="linear"), single=True))
        else:
            check_language(mode)
            mixture = build_mixture(model, experts, mode=mode, weights=weights, method=method)
            methods += _columns(mode, mixture, switched)
    return methods


def check_language(mode: str, where: str = "--modes") -> None:
    """Nothing, where `mode` composes a language model too. Raises: UsageError."""
    if get_method(mode).level == "output":
        what = "it acts on denoising steps, and the base is a language model"
        raise UsageError(f"{where} {mode}", what, "Write gated, linear, ties or another that is not for images alone.")


def composition_methods(
    model: nn.Module,
    compositions: Mapping[str, Composition],
    *,
    loras: Sequence[LoraLike] = (),
    experts: Sequence[Expert] = (),
    switched: Sequence[Switched] = ALL_ON,
) -> list[Method]:
    """One method per composition and choice in `switched`, under its name here; `experts` are not read again.

    Raises: UsageError for a choice that names an unknown LoRA; MismatchError where a composition does not belong to
    this model or these LoRAs.
    """
    read = {(expert.name, expert.source): expert for expert in experts}
    methods = []
    for name, composition in compositions.items():
        own = [read.get((record.name, record.source)) for record in composition.experts]
        known = [expert for expert in own if expert is not None]
        given = known if not loras and len(known) == len(own) else None
        mixture = attach_composition(model, composition, loras=list(loras) or None, experts=given)
        methods += _columns(name, mixture, switched)
    return methods


def distinct(methods: Iterable[Method]) -> dict[str, Method]:
    """The methods by name, a number behind each name that is taken."""
    listed = list(methods)
    return dict(zip(numbered(method.name for method in listed), listed, strict=True))


def folder_names(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path: a composition is called after its folder, or its whole path where two folders have one name."""
    names = [_folder_name(path) for path in paths]
    return {name if names.count(name) == 1 else path: path for name, path in zip(names, paths, strict=True)}


def _columns(name: str, mixture: Mixture, switched: Sequence[Switched]) -> list[Method]:
    for choice in switched:  # a name that no LoRA has shows before anything is scored
        switch(mixture, mask=choice.mask, only=choice.only)
    return [Method(name + choice.label, _Switching(mixture, choice)) for choice in switched]


def _folder_name(path: str) -> str:
    place = Path(path).resolve()
    return place.parent.name if place.name == "composition.safetensors" else place.stem
