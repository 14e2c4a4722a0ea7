"""The composition methods: one row here and one file in `molecli.methods` for each, in the order of `--mode`.

The folder of a method is its family. The family determines what the file must define:

    gates     build_gates(config, bank, sites, *, seq2seq, memory_width) -> {site: gate}    weights follow the input
    sums      gate(weights, only=None) -> FixedGate                                         constant weights
    merges    merge(updates, config) -> Result                                              all LoRAs as one
    outputs   method(names, weights, config, *, triggers, kinds) -> OutputMethod            acts on a denoising step
    peft      peft_config(config, bank, *, width, seq2seq) -> PEFT's configuration          PEFT does the routing

A merge may also define coefficients(config, names) -> [N], factors on the user's weights, and lost(expert,
spectrum) -> float, the fraction of a LoRA's update that it cannot represent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

from molecli.catalog.table import Table
from molecli.errors import UsageError, near

Family = Literal["gates", "sums", "merges", "outputs", "peft"]


# Kinds of base, by their output.
Kind = Literal["texts", "pictures"]
_BASES: Mapping[Kind, str] = {"texts": "a language model", "pictures": "a diffusion pipeline"}


class Contract(NamedTuple):
    """What holds for a family: level (where its methods act, as in composition files), the function in each file, the
    common options, the kinds of base it works on, and why on no other."""

    level: Literal["weights", "site", "output"]
    function: str
    options: tuple[str, ...] = ()
    on: tuple[Kind, ...] = ("texts", "pictures")
    why: str = ""


FAMILIES: Mapping[Family, Contract] = {
    "gates": Contract("site", "build_gates"),
    "sums": Contract("weights", "gate"),
    "merges": Contract("weights", "merge", ("scale", "rank")),
    "outputs": Contract("output", "method", ("scale",), ("pictures",), "it acts on denoising steps"),
    "peft": Contract("site", "peft_config", ("scale",), ("texts",), "PEFT routes only in language models"),
}
# The keys of `method.*` that every mode reads.
EVERYWHERE = ("layers",)


@dataclass(frozen=True)
class Option:
    """A key of `method.*` that a row adds to those of `config.method`.

    default: also gives the type, unless `kind` does; bounds: keywords of pydantic's Field, such as ge=0.
    """

    name: str
    default: Any
    help: str
    kind: Any = None
    bounds: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A row. Only the first five fields are required.

    options: the keys of `method.*` that the method reads besides those of its family; an `Option` is a new key.
    module: the file of the method, by default molecli.methods.<family>.<name>.
    passes: passes of the base per training row. lr: default learning rate of the method.
    calls: (a, b): a·N + b UNet calls per denoising step with N LoRAs; (0, 1) is one call.
    shown: the kinds of base on which it is scored next to a composition by default.
    builds: it wraps the base in its own classes; no other method can then be scored on the same loaded base.
    written: options that must be set.
    """

    name: str
    family: Family
    trained: bool
    paper: str
    summary: str
    options: tuple[str | Option, ...] = ()
    module: str = ""
    passes: float = 1.0
    lr: float | None = None
    calls: tuple[int, int] = (0, 1)
    shown: tuple[Kind, ...] = ()
    builds: bool = False
    written: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """Where it acts: weights, site or output."""
        return FAMILIES[self.family].level

    @property
    def own_options(self) -> tuple[str, ...]:
        """The keys of `method.*` that change its result."""
        own = (option if isinstance(option, str) else option.name for option in self.options)
        return (*FAMILIES[self.family].options, *own)

    @property
    def reads(self) -> tuple[str, ...]:
        """All keys of `method.*` that it reads."""
        return (*self.own_options, *EVERYWHERE)

    def load(self) -> Any:
        """The function that its file defines for its family."""
        return self.part(FAMILIES[self.family].function)

    def part(self, name: str) -> Any:
        """The attribute `name` of its file, or None."""
        module = self.module or f"molecli.methods.{self.family}.{self.name}"
        return getattr(import_module(module), name, None)


_XLORA = ("top_k", "temperature", "xlora_depth", "xlora_size", "layerwise_scalings")
_SEARCH = ("evaluations", "examples", "bound", "l1", "on")

METHODS: Table[Method] = Table(
    "molecli.methods",
    Method,
    (
        Method("gated", "gates", True, "MoLE, ICLR 2024", "learned gates weight the LoRAs by the input"),
        Method("soup", "gates", True, "LoRA Soups, 2410.13025", "learned weights per site, the same for every input"),
        Method(
            "lorahub",
            "merges",
            True,
            "LoRAHub, 2307.13269",
            "one weight per LoRA, searched for without gradients",
            _SEARCH,
        ),
        Method(
            "xlora",
            "peft",
            True,
            "X-LoRA, 2402.07148",
            "PEFT's: a classifier of the base's last hidden states weights the LoRAs for each token",
            _XLORA,
            passes=2.0,
            # Its classifier reads hidden states without normalising: Σ|h| is about the width of the base, while gates
            # read features of norm 1. Adam moves a logit by up to lr · Σ|h| per step, so that with the gates' learning
            # rate one step would decide every token.
            lr=1e-3,
            builds=True,
        ),
        Method("single", "sums", False, "Hu et al. 2021", "one LoRA alone", ("scale",), shown=("texts",)),
        Method("linear", "sums", False, "MoLE Eq. 1", "the sum of all LoRAs", ("scale",), shown=("texts", "pictures")),
        # No scale: it cancels out.
        Method(
            "nla",
            "sums",
            False,
            "MoLE Eq. 2",
            "the sum with weights that add up to 1",
            shown=("texts", "pictures"),
        ),
        Method("cat", "merges", False, "PEFT", "the sum as one LoRA with all ranks concatenated"),
        Method(
            "svd",
            "merges",
            False,
            "PEFT; Eckart-Young",
            "the sum as one LoRA of a given rank, by default the largest of theirs",
        ),
        Method("magnitude_prune", "merges", False, "PEFT", "the sum of the updates' largest entries", ("density",)),
        Method(
            "ties",
            "merges",
            False,
            "TIES, 2306.01708",
            "small entries removed; the rest averaged where their sign agrees with the elected one",
            ("density",),
        ),
        Method(
            "dare",
            "merges",
            False,
            "DARE, 2311.03099",
            "random entries dropped, the rest rescaled and summed",
            ("density", "seed"),
        ),
        Method(
            "dare_ties",
            "merges",
            False,
            "2311.03099 with 2306.01708",
            "DARE's dropping, then TIES' sign election",
            ("density", "seed"),
        ),
        Method("knots", "merges", False, "KnOTS, 2410.19735", "TIES in the updates' shared left space", ("density",)),
        Method(
            "tsv",
            "merges",
            False,
            "TSV-Merge, 2412.00081",
            "the updates' singular vectors made orthogonal, then summed",
        ),
        Method("iso", "merges", False, "Iso-C, 2502.04959", "the sum with its singular values made equal"),
        Method("svdiff", "merges", False, "SVDiff, 2303.11305", "shifts of the base's singular values, added"),
        Method(
            "pem",
            "merges",
            False,
            "PEM, 2306.14870",
            "sums and differences of LoRAs by an expression",
            ("expression", "on"),
            written=("expression",),
        ),
        Method(
            "arrow",
            "peft",
            False,
            "Arrow, 2405.11157",
            "PEFT's: each token goes to the LoRAs (by default 3) whose first singular vectors are closest to it",
            ("top_k", "temperature", "seed"),
        ),
        Method(
            "switch",
            "outputs",
            False,
            "Multi-LoRA Composition, 2402.16843",
            "images: the LoRAs take turns over the denoising steps",
            ("tau", "order"),
            shown=("pictures",),
        ),
        Method(
            "composite",
            "outputs",
            False,
            "Multi-LoRA Composition, 2402.16843",
            "images: the mean of each LoRA's own prediction at every step",
            calls=(1, 0),
            shown=("pictures",),
        ),
        Method(
            "w_switch",
            "outputs",
            False,
            "W-Switch, 2606.03792",
            "images: turns whose length follows each LoRA's importance in the prompt",
            ("tau", "order"),
        ),
        Method(
            "w_composite",
            "outputs",
            False,
            "W-Composite, 2606.03792",
            "images: predictions weighted by the prompt's similarity to each trigger",
            calls=(1, 0),
        ),
        Method(
            "loratorio",
            "outputs",
            False,
            "LoRAtorio, 2508.11624",
            "images: predictions weighted patch by patch by their distance from the base's",
            ("base_share",),
            calls=(1, 1),
        ),
    ),
)
# Other names of a method: diffusers and Multi-LoRA Composition call the sum `merge`.
ALIASES = {"merge": "linear"}
# The default mode of `mole compose`, that of several LoRAs, and that of one LoRA alone.
DEFAULT, SUM, ALONE = "gated", "linear", "single"
# The bare base, which is listed among the methods.
BASE = "base"


def names(rows: Iterable[Method]) -> tuple[str, ...]:
    """The names of the rows, each followed by its aliases."""
    other = {name: [alias for alias, meant in ALIASES.items() if meant == name] for name in ALIASES.values()}
    return tuple(name for row in rows for name in (row.name, *other.get(row.name, ())))


# The methods that learn nothing, as --modes accepts them.
FIXED = names(row for row in METHODS.values() if not row.trained)


def get_method(name: str) -> Method:
    """The method called `name`, which may be an alias. Raises: UsageError that suggests the nearest name."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        nearest = near(name, (*METHODS, *ALIASES))
        hint = f"Did you mean {nearest}?" if nearest else f"Known: {', '.join(METHODS)}."
        raise UsageError("--mode", f"there is no composition method {name!r}", hint)
    return METHODS[name]


def check_runs_on(mode: str, kind: Kind, where: str = "--mode") -> None:
    """Checks that `mode` works on that kind of base, or is the bare base. Raises: UsageError."""
    family = FAMILIES[get_method(mode).family] if mode != BASE else None
    if family is not None and kind not in family.on:
        what = f"{family.why}, and the base is {_BASES[kind]}"
        raise UsageError(f"{where} {mode}", what, f"Write {DEFAULT}, {SUM} or another mode for {_BASES[kind]}.")


def shown_beside(what: Kind) -> tuple[str, ...]:
    """The default columns next to a composition: the base, then methods that learn nothing."""
    return (BASE, *(row.name for row in METHODS.values() if what in row.shown))


def readers(option: str) -> list[str]:
    """The methods that read the key `option` of `method.*`."""
    return [name for name, row in METHODS.items() if option in row.reads]


def brought() -> dict[str, Option]:
    """The keys of `method.*` that rows add, by name."""
    found = (option for row in METHODS.values() for option in row.options if isinstance(option, Option))
    return {option.name: option for option in found}
