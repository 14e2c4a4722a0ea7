"""One recipe model per command: the keys of its YAML.

Contents: TrainLoraRecipe, ComposeRecipe, SampleRecipe, EvaluateRecipe, InspectGatesRecipe, ExportRecipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from molecli.catalog.builtin import BUILTIN_IMAGE_BASE, BUILTIN_PREFIX, DEFAULT_STRENGTH, builtin_loras
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
    # The names in the catalogue, including those that installed packages add.
    Mode = Literal[(*names(METHODS.values()),)]
    FixedMode = Literal[(BASE, ALONE, *(name for name in FIXED if name != ALONE))]
Modes = Annotated[tuple[FixedMode, ...], BeforeValidator(as_names)]
Loras = Annotated[tuple[LoraConfig, ...], BeforeValidator(as_loras)]
Choices = Annotated[tuple[str, ...] | tuple[tuple[str, ...], ...], BeforeValidator(as_choices)]


def _listed(
    *, trained: bool | None = None, steps: bool = False, family: str | None = None, but: str | None = None
) -> str:
    """The methods of a kind, for help texts: with `steps` those on denoising steps (images), otherwise the others."""
    rows = (row for row in METHODS.values() if (row.family == "outputs") == steps and row.name != but)
    rows = (row for row in rows if trained in (None, row.trained) and family in (None, row.family))
    return ", ".join(row.name + _called(row.name) for row in rows)


def _called(name: str) -> str:
    other = [alias for alias, meant in ALIASES.items() if meant == name]
    return f" (also called {', '.join(other)})" if other else ""


_SEED = "seed of all random choices"
_DEVICE = "device that the model runs on"
_METHOD = "settings of the methods"
_MASK = "names of the LoRAs to switch off"
_IMAGE = "images: settings of the denoising"
_CONCEPTS = "images: what each LoRA adds; by default read from the concept.json next to the LoRA"
_ONLY = "names of the LoRAs to keep; all others are switched off"


class TrainLoraRecipe(Section):
    """`mole train-lora`: one LoRA on one base."""

    command: Literal["train-lora"] = "train-lora"
    base: BaseConfig = Field(default_factory=BaseConfig, description="the frozen base")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="type and size of the adapter")
    data: DataConfig = Field(default_factory=DataConfig, description="language models: examples to train on")
    pictures: PicturesConfig | None = Field(default=None, description="images: the pictures to train on")
    train: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="training of the adapter")
    output: str = Field(default="runs/train-lora", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)


class ComposeRecipe(Section):
    """`mole compose`: combines trained LoRAs into one composition."""

    command: Literal["compose"] = "compose"
    preset: Preset | None = Field(default=None, description="named set of values; explicit ones override it")
    base: BaseConfig = Field(default_factory=BaseConfig, description="the frozen base")
    loras: Loras = Field(default=(), description="the LoRAs, in order; by default, on a built-in base, its own LoRAs")
    mode: Mode = Field(
        default=DEFAULT,
        description=f"learned: {_listed(trained=True)}; fixed: {_listed(trained=False)}; images: also "
        f"{_listed(trained=False, steps=True)}",
    )
    method: MethodConfig = Field(default_factory=MethodConfig, description=_METHOD)
    gate: GateConfig = Field(default_factory=GateConfig, description=f"gates of the modes {_listed(family='gates')}")
    data: DataConfig = Field(default_factory=DataConfig, description="language models: examples to learn from")
    concepts: dict[str, ConceptConfig] = Field(default_factory=dict, description=_CONCEPTS)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="images: the loss of the gates")
    image: ImageConfig = Field(default_factory=ImageConfig, description=_IMAGE)
    train: TrainConfig = Field(default_factory=TrainConfig, description="training of the gates")
    preview: Modes = Field(
        default=(SUM,),
        description="images: modes to draw next to the finished composition in preview/sheet.png, each concept alone "
        "and all together; [] draws nothing",
    )
    evaluate: EvalConfig | None = Field(
        default_factory=EvalConfig, description="language models: scoring on the test split of `data`; null: none"
    )
    allow_partial: bool = Field(
        default=False, description="leave out matrices that the base lacks, if they are a minor part of a LoRA"
    )
    only: Names = Field(default=(), description=f"mode {ALONE}: name of the LoRA")
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
    """`mole sample`: completes or draws prompts."""

    command: Literal["sample"] = "sample"
    composition: str | None = Field(default=None, description="composition: a folder or a .safetensors file")
    base: BaseConfig | None = Field(default=None, description="the base; by default that of the composition")
    loras: Loras = Field(default=(), description="the LoRAs; by default those of the composition")
    modes: Modes = Field(
        default=(), description="images: fixed modes to draw next to the composition, each a column of the sheet"
    )
    prompts: tuple[str, ...] = Field(default=(), description="prompts; by default the lines of stdin")
    images: int = Field(default=1, ge=1, description="images: pictures per prompt; seeds count up from --seed")
    init_image: str | None = Field(
        default=None, description="images: a picture to begin with, or a folder of them: each prompt is drawn from each"
    )
    mask_image: str | None = Field(
        default=None,
        description="images: a mask for --init-image, or a folder of masks with the pictures' names; only what is "
        "white is drawn anew",
    )
    strength: float = Field(
        default=DEFAULT_STRENGTH,
        gt=0.0,
        le=1.0,
        description="images: share of the denoising steps that are run from --init-image",
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description=_IMAGE)
    method: MethodConfig = Field(default_factory=MethodConfig, description=_METHOD)
    concepts: dict[str, ConceptConfig] = Field(default_factory=dict, description=_CONCEPTS)
    max_new_tokens: int = Field(default=64, ge=1, description="language models: completion length in tokens")
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False, description="language models: 0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="language models: p of nucleus sampling")
    mask: Names = Field(default=(), description=_MASK)
    only: Names = Field(default=(), description=_ONLY)
    output: str | None = Field(
        default=None, description="folder to write; by default text goes to stdout and pictures to runs/sample-TIME"
    )
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)
    batch_size: int = Field(default=16, ge=1, description="prompts in one batch")

    @model_validator(mode="after")
    def _check(self) -> SampleRecipe:
        _check_loras(self.loras)
        return self


class EvaluateRecipe(Section):
    """`mole evaluate`: scores one or more compositions; the base is loaded once."""

    command: Literal["evaluate"] = "evaluate"
    compositions: tuple[str, ...] = Field(default=(), description="compositions: folders or .safetensors files")
    base: BaseConfig | None = Field(default=None, description="the base; by default that of the compositions")
    loras: Loras = Field(default=(), description="the LoRAs; by default those of the compositions")
    modes: Modes = Field(
        default=(),
        description=f"fixed modes to score next to the compositions: {BASE}, {ALONE} (each LoRA alone), "
        f"{_listed(trained=False, but=ALONE)}; images: also {_listed(trained=False, steps=True)}",
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description=_IMAGE)
    method: MethodConfig = Field(default_factory=MethodConfig, description=_METHOD)
    concepts: dict[str, ConceptConfig] = Field(default_factory=dict, description=_CONCEPTS)
    judge: JudgeConfig | None = Field(default=None, description="images: a vision-language judge of pairs of pictures")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="data and metrics")
    mask: Choices = Field(default=(), description=_MASK)
    only: Choices = Field(default=(), description=_ONLY)
    output: str = Field(default="runs/evaluate", min_length=1, description="folder to write")
    seed: int = Field(default=0, ge=0, description=_SEED)
    device: Device = Field(default="auto", description=_DEVICE)

    @property
    def switched(self) -> tuple[Switched, ...]:
        """The choices of LoRAs that are on; each of several choices is a column of every mixture."""
        return choices(self.mask, self.only)

    @model_validator(mode="after")
    def _check(self) -> EvaluateRecipe:
        _check_loras(self.loras)
        return self


class InspectDataConfig(EvalDataConfig):
    """The examples on which the gates are inspected."""

    limit: int | None = Field(default=64, ge=1, description="maximum number of examples per task")


class InspectGatesRecipe(Section):
    """`mole inspect-gates`: shows what the gates of one composition do."""

    command: Literal["inspect-gates"] = "inspect-gates"
    composition: str | None = Field(default=None, description="composition: a folder or a .safetensors file")
    base: BaseConfig | None = Field(default=None, description="the base; by default that of the composition")
    loras: Loras = Field(default=(), description="the LoRAs; by default those of the composition")
    data: InspectDataConfig = Field(default_factory=InspectDataConfig, description="language models: the examples")
    prompts: tuple[str, ...] = Field(
        default=(), description="images: prompts to draw; by default the prompts of the concepts"
    )
    images: int = Field(default=1, ge=1, description="images: pictures per prompt, each with its own seed")
    image: ImageConfig = Field(default_factory=ImageConfig, description=_IMAGE)
    batch_size: int = Field(default=32, ge=1, description="examples or pictures in one batch")
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
    """`mole export`: writes a composition as one adapter for other programs."""

    command: Literal["export"] = "export"
    composition: str | None = Field(default=None, description="composition: a folder or a .safetensors file")
    base: BaseConfig | None = Field(default=None, description="the base; by default that of the composition")
    loras: Loras = Field(default=(), description="the LoRAs; by default those of the composition")
    format: Literal["auto", "peft", "diffusers", "kohya"] = Field(
        default="auto",
        description="format of the adapter; kohya is for A1111 and ComfyUI; auto: peft, and diffusers for images",
    )
    rank: Annotated[int | None, BeforeValidator(lambda value: None if value == "exact" else value)] = Field(
        default=None, ge=1, description="maximum rank at each matrix; exact (null) truncates nothing"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="number type of the adapter's weights"
    )
    calibration: CalibrationConfig = Field(
        default_factory=CalibrationConfig, description="inputs to average gates over and to compare the export on"
    )
    image: ImageConfig = Field(default_factory=ImageConfig, description=_IMAGE)
    concepts: dict[str, ConceptConfig] = Field(
        default_factory=dict, description="images: what each LoRA adds; by default as stored in the composition"
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
    """The tree with the built-in LoRAs added, if the base is built in and no LoRA is named."""
    base = tree.get("base")
    base_id = base.get("id", BUILTIN_PREFIX) if isinstance(base, Mapping) else getattr(base, "id", base)
    if tree.get("loras") or not str(base_id or BUILTIN_PREFIX).startswith(BUILTIN_PREFIX):
        return tree
    image = base_id == BUILTIN_IMAGE_BASE
    return {**tree, "loras": list(builtin_loras(BUILTIN_IMAGE_BASE) if image else builtin_loras())}


def _with_rate(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with the learning rate of its mode, if the mode has its own and the tree names none."""
    row, train = METHODS.get(tree.get("mode", DEFAULT)), tree.get("train", {})
    if row is None or row.lr is None or not isinstance(train, Mapping) or "lr" in train:
        return tree
    return {**tree, "train": {**train, "lr": row.lr}}


def _with_evaluation(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with the data to score added: by default the test split of the training data."""
    data, evaluation = tree.get("data", {}), tree.get("evaluate", {})
    if isinstance(data, DataConfig):
        data = data.model_dump()
    if not isinstance(data, Mapping) or not isinstance(evaluation, Mapping):
        return tree
    scored = evaluation.get("data", {})
    if not isinstance(scored, Mapping) or "suite" in scored:
        return tree
    if OWN_TEXTS in str(data.get("suite")).split("+") and "files" not in scored:
        # A user's file has no test split, and scores on the training examples would be too high.
        if "evaluate" not in tree:
            return {**tree, "evaluate": None}
        what = f"suite {OWN_TEXTS} has no test split, and no file to score is named"
        raise UsageError("evaluate.data.files", what, "Name one, or write evaluate: null.")
    inherited = {key: value for key, value in data.items() if key not in ("split", "holdout", "limit", "part")}
    return {**tree, "evaluate": {**evaluation, "data": {**inherited, **scored}}}
