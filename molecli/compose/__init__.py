"""The composition methods: one file each, one row each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from molecli.errors import UsageError


@dataclass(frozen=True)
class Method:
    """A row of the table: `target` is module:attribute, imported when used."""

    name: str
    level: str
    trained: bool
    paper: str
    summary: str
    target: str

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
        ),
        Method(
            "soup",
            "site",
            True,
            "LoRA Soups, 2410.13025",
            "learned weights per site, the same for every input",
            "molecli.compose.soup:build_gates",
        ),
        Method(
            "arrow",
            "site",
            False,
            "Arrow, 2405.11157",
            "PEFT's: each token to the LoRAs whose first singular vectors it follows",
            "molecli.compose.arrow:peft_config",
        ),
        Method(
            "xlora",
            "site",
            True,
            "X-LoRA, 2402.07148",
            "PEFT's: a classifier of the base's last hidden states weighs the LoRAs by token",
            "molecli.compose.xlora:peft_config",
        ),
        Method("linear", "weights", False, "MoLE Eq. 1", "the sum of all LoRAs", "molecli.compose.linear:gate"),
        Method(
            "nla", "weights", False, "MoLE Eq. 2", "the sum with weights that add up to 1", "molecli.compose.nla:gate"
        ),
        Method("single", "weights", False, "Hu et al. 2021", "one LoRA alone", "molecli.compose.single:gate"),
        *(
            Method(name, "weights", trained, paper, summary, f"molecli.compose.{name}:merge")
            for name, trained, paper, summary in (
                ("cat", False, "PEFT", "the sum as one LoRA, all ranks side by side"),
                ("svd", False, "PEFT; Eckart-Young", "the sum as one LoRA of a given rank"),
                ("magnitude_prune", False, "PEFT", "the sum of the updates' largest entries"),
                ("ties", False, "TIES, 2306.01708", "entries trimmed, their signs elected, those that agree averaged"),
                ("dare", False, "DARE, 2311.03099", "random entries dropped, the rest rescaled and summed"),
                ("dare_ties", False, "2311.03099 with 2306.01708", "DARE's drop, then TIES' election"),
                ("knots", False, "KnOTS, 2410.19735", "TIES in the updates' shared left space"),
                ("tsv", False, "TSV-Merge, 2412.00081", "the updates' singular vectors made orthogonal, then summed"),
                ("iso", False, "Iso-C, 2502.04959", "the sum with its singular values made equal"),
                ("svdiff", False, "SVDiff, 2303.11305", "shifts of the base's singular values, added"),
                ("lorahub", True, "LoRAHub, 2307.13269", "one weight per LoRA, searched for without gradients"),
                ("pem", False, "PEM, 2306.14870", "sums and differences of LoRAs by an expression"),
            )
        ),
        Method(
            "switch",
            "output",
            False,
            "Multi-LoRA Composition, 2402.16843",
            "images: the LoRAs take turns over the denoising steps",
            "molecli.compose.switch:Switch",
        ),
        Method(
            "composite",
            "output",
            False,
            "Multi-LoRA Composition, 2402.16843",
            "images: the mean of each LoRA's own prediction at every step",
            "molecli.compose.composite:Composite",
        ),
        Method(
            "w_switch",
            "output",
            False,
            "W-Switch, 2606.03792",
            "images: turns as long as the prompt needs each LoRA",
            "molecli.compose.w_switch:WSwitch",
        ),
        Method(
            "w_composite",
            "output",
            False,
            "W-Composite, 2606.03792",
            "images: predictions weighted by the prompt's likeness to each trigger",
            "molecli.compose.w_composite:WComposite",
        ),
        Method(
            "loratorio",
            "output",
            False,
            "LoRAtorio, 2508.11624",
            "images: predictions weighted patch by patch by their distance from the base's",
            "molecli.compose.loratorio:Loratorio",
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
