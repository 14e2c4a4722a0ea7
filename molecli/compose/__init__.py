"""The composition methods: one file each, one row each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from molecli.errors import UsageError

# The keys of `method.*` that hold in every mode.
EVERYWHERE = ("layers",)


@dataclass(frozen=True)
class Method:
    """A row of the table: `target` is module:attribute, imported when used.

    options: the keys of `method.*` that change what it makes, beside those of EVERYWHERE.
    """

    name: str
    level: str
    trained: bool
    paper: str
    summary: str
    target: str
    options: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """All keys of `method.*` that it reads."""
        return (*self.options, *EVERYWHERE)

    @property
    def merges(self) -> bool:
        """Whether it makes one LoRA of all, as low-rank factors (`compose.updates`)."""
        return self.target.endswith(":merge")

    @property
    def gated(self) -> bool:
        """Whether gates of this package weigh the LoRAs, site by site."""
        return self.target.endswith(":build_gates")

    @property
    def through_peft(self) -> bool:
        """Whether PEFT itself hosts the LoRAs and routes among them."""
        return self.target.endswith(":peft_config")

    def load(self) -> Any:
        """What the row points to."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


def _merge(name: str, paper: str, summary: str, *options: str, trained: bool = False) -> Method:
    """The row of a method that makes one LoRA of all: any of them may be scaled, and cut to a rank."""
    target = f"molecli.compose.{name}:merge"
    return Method(name, "weights", trained, paper, summary, target, ("scale", "rank", *options))


METHODS = {
    method.name: method
    for method in (
        Method(
            "gated",
            "site",
            True,
            "MoLE, ICLR 2024",
            "learned gates weight the LoRAs by the input",
            "molecli.compose.gated:build_gates",
            (),
        ),
        Method(
            "soup",
            "site",
            True,
            "LoRA Soups, 2410.13025",
            "learned weights per site, the same for every input",
            "molecli.compose.soup:build_gates",
            (),
        ),
        Method(
            "arrow",
            "site",
            False,
            "Arrow, 2405.11157",
            "PEFT's: each token to the LoRAs whose first singular vectors it follows",
            "molecli.compose.arrow:peft_config",
            ("scale", "top_k", "temperature", "seed"),
        ),
        Method(
            "xlora",
            "site",
            True,
            "X-LoRA, 2402.07148",
            "PEFT's: a classifier of the base's last hidden states weighs the LoRAs by token",
            "molecli.compose.xlora:peft_config",
            ("scale", "top_k", "temperature", "xlora_depth", "xlora_size", "layerwise_scalings"),
        ),
        Method(
            "linear", "weights", False, "MoLE Eq. 1", "the sum of all LoRAs", "molecli.compose.linear:gate", ("scale",)
        ),
        Method(
            "nla",
            "weights",
            False,
            "MoLE Eq. 2",
            "the sum with weights that add up to 1",
            "molecli.compose.nla:gate",
            (),  # a scale cancels
        ),
        Method(
            "single", "weights", False, "Hu et al. 2021", "one LoRA alone", "molecli.compose.single:gate", ("scale",)
        ),
        _merge("cat", "PEFT", "the sum as one LoRA, all ranks side by side"),
        _merge("svd", "PEFT; Eckart-Young", "the sum as one LoRA of a given rank"),
        _merge("magnitude_prune", "PEFT", "the sum of the updates' largest entries", "density"),
        _merge(
            "ties", "TIES, 2306.01708", "entries trimmed, their signs elected, those that agree averaged", "density"
        ),
        _merge("dare", "DARE, 2311.03099", "random entries dropped, the rest rescaled and summed", "density", "seed"),
        _merge("dare_ties", "2311.03099 with 2306.01708", "DARE's drop, then TIES' election", "density", "seed"),
        _merge("knots", "KnOTS, 2410.19735", "TIES in the updates' shared left space", "density"),
        _merge("tsv", "TSV-Merge, 2412.00081", "the updates' singular vectors made orthogonal, then summed"),
        _merge("iso", "Iso-C, 2502.04959", "the sum with its singular values made equal"),
        _merge("svdiff", "SVDiff, 2303.11305", "shifts of the base's singular values, added"),
        _merge(
            "lorahub",
            "LoRAHub, 2307.13269",
            "one weight per LoRA, searched for without gradients",
            *("evaluations", "examples", "bound", "l1", "on"),
            trained=True,
        ),
        _merge("pem", "PEM, 2306.14870", "sums and differences of LoRAs by an expression", "expression", "on"),
        Method(
            "switch",
            "output",
            False,
            "Multi-LoRA Composition, 2402.16843",
            "images: the LoRAs take turns over the denoising steps",
            "molecli.compose.switch:Switch",
            ("scale", "tau", "order"),
        ),
        Method(
            "composite",
            "output",
            False,
            "Multi-LoRA Composition, 2402.16843",
            "images: the mean of each LoRA's own prediction at every step",
            "molecli.compose.composite:Composite",
            ("scale",),
        ),
        Method(
            "w_switch",
            "output",
            False,
            "W-Switch, 2606.03792",
            "images: turns as long as the prompt needs each LoRA",
            "molecli.compose.w_switch:WSwitch",
            ("scale", "tau", "order"),
        ),
        Method(
            "w_composite",
            "output",
            False,
            "W-Composite, 2606.03792",
            "images: predictions weighted by the prompt's likeness to each trigger",
            "molecli.compose.w_composite:WComposite",
            ("scale",),
        ),
        Method(
            "loratorio",
            "output",
            False,
            "LoRAtorio, 2508.11624",
            "images: predictions weighted patch by patch by their distance from the base's",
            "molecli.compose.loratorio:Loratorio",
            ("scale", "base_share"),
        ),
    )
}
# Other names in use: what diffusers and Multi-LoRA Composition call the sum.
ALIASES = {"merge": "linear"}


def get_method(name: str) -> Method:
    """The method called `name`, an alias too. Raises: UsageError that names the nearest."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        near = difflib.get_close_matches(name, (*METHODS, *ALIASES), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(METHODS)}."
        raise UsageError("--mode", f"no composition method {name!r}", hint)
    return METHODS[name]
