"""The recipe of a study: LoRAs are trained on tasks, composed by several methods, and all are scored."""

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
    """The LoRAs of a study: trained first, or given."""

    loras: Annotated[Loras, BeforeValidator(as_loras)] = Field(default=(), description="given LoRAs; trains none")
    data: DataConfig = Field(default_factory=DataConfig, description="language models: tasks, one LoRA for each")
    together: dict[str, Names] = Field(
        default_factory=dict, description="instead of one LoRA per task: name of a LoRA -> several tasks to train it on"
    )
    pictures: dict[str, PicturesConfig] = Field(
        default_factory=dict, description="images: name of a LoRA -> its training pictures, in folders of data_dir"
    )
    copies: int = Field(
        default=1, ge=1, description="number of LoRAs per task, trained on disjoint parts of the training data"
    )
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="type and size of the adapters")
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="training of the adapters")


class StudyMethod(Section):
    """One column of a study: the settings of its `mole compose`, without LoRAs and data."""

    mode: Mode | Literal["base"] = Field(default=DEFAULT, description="the composition method; base: the bare base")
    preset: Preset | None = Field(default=None, description="as in mole compose")
    gate: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    method: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    train: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    objective: dict[str, Any] = Field(default_factory=dict, description="images: as in mole compose")
    experts: dict[str, Any] = Field(
        default_factory=dict,
        description="adapter and train, if the method composes adapters of another kind than those in `experts`",
    )
    tune: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="values to choose from, for keys such as method.scale, gate.temperature, train.lr; scored on the "
        "held-out examples of `fit`, or with per_task (fixed methods only) on each task's examples",
    )
    seeds: tuple[int, ...] = Field(default=(), description="seeds of this column, if they differ from the study's")
    numbers: tuple[int, ...] = Field(default=(), description="those of the study's numbers to use; by default all")

    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of the values in `tune`: key -> value; [] if nothing is to be chosen."""
        return [dict(zip(self.tune, values, strict=True)) for values in product(*self.tune.values())] * bool(self.tune)

    def at(self, settings: Mapping[str, Any]) -> StudyMethod:
        """The method with these settings and without `tune`."""
        changed: dict[str, Any] = {"tune": {}}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            changed[section] = {**changed.get(section, getattr(self, section)), name: value}
        return self.model_copy(update=changed)

    @property
    def settings(self) -> list[str]:
        """The keys of `method` that are set or tuned."""
        tuned = [key.partition(".") for key in self.tune]
        return [*self.method, *(name for section, _, name in tuned if section == "method")]

    @property
    def fixed(self) -> bool:
        """Whether the method is independent of the seed and the data."""
        return self.mode == BASE or not get_method(self.mode).trained


class _OwnExperts(Section):
    """The settings in which a method's own adapters may differ."""

    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig)


_TUNED = ("method", "gate", "train")  # sections whose settings can be tuned
_SECTIONS: dict[str, type[Section]] = {
    "gate": GateConfig,
    "method": MethodConfig,
    "train": TrainConfig,
    "objective": ObjectiveConfig,
    "experts": _OwnExperts,
}


class StudyRecipe(Section):
    """`mole study`: compares methods on the same LoRAs, data and metrics."""

    command: Literal["study"] = "study"
    title: str = Field(default="", description="title of the report")
    base: BaseConfig = Field(default_factory=BaseConfig, description="the frozen base")
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig, description="the LoRAs")
    numbers: tuple[int, ...] = Field(
        default=(), description="language models: numbers of LoRAs to compose, each separately; by default all at once"
    )
    methods: dict[str, StudyMethod] = Field(
        default_factory=dict, description="columns: name -> mode, gate, method and train, as in mole compose"
    )
    subject: str = Field(
        default="", description="column to compare every other column with; by default the best one of each row"
    )
    data_dir: str | None = Field(
        default=None,
        description="folder of the suite's files, for sections that name none; with several suites it has a subfolder "
        "for each; images: the folder of experts.pictures",
    )
    fit: DataConfig = Field(default_factory=DataConfig, description="language models: examples to learn from")
    per_task: bool = Field(default=False, description="language models: learn on each task of `test` separately")
    leave_out: bool = Field(default=False, description="with per_task: leave out the LoRAs trained on the task")
    test: EvalConfig = Field(default_factory=EvalConfig, description="data and metrics of the scores")
    groups: dict[str, Names] = Field(
        default_factory=dict, description="language models: additional tables for groups of tasks: name -> tasks"
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="images: settings of the denoising")
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict, description="images: what given LoRAs add; by default read from their concept.json"
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="seeds of the learned methods")
    wider: int = Field(
        default=2, ge=0, description="how often `tune` is extended where the chosen value is at its edge"
    )
    own: bool = Field(default=True, description="language models: also score each LoRA alone on its own task")
    gates: bool = Field(default=False, description="also report gate weights by site, and their entropy in training")
    published: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="published scores to show next to the results: row -> column -> value; a row is a task, average "
        "or a number of LoRAs, followed by the metric if several are scored",
    )
    source: str = Field(default="", description="source of the published scores")
    output: str = Field(default="runs/study", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description="seed of the LoRAs' training")
    device: Device = Field(default="auto", description="device that the models run on")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        """The tree with the modes of the methods, by default their names, and the data_dir of each section."""
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
        """(number of LoRAs, method) of each column; the number is None if `numbers` is empty."""
        numbers = self.numbers or (None,)
        return [(n, name) for n in numbers for name, own in self.methods.items() if not own.numbers or n in own.numbers]

    @property
    def draws(self) -> bool:
        """Whether the base is a diffusion pipeline; follows from the data to learn or score."""
        suite = SUITES.get(self.test.data.suite)  # None for joined suites, which hold texts
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
                what = "it is for language models, and this study is about pictures"
                raise UsageError(
                    key,
                    what,
                    "Leave it out: the scenes name the LoRAs to compose, and gates learn from their pictures.",
                )
        for name, method in self.methods.items():
            if method.tune:
                self._check_tuned(name, method)
            if method.mode != BASE:
                for one in (method, *map(method.at, method.combinations())):
                    self._check_method(name, one)
        return self

    def _check_columns(self) -> None:
        """Checks names and numbers of the columns, and the subject. Raises: UsageError."""
        for name, method in self.methods.items():
            if not _NAME.fullmatch(name):
                raise UsageError(
                    "methods", f"{name!r} is not a valid name of a column", "Write a name without slashes and dots."
                )
            if strange := [number for number in method.numbers if number not in self.numbers]:
                what = f"{strange[0]} is not among the study's `numbers` of LoRAs"
                raise UsageError(f"methods.{name}.numbers", what, "Write one of those in `numbers`, or add it there.")
        # For a language model all columns of mode base are one; for pictures each stays its own column.
        columns = [name if self.draws or one.mode != BASE else BASE for name, one in self.methods.items()]
        if self.subject and self.subject not in columns:
            raise UsageError("subject", f"no column is called {self.subject!r}", suggestion(self.subject, columns))

    def _check_left_out(self) -> None:
        """Checks that every task has its own composition. Raises: UsageError that says why not."""
        if not self.per_task or self.numbers:
            what = "it needs one composition per task, and this study composes once for all tasks"
            raise UsageError("leave_out", what, "Write per_task: true, and no numbers.")
        for name, method in self.methods.items():
            if method.tune:
                what = "settings are tuned with the same LoRAs on every task, and leave_out changes the LoRAs"
                raise UsageError(f"methods.{name}.tune", what, "Leave it out, and write the settings.")

    def _check_tuned(self, name: str, method: StudyMethod) -> None:
        """Checks that the settings can be tuned. Raises: UsageError that says why not."""
        where = f"methods.{name}.tune"
        for key, values in method.tune.items():
            if key.partition(".")[0] not in _TUNED or not key.partition(".")[2]:
                raise UsageError(where, f"{key!r} is not a setting", "Write method.scale, gate.temperature, train.lr.")
            if not values:
                raise UsageError(where, f"no values of {key} are listed", "Write for example [0.5, 1].")
        if self.draws or method.mode == BASE:
            what = "only compositions on language models can be tuned, and this is not one"
            raise UsageError(where, what, "Leave it out, and write the settings.")
        if self.per_task:
            if not method.fixed:
                what = "with per_task this method learns from each task's examples, so that none are left to tune on"
                raise UsageError(where, what, "Leave it out, and write the settings.")
        elif self.fit.holdout == 0:
            what = "settings are tuned on held-out examples, and none are held out"
            raise UsageError(where, what, "Write fit.holdout: 0.1.")

    def _check_method(self, name: str, method: StudyMethod) -> None:
        """Checks that `mole compose` would accept the method. Raises: UsageError that names the column."""
        if method.experts and self.experts.loras:
            what = "the LoRAs of this study are given in experts.loras, and it trains none"
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
    """fit, experts and test, each with its data_dir (by default from `folder`)."""
    holders = {name: tree.get(name, {}) for name in ("experts", "test")}
    data = {name: holder.get("data", {}) for name, holder in holders.items() if isinstance(holder, Mapping)}
    data["fit"] = tree.get("fit", {})
    named = [str(one.get("suite", "")) for one in data.values() if isinstance(one, Mapping)]
    several = len({part for suite in named for part in suite.split("+") if part}) > 1
    placed = {name: _with_folder(one, folder, several) for name, one in data.items()}
    return {name: one if name == "fit" else {**holders[name], "data": one} for name, one in placed.items()}


def _with_folder(data: Any, folder: str, several: bool) -> Any:
    """`data` with its data_dir: `folder`, or if `several` suites are used the suite's subfolder."""
    if not isinstance(data, Mapping):
        return data
    suite = str(data.get("suite") or "+")
    return {"data_dir": folder if "+" in suite or not several else f"{folder}/{suite}", **data}
