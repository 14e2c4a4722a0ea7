"""The sections of a recipe. A field holds its default and its help text; nothing else repeats them.

Contents: BaseConfig, LoraConfig, DataConfig, SceneConfig, GateConfig, TrainConfig, LoraTrainConfig, AdapterConfig,
ClipConfig, EvalConfig, CalibrationConfig.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from molecli.catalog.builtin import BUILTIN_BASE
from molecli.catalog.methods import METHODS
from molecli.catalog.suites import DEFAULT as DEFAULT_SUITE
from molecli.catalog.suites import OWN_TEXTS, SUITES, takers
from molecli.config.shorthand import as_base, as_names, as_paths
from molecli.errors import UsageError, suggestion

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


def known_suite(name: str) -> str:
    """`name`, if every part of it between `+` is a suite. Raises: an error that names the nearest."""
    for part in name.split("+"):
        if part not in SUITES:
            remedy = suggestion(part, SUITES)
            raise PydanticCustomError("unknown_name", "names no suite {name}", {"name": repr(part), "remedy": remedy})
    return name


SuiteName = Annotated[str, AfterValidator(known_suite)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]


class Section(BaseModel):
    """A frozen part of a recipe in which an unknown key is an error."""

    # Validators are built at first use, not at import: `mole --help` needs only the fields.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class BaseConfig(Section):
    """The frozen base model. In YAML a plain string is its `id`."""

    id: str = Field(default=BUILTIN_BASE, min_length=1, description="builtin:NAME, a folder or a hub id")
    gguf_file: str | None = Field(default=None, description="name of a GGUF file inside that folder or repository")
    dtype: Dtype = Field(
        default="auto", description="type of the base's weights; auto: bfloat16 on a GPU that has it, else float32"
    )
    chat_template: bool = Field(
        default=True, description="format prompts with the tokenizer's chat template, if it has one"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return as_base(value)


class LoraConfig(Section):
    """One trained LoRA. In YAML also "name=PATH@WEIGHT"."""

    name: str = Field(min_length=1, description="name in tables, --mask and --only")
    source: str = Field(min_length=1, description="built-in name, folder, .safetensors file or hub id")
    weight: float = Field(default=1.0, allow_inf_nan=False, description="its coefficient in the static modes")


class DataConfig(Section):
    """Where examples come from."""

    suite: SuiteName = Field(
        default=DEFAULT_SUITE, description=f"task suite, several joined by +, or {OWN_TEXTS} for your own files"
    )
    data_dir: str | None = Field(default=None, description="folder that holds the suite's files; without it, the hub")
    files: Annotated[dict[str, str] | None, BeforeValidator(as_paths)] = Field(
        default=None, description="jsonl: task -> file, or a list of files (the stem names the task)"
    )
    tasks: Names | None = Field(default=None, description="tasks of the suite; all when not given")
    limit: int | None = Field(default=None, ge=1, description="at most so many examples per task")
    split: Literal["train", "test"] = Field(default="train", description="split to read")
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0, description="fraction of the split kept out of training")
    part: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]*/[1-9][0-9]*$",
        description="only a part of what is left, as 2/4: the second of four that share no example",
    )


class SceneConfig(Section):
    """LoRAs to compose in one picture. In a recipe also a plain list of names."""

    loras: Names = Field(min_length=1, description="the LoRAs, by name")
    prompt: str | None = Field(default=None, min_length=1, description="what to draw; the suite's own when not given")
    task: str | None = Field(default=None, min_length=1, description="row of the results; the LoRAs' names by default")

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, value: Any) -> Any:
        return {"loras": value} if isinstance(value, (str, list, tuple)) else value


class EvalDataConfig(DataConfig):
    """Where examples to score come from: the test split."""

    split: Literal["train", "test"] = Field(default="test", description="split to read")
    holdout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="score only this fraction, the part that training with it left out"
    )
    scenes: tuple[SceneConfig, ...] = Field(
        default=(), description=f"{takers('scenes', 'scenes')}: compositions to draw"
    )


class GateConfig(Section):
    """The gates of the modes that learn them."""

    granularity: Literal["network", "block", "layer", "matrix"] = Field(
        default="layer", description="matrices that share a gate"
    )
    input: Literal["experts", "hidden", "none"] = Field(
        default="hidden",
        description="what a gate sees: the experts' outputs, the site's input, or nothing (static weights)",
    )
    pool: Literal["auto", "mean", "running", "prompt", "token"] = Field(
        default="auto", description="reduction over positions; auto chooses by the kind of model"
    )
    head: Literal["full", "per_expert", "low_rank"] = Field(default="full", description="shape of the gate's weight")
    head_rank: int = Field(default=8, ge=1, description="rank of the low_rank head")
    init_std: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="spread of a fresh gate's weights, drawn by the seed; 0 starts all experts alike",
    )
    normalize: Literal["standardize", "unit", "none"] = Field(default="standardize", description="of the gate's input")
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="(initial) softmax temperature")
    learn_temperature: bool = Field(default=True, description="learn the temperature, one per gate")
    top_k: int | None = Field(default=None, ge=1, description="keep the k largest gates and rescale them")
    absent: Literal["zero", "renormalize"] = Field(
        default="zero", description="an expert without the matrix contributes zero, or its gate is shared out"
    )


def _own_rates() -> str:
    """What the help says of the methods that have a rate of their own."""
    return "".join(f"; mode {name}: {row.lr:g} when not given" for name, row in METHODS.items() if row.lr is not None)


class TrainConfig(Section):
    """One training run of the gates."""

    steps: int = Field(default=300, ge=1, description="optimiser steps")
    batch_size: int = Field(default=16, ge=1, description="examples per step, over all processes")
    micro_batch_size: int | None = Field(default=None, ge=1, description="examples at once; fewer need less memory")
    lr: float = Field(default=2e-2, gt=0.0, allow_inf_nan=False, description=f"peak learning rate{_own_rates()}")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="of the learning rate")
    warmup_steps: int = Field(default=20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False, description="AdamW's")
    grad_clip: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="largest gradient norm; 0 clips nothing"
    )
    balance: float = Field(default=0.01, ge=0.0, allow_inf_nan=False, description="weight of the balance loss (Eq. 14)")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between readings of the losses")


class LoraTrainConfig(TrainConfig):
    """One training run of a LoRA: there are no gates to balance."""

    lr: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False, description="peak learning rate")
    balance: float = Field(default=0.0, ge=0.0, le=0.0, description="only gates are balanced: 0")


class AdapterConfig(Section):
    """What `train-lora` trains: a LoRA, or shifts of the singular values."""

    method: Literal["lora", "svdiff"] = Field(
        default="lora",
        description="a LoRA, or shifts of the base's singular values (SVDiff), which have neither rank nor alpha",
    )
    rank: int = Field(default=8, ge=1, description="rank r")
    alpha: float = Field(default=16, gt=0.0, allow_inf_nan=False, description="alpha; the update is scaled by alpha/r")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input")
    targets: str | tuple[str, ...] = Field(
        default="all-linear",
        description="all-linear, a list of module names, or a regex; of a diffusion base also attention, conv",
    )
    rslora: bool = Field(default=False, description="scale by alpha/sqrt(r) (rsLoRA)")

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        for key in ("dropout", "rslora"):
            if self.method != "lora" and getattr(self, key):
                what = f"it is a setting of LoRAs, and the method is {self.method}"
                raise UsageError(f"adapter.{key}", what, "Leave it out.")
        return self


class ClipConfig(Section):
    """The CLIP that scores or guides; its weights through open_clip."""

    model: str | None = Field(
        default=None, description="open_clip name, builtin:NAME, hf-hub:ID or a folder; the default fits the base"
    )
    pretrained: str | None = Field(default=None, description="open_clip tag or a local file")


class EvalConfig(Section):
    """How completions are scored."""

    data: EvalDataConfig = Field(default_factory=EvalDataConfig, description="examples, or scenes, to score")
    metrics: Names | None = Field(default=None, description="metrics; the suite's own when not given")
    batch_size: int = Field(default=32, ge=1, description="prompts, or pictures, at once")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="longest completion; the suite's own when not given"
    )
    baselines: bool = Field(
        default=True, description="score the base, each LoRA alone and the static mixtures beside it"
    )
    images: int = Field(default=4, ge=1, description="images: pictures per scene or prompt, each of its own seed")
    clip: ClipConfig = Field(default_factory=ClipConfig, description="images: the CLIP of the alignment metrics")
    bootstrap: int = Field(default=1000, ge=0, description="resamples of the paired bootstrap; 0 for no intervals")


def as_files(value: Any) -> Any:
    """`a.jsonl,b.jsonl` or a list as {stem: file}."""
    return as_paths(as_names(value))


class CalibrationConfig(Section):
    """The inputs that the gates of a composition are averaged over, and that its export is compared to it on."""

    examples: Annotated[dict[str, str] | None, BeforeValidator(as_files)] = Field(
        default=None,
        description="JSONL files of inputs and targets; what the composition was trained on when not given",
    )
    data_dir: str | None = Field(
        default=None, description="folder of the suite that it was trained on; the composition's own when not given"
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="images: prompts to draw; the pictures of the LoRAs' concepts when not given"
    )
    limit: int = Field(default=64, ge=1, description="at most so many examples of a task, or pictures of a concept")
    batch_size: int = Field(default=16, ge=1, description="examples, or pictures, at once")
