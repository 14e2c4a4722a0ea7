"""Makes flags from recipe fields: type, choices, default and help text come from the field.

    Flag              one flag and the recipe key it overrides
    Toggle            one flag that is not a recipe key
    Request           the arguments of a command
    recipe_command    a command function whose signature is built from flags

Shared flags: BASE, LORAS, GATE, TRAIN, DATA, MASK, MASKS, IMAGE, METHOD, SEED_AND_DEVICE, OUTPUT, SAVE.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from molecli.catalog.suites import OWN_TEXTS
from molecli.cli import console
from molecli.cli.console import Console
from molecli.config import RECIPES, Recipe, load_recipe
from molecli.config.defaults import IMAGE_DEFAULTS
from molecli.config.shorthand import as_names, as_pairs
from molecli.config.tree import from_overrides, merged


@dataclass(frozen=True)
class Flag:
    """A flag that overrides the recipe key `key`; `note` follows the field's description in the help.

    `default` replaces the default that the help shows; "" shows none. `many`: the flag may be repeated, and each use is
    a list of names. `pairs`: it may be repeated, and each use is KEY=VALUE.
    """

    name: str
    key: str
    note: str = ""
    metavar: str | None = None
    default: str | None = None
    many: bool = False
    pairs: bool = False

    @property
    def parameter(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class Toggle:
    """A flag outside the recipe; its value is in `Request.switches`."""

    name: str
    help: str
    kind: Any = bool
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class Request:
    """A parsed command line: the positional arguments, the recipe overrides, and the other flags."""

    model: str
    targets: tuple[str, ...]
    overrides: dict[str, Any]
    sets: tuple[str, ...]
    switches: dict[str, Any]
    console: Console = field(repr=False)

    @property
    def resume(self) -> bool:
        return bool(self.switches.get("resume"))

    def recipe(self, file: str | None, *, more: dict[str, Any] | None = None, sets: Sequence[str] = ()) -> Recipe:
        """The recipe in `file` (None: the defaults) under `more`, the flags, `sets` and `--set`."""
        flags = merged(from_overrides(more or {}), from_overrides(self.overrides))
        return load_recipe(file, self.model, flags, (*sets, *self.sets))


BASE = (
    Flag("--base", "base.id", metavar="BASE"),
    Flag("--gguf-file", "base.gguf_file", metavar="NAME"),
    Flag("--dtype", "base.dtype"),
    Flag("--quantize", "base.quantize"),
    Flag("--chat-template", "base.chat_template"),
    Flag("--template-file", "base.template_file", metavar="PATH"),
    Flag("--system-prompt", "base.system_prompt", metavar="TEXT"),
    Flag("--template-arg", "base.template_args", "may be repeated", metavar="KEY=VALUE", pairs=True),
    Flag("--source-language", "base.source_language", metavar="CODE"),
    Flag("--target-language", "base.target_language", metavar="CODE"),
)
LORAS = (Flag("--loras", "loras", "each PATH, name=PATH or name=PATH@WEIGHT, separated by commas", metavar="LORAS"),)
GATE = (
    Flag("--granularity", "gate.granularity"),
    Flag("--gate-input", "gate.input"),
    Flag("--pool", "gate.pool"),
    Flag("--head", "gate.head"),
    Flag("--top-k", "gate.top_k"),
)
TRAIN = (
    Flag("--steps", "train.steps"),
    Flag("--batch-size", "train.batch_size"),
    Flag("--micro-batch-size", "train.micro_batch_size"),
    Flag("--lr", "train.lr"),
    Flag("--checkpoint-every", "train.checkpoint_every"),
)
DATA = (
    Flag("--suite", "data.suite"),
    Flag("--data-dir", "data.data_dir", metavar="DIR"),
    Flag("--files", "data.files", f"separated by commas; implies --suite {OWN_TEXTS}", metavar="FILES"),
    Flag("--tasks", "data.tasks", metavar="TASKS"),
    Flag("--limit", "data.limit"),
    Flag("--holdout", "data.holdout"),
)
MASK = (Flag("--mask", "mask", metavar="NAMES"), Flag("--only", "only", metavar="NAMES"))
MASKS = (
    Flag("--mask", "mask", 'repeat it for more columns; "" keeps all on', metavar="NAMES", many=True),
    Flag("--only", "only", "may be repeated too", metavar="NAMES", many=True),
)
IMAGE = (
    Flag("--denoise-steps", "image.steps"),
    Flag("--guidance", "image.guidance"),
    Flag("--scheduler", "image.scheduler"),
    Flag("--negative-prompt", "image.negative_prompt"),
    Flag("--clip-skip", "image.clip_skip"),
    Flag("--width", "image.width"),
    Flag("--height", "image.height"),
)
METHOD = (
    Flag("--scale", "method.scale"),
    Flag("--tau", "method.tau"),
    Flag("--order", "method.order", metavar="NAMES"),
    Flag("--density", "method.density"),
    Flag("--rank", "method.rank"),
    Flag("--expression", "method.expression"),
)
SEED_AND_DEVICE = (Flag("--seed", "seed"), Flag("--device", "device"))
OVERWRITE = Toggle("--overwrite", "replace what an earlier run left in the output folder")
OUTPUT = (Flag("--output", "output", metavar="DIR", default="runs/COMMAND-TIME"), OVERWRITE)
SAVE = (Flag("--output", "output", "by default nothing is written", metavar="DIR", default=""), OVERWRITE)
RECIPE = ("RECIPE", "A .yaml file, a run's folder or the name of a shipped recipe.")
RESUME = Toggle("--resume", "continue from the newest checkpoint in the output folder")
DRY_RUN = Toggle("--dry-run", "show what would be done; load no weights, write nothing")
_EVERYWHERE = (
    Toggle("--json", "print one JSON document on stdout and nothing else there"),
    Toggle("--quiet", "no progress and no notes on stderr"),
    Toggle("--verbose", "more notes, and tracebacks, on stderr"),
)


def recipe_command(
    command: str,
    *,
    target: tuple[str, str],
    many: bool = False,
    flags: Sequence[Flag | Toggle] = (),
    model: str | None = None,
) -> Callable[[Callable[[Request], None]], Callable[..., None]]:
    """A decorator: the function of a `Request` becomes a Typer command with these flags.

    `target`: metavar and help of the positional argument; `model`: the recipe, if it is not that of the command.
    """
    recipe_model = RECIPES[model or command]
    everything = (*flags, *_EVERYWHERE)

    def decorate(function: Callable[[Request], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            function(_request(model or command, everything, values))

        own = IMAGE_DEFAULTS.get(model or command, {})
        parameters = [_target_parameter(target, many), *(_parameter(flag, recipe_model, own) for flag in everything)]
        parameters.append(_keyword("set", list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET_HELP)))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        return run

    return decorate


_SET_HELP = "override any recipe key, e.g. --set train.warmup_steps=5; may be repeated"


def _request(model: str, flags: Sequence[Flag | Toggle], values: dict[str, Any]) -> Request:
    overrides: dict[str, Any] = {}
    switches: dict[str, Any] = {}
    for flag in flags:
        value = values[flag.parameter]
        if isinstance(flag, Toggle):
            switches[flag.parameter] = value
        elif flag.pairs and value:
            overrides[flag.key] = as_pairs(value, flag.name)
        elif flag.many and value:
            overrides[flag.key] = value[0] if len(value) == 1 else [as_names(text) for text in value]
        elif value is not None and not (flag.many or flag.pairs):
            overrides[flag.key] = value
    _imply_suite(overrides)
    named = {name: bool(switches.pop(name)) for name in ("json", "quiet", "verbose")}
    target = values["target"] or ()
    targets = (target,) if isinstance(target, str) else tuple(target)
    return Request(model, targets, overrides, tuple(values["set"] or ()), switches, console.start(**named))


def _imply_suite(overrides: dict[str, Any]) -> None:
    """Sets the suite for --files, unless a suite is named too."""
    for key in [key for key in overrides if key.rpartition(".")[2] == "files"]:
        overrides[key] = [part.strip() for part in overrides[key].split(",") if part.strip()]
        overrides.setdefault(key.removesuffix("files") + "suite", OWN_TEXTS)


def _target_parameter(target: tuple[str, str], many: bool) -> inspect.Parameter:
    metavar, help = target
    argument = typer.Argument(metavar=metavar, help=help, show_default=False)
    return _keyword("target", list[str] | None if many else str | None, argument)


def _parameter(flag: Flag | Toggle, model: type[BaseModel], pictures: Mapping[str, Any]) -> inspect.Parameter:
    """The Typer parameter of a flag; `pictures`: the defaults on a diffusion base, by section."""
    if isinstance(flag, Toggle):
        kind = flag.kind if flag.kind is bool else flag.kind | None
        option = typer.Option(flag.name, help=flag.help, metavar=flag.metavar, show_default=False)
        return _keyword(flag.parameter, kind, option, False if flag.kind is bool else None)
    found, default = _field(model, flag.key)
    text = "; ".join(part for part in (found.description or "", flag.note) if part)
    shown = default if flag.default is None else flag.default
    if shown is not None and shown is not False and shown not in ("", ()):
        own = pictures.get(flag.key.partition(".")[0]) or {}
        other = own.get(flag.key.partition(".")[2], shown)
        text += f" [default: {shown}]" if other == shown else f" [default: {shown}; images: {other}]"
    kind, choices = (list[str], None) if flag.many or flag.pairs else _kind(found.annotation)
    metavar = flag.metavar or choices
    name = f"{flag.name}/--no-{flag.name.lstrip('-')}" if kind is bool and found.default else flag.name
    return _keyword(flag.parameter, kind | None, typer.Option(name, help=text, metavar=metavar, show_default=False))


def _keyword(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _field(model: type[BaseModel], key: str) -> tuple[FieldInfo, Any]:
    """The field of a dotted key and its default; the default is None if an optional section above it is off."""
    *sections, last = key.split(".")
    known = True
    for part in sections:
        section = model.model_fields[part]
        known = known and section.default is not None
        model = next(inner for inner in _types(section.annotation) if hasattr(inner, "model_fields"))
    found = model.model_fields[last]
    return found, found.default if known and not found.is_required() and found.default_factory is None else None


def _types(annotation: Any) -> tuple[Any, ...]:
    """The types in an annotation such as `int | None` or `Annotated[...]`, without None."""
    inner = tuple(t for t in get_args(annotation) if t is not type(None))
    return inner or (annotation,)


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type for Typer and the metavar. Only switches are typed: the recipe checks all other values."""
    inner = _types(annotation)
    if len(inner) == 1 and inner[0] is not annotation and not isinstance(inner[0], str):
        return _kind(inner[0])
    if all(isinstance(choice, str) for choice in inner):
        return str, "|".join(inner)
    if inner[0] is bool:
        return bool, None
    return str, {int: "N", float: "X"}.get(inner[0], "TEXT")
