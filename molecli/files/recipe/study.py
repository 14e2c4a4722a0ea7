"""The recipe of a study: LoRAs trained on tasks, composed by every method, scored side by side."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from molecli.errors import UsageError
from molecli.files.lora_spec import check_distinct
from molecli.files.near import suggestion
from molecli.files.recipe.commands import Loras, Mode
from molecli.files.recipe.method import MethodConfig
from molecli.files.recipe.parts import (
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
from molecli.files.recipe.shorthand import as_loras

_NAME = re.compile(r"[^/\\.\x00]+")
_LEARNED = ("gated", "soup", "lorahub", "xlora")


class ExpertsConfig(Section):
    """The LoRAs of a study, trained first; or ready ones."""

    loras: Annotated[Loras, BeforeValidator(as_loras)] = Field(default=(), description="ready LoRAs; none are trained")
    data: DataConfig = Field(default_factory=DataConfig, description="tasks to train on, a LoRA for each")
    together: dict[str, Names] = Field(
        default_factory=dict, description="LoRAs of several tasks: name -> tasks; instead of one for each"
    )
    copies: int = Field(default=1, ge=1, description="LoRAs of each task, from disjoint parts of its training data")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="their shape")
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="their training")


class StudyMethod(Section):
    """One column of a study: what `mole compose` is told beside LoRAs and data."""

    mode: Mode | Literal["base"] = Field(default="gated", description="the composition method, or base for none")
    preset: Literal["paper"] | None = Field(default=None, description="as in mole compose")
    gate: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    method: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")
    train: dict[str, Any] = Field(default_factory=dict, description="as in mole compose")

    @property
    def fixed(self) -> bool:
        """Whether nothing of it depends on the seed or the data."""
        return self.mode not in _LEARNED


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
    data_dir: str | None = Field(default=None, description="folder of the suites' files, where a section names none")
    fit: DataConfig = Field(default_factory=DataConfig, description="what the learned methods learn from")
    per_task: bool = Field(
        default=False, description="learn on each task of `test` by itself, as LoRAHub does, instead of on all together"
    )
    test: EvalConfig = Field(default_factory=EvalConfig, description="what is scored")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="of the learned methods")
    own: bool = Field(default=True, description="score each LoRA on its own task too")
    published: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="figures of a paper, shown beside: row -> column -> value"
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
            tree["fit"] = _with_folder(tree.get("fit", {}), tree["data_dir"])
            for key in ("experts", "test"):
                section = tree.get(key, {})
                if isinstance(section, dict):
                    tree[key] = {**section, "data": _with_folder(section.get("data", {}), tree["data_dir"])}
        return tree

    @model_validator(mode="after")
    def _check(self) -> StudyRecipe:
        if not self.methods:
            raise UsageError("methods", "a study compares methods, and none is named", "Write methods: {linear: {}}.")
        for name in self.methods:
            if not _NAME.fullmatch(name):
                raise UsageError("methods", f"{name!r} is no name for a column", "Leave slashes and points out.")
        check_distinct([lora.name for lora in self.experts.loras])
        for name, method in self.methods.items():
            if method.mode != "base":
                self._check_method(name, method)
        return self

    def _check_method(self, name: str, method: StudyMethod) -> None:
        """Nothing, where `mole compose` would take it. Raises: UsageError that says which column is wrong."""
        for section, model in (("gate", GateConfig), ("method", MethodConfig), ("train", TrainConfig)):
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


def _with_folder(data: Any, folder: str) -> Any:
    return {"data_dir": folder, **data} if isinstance(data, dict) else data
