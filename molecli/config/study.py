"""The recipe of a study: LoRAs trained on tasks, composed by every method, scored side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from molecli.catalog.methods import BASE, DEFAULT, get_method
from molecli.catalog.suites import SUITES
from molecli.config.defaults import Preset
from molecli.config.images import ConceptConfig, ImageConfig, ObjectiveConfig, PicturesConfig
from molecli.config.method import MethodConfig
from molecli.config.recipes import Loras, Mode
from molecli.config.sections import (
    AdapterConfig,
    BaseConfig,
    DataConfig,
    Device,
    EvalConfig,
    GateConfig,
    LoraTrainConfig,
    Names,
    Section,
    TrainConfig,
)
from molecli.config.shorthand import as_loras
from molecli.errors import UsageError, suggestion
from molecli.files.lora_spec import check_distinct

_NAME = re.compile(r"[^/\\.\x00]+")


class ExpertsConfig(Section):
    """The LoRAs of a study, trained first; or ready ones."""

    loras: Annotated[Loras, BeforeValidator(as_loras)] = Field(default=(), description="ready LoRAs; none are trained")
    data: DataConfig = Field(default_factory=DataConfig, description="tasks to train on, a LoRA for each")
    together: dict[str, Names] = Field(
        default_factory=dict, description="LoRAs of several tasks: name -> tasks; instead of one for each"
    )
    pictures: dict[str, PicturesConfig] = Field(
        default_factory=dict,
        description="a diffusion base: name -> the pictures to learn it from; folders are those in data_dir",
    )
    copies: int = Field(default=1, ge=1, description="LoRAs of each task, from disjoint parts of its training data")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="their shape")
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="their training")


class StudyMethod(Section):
    """One column of a study: what `mole compose` is told beside LoRAs and data."""

    mode: Mode | Literal["base"] = Field(default=DEFAULT, description="the composition method, or base for none")
    preset: Preset | None = Field(default=None, description="as in mole compose")
    gate: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    method: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    train: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    objective: dict[str, Any] = Field(default_factory=dict, description="a diffusion base: as in mole compose")
    experts: dict[str, Any] = Field(
        default_factory=dict,
        description="adapter and train, in place of those of `experts`: the method composes adapters of its own",
    )
    tune: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="settings to choose on held-out examples of `fit`; with per_task, of what learns nothing, on those "
        "of each task: method.NAME, gate.NAME or train.NAME -> values",
    )
    seeds: tuple[int, ...] = Field(default=(), description="in place of the study's: a slow column may have fewer")
    numbers: tuple[int, ...] = Field(
        default=(), description="those of the study's that this column has; all if not given"
    )

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of what `tune` lists: key -> value; none where nothing is to be chosen."""
        return [dict(zip(self.tune, values, strict=True)) for values in product(*self.tune.values())] * bool(self.tune)

    def at(self, settings: Mapping[str, Any]) -> StudyMethod:
        """The method with these settings, and nothing left to choose."""
        changed: dict[str, Any] = {"tune": {}}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            changed[section] = {**changed.get(section, getattr(self, section)), name: value}
        return self.model_copy(update=changed)

    @property
    def settings(self) -> list[str]:
        """The keys of `method` that are written or to be chosen."""
        tuned = [key.partition(".") for key in self.tune]
        return [*self.method, *(name for section, _, name in tuned if section == "method")]

    @property
    def fixed(self) -> bool:
        """Whether nothing of it depends on the seed or the data."""
        return self.mode == BASE or not get_method(self.mode).trained


class _OwnExperts(Section):
    """What a method's own adapters may differ in."""

    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig)


_TUNED = ("method", "gate", "train")  # sections whose settings may be chosen
_SECTIONS: dict[str, type[Section]] = {
    "gate": GateConfig,
    "method": MethodConfig,
    "train": TrainConfig,
    "objective": ObjectiveConfig,
    "experts": _OwnExperts,
}


class StudyRecipe(Section):
    """`mole study`: one table of many methods over the same LoRAs, data and metrics."""

    command: Literal["study"] = "study"
    title: str = Field(default="", description="heading of the table")
    base: BaseConfig = Field(default_factory=BaseConfig, description="the frozen base")
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig, description="the LoRAs")
    numbers: tuple[int, ...] = Field(
        default=(), description="so many LoRAs at once, each number by itself; all of them when not given"
    )
    methods: dict[str, StudyMethod] = Field(
        default_factory=dict, description="columns: name -> mode, gate, method and train, as in mole compose"
    )
    subject: str = Field(
        default="",
        description="the column whose margin over each other one is reported; the best of each row where none is named",
    )
    data_dir: str | None = Field(
        default=None,
        description="folder of the suite's files, where a section names none; where the sections name several suites, "
        "the folder that holds one for each; of pictures the folder of experts.pictures",
    )
    fit: DataConfig = Field(default_factory=DataConfig, description="what the learned methods learn from")
    per_task: bool = Field(
        default=False, description="learn on each task of `test` by itself, as LoRAHub does, instead of on all together"
    )
    leave_out: bool = Field(
        default=False,
        description="with per_task: compose for each task without the LoRAs trained on it, as if there were none",
    )
    test: EvalConfig = Field(default_factory=EvalConfig, description="what is scored")
    groups: dict[str, Names] = Field(
        default_factory=dict, description="tables of some of the tasks besides: name -> tasks; a language model's"
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="a diffusion base: how pictures are denoised")
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict, description="a diffusion base: what ready LoRAs add; read beside them if not given"
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="of the learned methods")
    wider: int = Field(
        default=2, ge=0, description="so often a value is added to a method's `tune`, beyond one chosen at the edge"
    )
    own: bool = Field(
        default=True, description="score each LoRA on its own task too; of pictures there is no such task"
    )
    gates: bool = Field(
        default=False, description="look at the gates too: weights by site and LoRA, and entropy over the training"
    )
    published: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="figures of a paper, shown beside: row -> column -> value; a row is a task, average or a number of "
        "LoRAs, with the metric behind it where several are scored",
    )
    source: str = Field(default="", description="where they are from")
    output: str = Field(default="runs/study", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description="of the LoRAs")
    device: Device = Field(default="auto", description="where the models run")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        """Methods that are told no mode are the mode of their name; `data_dir` is each section's that names none."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        if isinstance(tree.get("methods"), dict):
            tree["methods"] = {name: _with_mode(name, method) for name, method in tree["methods"].items()}
        if tree.get("data_dir"):
            tree |= _with_folders(tree, str(tree["data_dir"]))
        return tree

    @property
    def columns(self) -> list[tuple[int | None, str]]:
        """(number of LoRAs, method) of all that is composed; the number is None where the study names none."""
        numbers = self.numbers or (None,)
        return [(n, name) for n in numbers for name, own in self.methods.items() if not own.numbers or n in own.numbers]

    @property
    def draws(self) -> bool:
        """Whether the base is a diffusion pipeline, by what is to be learned or scored."""
        suite = SUITES.get(self.test.data.suite)  # None of several joined, which hold texts
        return bool(self.experts.pictures or self.test.data.scenes) or (suite is not None and suite.holds == "scenes")

    @model_validator(mode="after")
    def _check(self) -> StudyRecipe:
        if not self.methods:
            raise UsageError("methods", "a study compares methods, and none is named", "Write methods: {linear: {}}.")
        self._check_columns()
        if self.leave_out:
            self._check_left_out()
        check_distinct([lora.name for lora in self.experts.loras])
        texts: dict[str, Any] = {"numbers": self.numbers, "per_task": self.per_task, "groups": self.groups}
        texts["fit"] = "suite" in self.fit.model_fields_set
        for key, given in texts.items():
            if self.draws and given:
                what = "it is for language models, and this study is of pictures"
                raise UsageError(
                    key, what, "Leave it out: scenes say which LoRAs are composed, and gates learn of these."
                )
        for name, method in self.methods.items():
            if method.tune:
                self._check_tuned(name, method)
            if method.mode != BASE:
                for one in (method, *map(method.at, method.combinations())):
                    self._check_method(name, one)
        return self

    def _check_columns(self) -> None:
        """Nothing. Raises: UsageError for a column's name or number that cannot be, and a subject that is none."""
        for name, method in self.methods.items():
            if not _NAME.fullmatch(name):
                raise UsageError("methods", f"{name!r} is no name for a column", "Leave slashes and points out.")
            if strange := [number for number in method.numbers if number not in self.numbers]:
                what = f"{strange[0]} is none of the study's numbers of LoRAs"
                raise UsageError(f"methods.{name}.numbers", what, "Write some of those in `numbers`, or add it there.")
        # A language model's base is one column, however many names it has; of pictures each is a method's.
        columns = [name if self.draws or one.mode != BASE else BASE for name, one in self.methods.items()]
        if self.subject and self.subject not in columns:
            raise UsageError("subject", f"no column is called {self.subject!r}", suggestion(self.subject, columns))

    def _check_left_out(self) -> None:
        """Nothing, where every task has a composition of its own. Raises: UsageError that says why it has none."""
        if not self.per_task or self.numbers:
            what = "LoRAs are left out of the composition of each task, and this study composes for all tasks together"
            raise UsageError("leave_out", what, "Write per_task: true, and no numbers.")
        for name, method in self.methods.items():
            if method.tune:
                what = "settings are chosen for the same LoRAs on every task, and leave_out leaves some out"
                raise UsageError(f"methods.{name}.tune", what, "Leave it out, and write the settings.")

    def _check_tuned(self, name: str, method: StudyMethod) -> None:
        """Nothing, where settings can be chosen. Raises: UsageError that says why not."""
        where = f"methods.{name}.tune"
        for key, values in method.tune.items():
            if key.partition(".")[0] not in _TUNED or not key.partition(".")[2]:
                raise UsageError(where, f"{key!r} is no setting", "Write method.scale, gate.temperature, train.lr.")
            if not values:
                raise UsageError(where, f"no value of {key} is listed", "Write some: [0.5, 1].")
        if self.draws or method.mode == BASE:
            what = "settings are chosen for a composition of language models, which this is not"
            raise UsageError(where, what, "Leave it out, and write the settings.")
        if self.per_task:
            if not method.fixed:
                what = "each task is fitted by itself, and its examples are what this method learns from"
                raise UsageError(where, what, "Leave it out, and write the settings.")
        elif self.fit.holdout == 0:
            what = "settings are chosen on held-out examples, and none are held out"
            raise UsageError(where, what, "Write fit.holdout: 0.1.")

    def _check_method(self, name: str, method: StudyMethod) -> None:
        """Nothing, where `mole compose` would take it. Raises: UsageError that says which column is wrong."""
        if method.experts and self.experts.loras:
            what = "the LoRAs of this study are ready ones, and it trains none"
            raise UsageError(f"methods.{name}.experts", what, "Leave it out, or leave experts.loras out.")
        for section, model in _SECTIONS.items():
            try:
                model.model_validate(getattr(method, section))
            except ValidationError as error:
                found = error.errors()[0]
                key = ".".join(str(part) for part in found["loc"])
                where = f"methods.{name}.{section}.{key}"
                remedy = suggestion(key, tuple(model.model_fields)) if found["type"] == "extra_forbidden" else ""
                raise UsageError(where, found["msg"].lower(), remedy) from None


def _with_mode(name: str, method: Any) -> Any:
    return {"mode": name, **(method or {})} if method is None or isinstance(method, dict) else method


def _with_folders(tree: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """fit, experts and test with the folder of their suites' files, where they name none."""
    holders = {name: tree.get(name, {}) for name in ("experts", "test")}
    data = {name: holder.get("data", {}) for name, holder in holders.items() if isinstance(holder, Mapping)}
    data["fit"] = tree.get("fit", {})
    named = [str(one.get("suite", "")) for one in data.values() if isinstance(one, Mapping)]
    several = len({part for suite in named for part in suite.split("+") if part}) > 1
    placed = {name: _with_folder(one, folder, several) for name, one in data.items()}
    return {name: one if name == "fit" else {**holders[name], "data": one} for name, one in placed.items()}


def _with_folder(data: Any, folder: str, several: bool) -> Any:
    """`data` with its folder: inside `folder` that of its suite, where several suites are in use."""
    if not isinstance(data, Mapping):
        return data
    suite = str(data.get("suite") or "+")
    return {"data_dir": folder if "+" in suite or not several else f"{folder}/{suite}", **data}
