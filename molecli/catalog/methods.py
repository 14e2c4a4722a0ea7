"""The composition methods: one row each, beside one file each in `molecli.methods`, in the order that `--mode` lists.

A method's folder is its family, and its family says what its file defines:

    gates     build_gates(config, bank, sites, *, seq2seq, memory_width) -> {site: gate}    weights from the input
    sums      gate(weights, only=None) -> FixedGate                                         weights that never change
    merges    merge(updates, config) -> Result                                              one LoRA of all, at a matrix
    outputs   method(names, weights, config, *, triggers, kinds) -> OutputMethod            acts on a denoising step
    peft      peft_config(config, bank, *, width, seq2seq) -> PEFT's configuration          PEFT hosts and routes

A merge may also define coefficients(config, names) -> [N], factors on the users' weights, and lost(expert,
spectrum) -> float, the share of a LoRA's update that it cannot say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

from molecli.catalog.table import Table
from molecli.errors import UsageError, near

Family = Literal["gates", "sums", "merges", "outputs", "peft"]


# Kinds of base, by what they make.
Kind = Literal["texts", "pictures"]
_BASES: Mapping[Kind, str] = {"texts": "a language model", "pictures": "a diffusion pipeline"}


class Contract(NamedTuple):
    """Of a family: where its methods act, as composition files say it; what a file defines; the options of all; the
    kinds of base, and why no other."""

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
    "peft": Contract("site", "peft_config", ("scale",), ("texts",), "PEFT routes in language models alone"),
}
# The keys of `method.*` that hold in every mode.
EVERYWHERE = ("layers",)


@dataclass(frozen=True)
class Option:
    """A key of `method.*` that a row brings along: one that `config.method` does not have.

    default: its value where none is written, whose type the key has unless `kind` says another; bounds: keywords of
    pydantic's Field, such as ge=0.
    """

    name: str
    default: Any
    help: str
    kind: Any = None
    bounds: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A row. Only the first five must be said.

    options: the keys of `method.*` that change what it makes, beside those of its family; an `Option` is a new key.
    module: where it is defined, by default molecli.methods.<family>.<name>.
    passes: of the base, for a row that it learns from. lr: its learning rate where none is written.
    calls: (a, b), of the UNet a step, a·N + b with N LoRAs; once where it is (0, 1).
    shown: it is scored beside a composition where nothing else is asked for, on language models, of pictures.
    builds: it wraps the base in classes of its own, so that no other method is scored on the same load of it.
    written: options that it cannot do without.
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
        """The keys of `method.*` that change what it makes."""
        own = (option if isinstance(option, str) else option.name for option in self.options)
        return (*FAMILIES[self.family].options, *own)

    @property
    def reads(self) -> tuple[str, ...]:
        """All keys of `method.*` that it reads."""
        return (*self.own_options, *EVERYWHERE)

    def load(self) -> Any:
        """What its file defines for its family."""
        return self.part(FAMILIES[self.family].function)

    def part(self, name: str) -> Any:
        """What its file calls `name`; None where it has no such thing."""
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
            "PEFT's: a classifier of the base's last hidden states weighs the LoRAs by token",
            _XLORA,
            passes=2.0,
            # Its classifier reads hidden states as they are, Σ|h| about the base's width, where gates read features of
            # norm 1: under Adam, which moves a logit by up to lr · Σ|h| a step, the gates' rate would decide every
            # token at once.
            lr=1e-3,
            builds=True,
        ),
        Method("single", "sums", False, "Hu et al. 2021", "one LoRA alone", ("scale",), shown=("texts",)),
        Method("linear", "sums", False, "MoLE Eq. 1", "the sum of all LoRAs", ("scale",), shown=("texts", "pictures")),
        # No scale: it cancels.
        Method(
            "nla",
            "sums",
            False,
            "MoLE Eq. 2",
            "the sum with weights that add up to 1",
            shown=("texts", "pictures"),
        ),
        Method("cat", "merges", False, "PEFT", "the sum as one LoRA, all ranks side by side"),
        Method("svd", "merges", False, "PEFT; Eckart-Young", "the sum as one LoRA of a given rank"),
        Method("magnitude_prune", "merges", False, "PEFT", "the sum of the updates' largest entries", ("density",)),
        Method(
            "ties",
            "merges",
            False,
            "TIES, 2306.01708",
            "entries trimmed, their signs elected, those that agree averaged",
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
            "DARE's drop, then TIES' election",
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
            "PEFT's: each token to the LoRAs whose first singular vectors it follows",
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
            "images: turns as long as the prompt needs each LoRA",
            ("tau", "order"),
        ),
        Method(
            "w_composite",
            "outputs",
            False,
            "W-Composite, 2606.03792",
            "images: predictions weighted by the prompt's likeness to each trigger",
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
# Other names in use: what diffusers and Multi-LoRA Composition call the sum.
ALIASES = {"merge": "linear"}
# What is meant where nothing is said: of `mole compose`, of LoRAs beside one another, and of one LoRA by its name.
DEFAULT, SUM, ALONE = "gated", "linear", "single"
# What stands among methods and composes nothing: the bare base.
BASE = "base"


def names(rows: Iterable[Method]) -> tuple[str, ...]:
    """The rows' names, each before its other ones."""
    other = {name: [alias for alias, meant in ALIASES.items() if meant == name] for name in ALIASES.values()}
    return tuple(name for row in rows for name in (row.name, *other.get(row.name, ())))


# Those that learn nothing, as --modes takes them.
FIXED = names(row for row in METHODS.values() if not row.trained)


def get_method(name: str) -> Method:
    """The method called `name`, an alias too. Raises: UsageError that names the nearest."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        nearest = near(name, (*METHODS, *ALIASES))
        hint = f"Did you mean {nearest}?" if nearest else f"Known: {', '.join(METHODS)}."
        raise UsageError("--mode", f"no composition method {name!r}", hint)
    return METHODS[name]


def check_runs_on(mode: str, kind: Kind, where: str = "--mode") -> None:
    """Nothing, where `mode` composes on that kind of base, or is the bare base. Raises: UsageError."""
    family = FAMILIES[get_method(mode).family] if mode != BASE else None
    if family is not None and kind not in family.on:
        what = f"{family.why}, and the base is {_BASES[kind]}"
        raise UsageError(f"{where} {mode}", what, f"Write {DEFAULT}, {SUM} or another that is for {_BASES[kind]}.")


def shown_beside(what: Kind) -> tuple[str, ...]:
    """The columns beside a composition where none are asked for: the base, then methods that learn nothing."""
    return (BASE, *(row.name for row in METHODS.values() if what in row.shown))


def readers(option: str) -> list[str]:
    """The methods that the key `option` of `method.*` changes."""
    return [name for name, row in METHODS.items() if option in row.reads]


def brought() -> dict[str, Option]:
    """The keys of `method.*` that rows bring along, by name."""
    found = (option for row in METHODS.values() for option in row.options if isinstance(option, Option))
    return {option.name: option for option in found}
