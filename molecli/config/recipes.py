"""One recipe model per command: what its YAML may hold.

Contents: TrainLoraRecipe, ComposeRecipe, SampleRecipe, EvaluateRecipe, InspectGatesRecipe, ExportRecipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from molecli.catalog.builtin import BUILTIN_IMAGE_BASE, BUILTIN_PREFIX, builtin_loras
from molecli.catalog.methods import ALIASES, ALONE, BASE, DEFAULT, FIXED, METHODS, SUM, names
from molecli.catalog.suites import OWN_TEXTS
from molecli.config.defaults import Preset
from molecli.config.images import ConceptConfig, ImageConfig, ObjectiveConfig, PicturesConfig
from molecli.config.judge import JudgeConfig
from molecli.config.method import MethodConfig
from molecli.config.sections import (
    AdapterConfig,
    BaseConfig,
    CalibrationConfig,
    DataConfig,
    Device,
    EvalConfig,
    EvalDataConfig,
    GateConfig,
    LoraConfig,
    LoraTrainConfig,
    Names,
    Section,
    TrainConfig,
)
from molecli.config.shorthand import Switched, as_choices, as_loras, as_names, choices
from molecli.errors import UsageError
from molecli.files.lora_spec import check_distinct, check_name

if TYPE_CHECKING:
    Mode = str
    FixedMode = str
else:
    # A choice of the catalogue's names, what installed packages add included.
    Mode = Literal[(*names(METHODS.values()),)]
    FixedMode = Literal[(BASE, ALONE, *(name for name in FIXED if name != ALONE))]
Modes = Annotated[tuple[FixedMode, ...], BeforeValidator(as_names)]
Loras = Annotated[tuple[LoraConfig, ...], BeforeValidator(as_loras)]
Choices = Annotated[tuple[str, ...] | tuple[tuple[str, ...], ...], BeforeValidator(as_choices)]


def _listed(
    *, trained: bool | None = None, steps: bool = False, family: str | None = None, but: str | None = None
) -> str:
    """The methods of a kind, as help names them: those on denoising steps (images) with `steps`, the others without."""
    rows = (row for row in METHODS.values() if (row.family == "outputs") == steps and row.name != but)
    rows = (row for row in rows if trained in (None, row.trained) and family in (None, row.family))
    return ", ".join(row.name + _called(row.name) for row in rows)


def _called(name: str) -> str:
    other = [alias for alias, meant in ALIASES.items() if meant == name]
    return f" (also called {', '.join(other)})" if other else ""


_SEED = "every random choice follows from it"
_DEVICE = "where the model runs"
_METHOD = "what the fixed methods are told"
_MASK = "experts switched off, by name"
_ONLY = "experts kept, by name; the others are switched off"


class TrainLoraRecipe(Section):
    """`mole train-lora`: one LoRA on one base."""

    command: Literal["train-lora"] = "train-lora"
    base: BaseConfig = Field(default_factory=BaseConfig, description="the frozen base")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="the adapter's kind and shape")
    data: DataConfig = Field(default_factory=DataConfig, description="examples to train on")
    pictures: PicturesConfig | None = Field(default=None, description="a diffusion base: the pictures to learn from")
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="the training run")
    output: str = Field(default="runs/train-lora", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)


class ComposeRecipe(Section):
    """`mole compose`: trained LoRAs into one composition."""

    command: Literal["compose"] = "compose"
    preset: Preset | None = Field(default=None, description="a named set of values below the explicit ones")
    base: BaseConfig = Field(default_factory=BaseConfig, description="the frozen base")
    loras: Loras = Field(default=(), description="the experts, in order; the built-in ones when the base is built in")
    mode: Mode = Field(
        default=DEFAULT,
        description=f"learned: {_listed(trained=True)}; fixed: {_listed(trained=False)}; for images also "
        f"{_listed(trained=False, steps=True)}",
    )
    method: MethodConfig = Field(default_factory=MethodConfig, description=_METHOD)
    gate: GateConfig = Field(default_factory=GateConfig, description=f"the gates of mode {_listed(family='gates')}")
    data: DataConfig = Field(default_factory=DataConfig, description="examples the gates learn from")
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict,
        description="a diffusion base: what each LoRA adds; read beside the LoRA if not given",
    )
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig, description="a diffusion base: what the gates learn from"
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="a diffusion base: how pictures are denoised")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the training run of the gates")
    preview: Modes = Field(
        default=(SUM,),
        description="images: methods drawn beside the finished composition, each concept and all together, on the "
        "sheet in preview/; [] draws nothing",
    )
    evaluate: EvalConfig | None = Field(
        default_factory=EvalConfig, description="scoring after composing: the test split of `data`; null for none"
    )
    allow_partial: bool = Field(default=False, description="accept a LoRA some of whose keys match nothing in the base")
    only: Names = Field(default=(), description=f"mode {ALONE}: the one LoRA")
    output: str = Field(default="runs/compose", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, tree: Any) -> Any:
        return _with_rate(_with_evaluation(_with_loras(tree))) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _check(self) -> ComposeRecipe:
        if not self.loras:
            raise UsageError("loras", f"no LoRA is named for the base {self.base.id}", "Write --loras a=PATH,b=PATH.")
        _check_loras(self.loras)
        if self.mode == ALONE and len(self.only) != 1 and len(self.loras) > 1:
            names = ", ".join(lora.name for lora in self.loras)
            raise UsageError("only", f"mode {ALONE} needs exactly one LoRA", f"Write --only NAME, one of: {names}.")
        if self.gate.top_k is not None and self.gate.top_k > len(self.loras):
            raise UsageError("gate.top_k", f"{self.gate.top_k} is more than the {len(self.loras)} LoRAs", "Lower it.")
        return self


class SampleRecipe(Section):
    """`mole sample`: completions of prompts."""

    command: Literal["sample"] = "sample"
    composition: str | None = Field(default=None, description="composition folder or .safetensors")
    base: BaseConfig | None = Field(default=None, description="the base; the composition's own when not given")
    loras: Loras = Field(default=(), description="the experts; the composition's own when not given")
    modes: Modes = Field(
        default=(), description="images: static modes drawn beside the composition, one column each of the sheet"
    )
    prompts: tuple[str, ...] = Field(default=(), description="prompts; without any, lines of stdin")
    images: int = Field(default=1, ge=1, description="pictures per prompt, of seeds counted up from --seed")
    image: ImageConfig = Field(default_factory=ImageConfig, description="a diffusion base: how pictures are denoised")
    method: MethodConfig = Field(default_factory=MethodConfig, description=_METHOD)
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict, description="triggers of the LoRAs, for the methods that ask; read from beside them"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="longest completion")
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus sampling")
    mask: Names = Field(default=(), description=_MASK)
    only: Names = Field(default=(), description=_ONLY)
    output: str | None = Field(
        default=None, description="folder to write; without one, text goes to stdout and pictures to runs/sample-TIME"
    )
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)
    batch_size: int = Field(default=16, ge=1, description="prompts at once")

    @model_validator(mode="after")
    def _check(self) -> SampleRecipe:
        _check_loras(self.loras)
        return self


class EvaluateRecipe(Section):
    """`mole evaluate`: one or many compositions on one load of the base."""

    command: Literal["evaluate"] = "evaluate"
    compositions: tuple[str, ...] = Field(default=(), description="composition folders or .safetensors")
    base: BaseConfig | None = Field(default=None, description="the base; the compositions' own when not given")
    loras: Loras = Field(default=(), description="the experts; the compositions' own when not given")
    modes: Modes = Field(
        default=(),
        description=f"fixed modes scored beside the compositions: {BASE}, {ALONE} (each LoRA alone), "
        f"{_listed(trained=False, but=ALONE)}; for images also {_listed(trained=False, steps=True)}",
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="a diffusion base: how pictures are denoised")
    method: MethodConfig = Field(default_factory=MethodConfig, description=_METHOD)
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict,
        description="a diffusion base: what each LoRA adds; read beside the LoRA if not given",
    )
    judge: JudgeConfig | None = Field(default=None, description="a vision-language judge of pairs of pictures")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="how completions are scored")
    mask: Choices = Field(default=(), description=_MASK)
    only: Choices = Field(default=(), description=_ONLY)
    output: str = Field(default="runs/evaluate", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)

    @property
    def switched(self) -> tuple[Switched, ...]:
        """Which LoRAs are on: one choice, or several, each a column of every mixture."""
        return choices(self.mask, self.only)

    @model_validator(mode="after")
    def _check(self) -> EvaluateRecipe:
        _check_loras(self.loras)
        return self


class InspectDataConfig(EvalDataConfig):
    """Examples to look at the gates on."""

    limit: int | None = Field(default=64, ge=1, description="at most so many examples per task")


class InspectGatesRecipe(Section):
    """`mole inspect-gates`: what the gates of one composition do."""

    command: Literal["inspect-gates"] = "inspect-gates"
    composition: str | None = Field(default=None, description="composition folder or .safetensors")
    base: BaseConfig | None = Field(default=None, description="the base; the composition's own when not given")
    loras: Loras = Field(default=(), description="the experts; the composition's own when not given")
    data: InspectDataConfig = Field(default_factory=InspectDataConfig, description="examples to look at the gates on")
    prompts: tuple[str, ...] = Field(
        default=(), description="a diffusion base: what to draw; the concepts' prompts when not given"
    )
    images: int = Field(default=1, ge=1, description="images: pictures per prompt, each of its own seed")
    image: ImageConfig = Field(default_factory=ImageConfig, description="a diffusion base: how pictures are denoised")
    batch_size: int = Field(default=32, ge=1, description="examples, or pictures, at once")
    mask: Names = Field(default=(), description=_MASK)
    only: Names = Field(default=(), description=_ONLY)
    output: str = Field(default="runs/inspect-gates", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)

    @model_validator(mode="after")
    def _check(self) -> InspectGatesRecipe:
        _check_loras(self.loras)
        return self


class ExportRecipe(Section):
    """`mole export`: a composition as one adapter for other programs."""

    command: Literal["export"] = "export"
    composition: str | None = Field(default=None, description="composition folder or .safetensors")
    base: BaseConfig | None = Field(default=None, description="the base; the composition's own when not given")
    loras: Loras = Field(default=(), description="the experts; the composition's own when not given")
    format: Literal["auto", "peft", "diffusers", "kohya"] = Field(
        default="auto",
        description="peft, diffusers, kohya (A1111, ComfyUI); auto: peft for a language model, diffusers for images",
    )
    rank: Annotated[int | None, BeforeValidator(lambda value: None if value == "exact" else value)] = Field(
        default=None, ge=1, description="largest rank of a matrix; exact (null) keeps the composition's own"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="type of the file's numbers"
    )
    calibration: CalibrationConfig = Field(
        default_factory=CalibrationConfig, description="what gates are averaged over, and the export is measured on"
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description="a diffusion base: how pictures are denoised")
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict,
        description="a diffusion base: what each LoRA adds; as the composition knows it if not given",
    )
    verify: bool = Field(default=False, description="load the export with its own library and compare, in float32")
    mask: Names = Field(default=(), description=_MASK)
    only: Names = Field(default=(), description=_ONLY)
    output: str = Field(default="runs/export", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)

    @model_validator(mode="after")
    def _check(self) -> ExportRecipe:
        _check_loras(self.loras)
        return self


def _check_loras(loras: tuple[LoraConfig, ...]) -> None:
    check_distinct([lora.name for lora in loras])
    for lora in loras:
        check_name(lora.name, f"{lora.name}={lora.source}")


def _with_loras(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with the built-in LoRAs named, where the base is built in and no LoRA is."""
    base = tree.get("base")
    base_id = base.get("id", BUILTIN_PREFIX) if isinstance(base, Mapping) else getattr(base, "id", base)
    if tree.get("loras") or not str(base_id or BUILTIN_PREFIX).startswith(BUILTIN_PREFIX):
        return tree
    image = base_id == BUILTIN_IMAGE_BASE
    return {**tree, "loras": list(builtin_loras(BUILTIN_IMAGE_BASE) if image else builtin_loras())}


def _with_rate(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with the learning rate of its mode, where that has one of its own and the tree names none."""
    row, train = METHODS.get(tree.get("mode", DEFAULT)), tree.get("train", {})
    if row is None or row.lr is None or not isinstance(train, Mapping) or "lr" in train:
        return tree
    return {**tree, "train": {**train, "lr": row.lr}}


def _with_evaluation(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with the data to score written out: the test split of the data to learn from."""
    data, evaluation = tree.get("data", {}), tree.get("evaluate", {})
    if isinstance(data, DataConfig):
        data = data.model_dump()
    if not isinstance(data, Mapping) or not isinstance(evaluation, Mapping):
        return tree
    scored = evaluation.get("data", {})
    if not isinstance(scored, Mapping) or "suite" in scored:
        return tree
    if OWN_TEXTS in str(data.get("suite")).split("+") and "files" not in scored:
        # One's own file has no test split to take: scoring what was trained on would flatter.
        if "evaluate" not in tree:
            return {**tree, "evaluate": None}
        what = f"suite {OWN_TEXTS} has no test split, and no file to score is named"
        raise UsageError("evaluate.data.files", what, "Name one, or write evaluate: null.")
    inherited = {key: value for key, value in data.items() if key not in ("split", "holdout", "limit", "part")}
    return {**tree, "evaluate": {**evaluation, "data": {**inherited, **scored}}}
