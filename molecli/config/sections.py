"""The sections of a recipe. The default and the help text of a key are in its field and nowhere else.

Contents: BaseConfig, LoraConfig, DataConfig, SceneConfig, GateConfig, TrainConfig, LoraTrainConfig, AdapterConfig,
ClipConfig, EvalConfig, CalibrationConfig.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from molecli.catalog.builtin import BUILTIN_BASE
from molecli.catalog.methods import METHODS
from molecli.catalog.metrics import METRICS
from molecli.catalog.suites import DEFAULT as DEFAULT_SUITE
from molecli.catalog.suites import OWN_TEXTS, SUITES, suite_names, takers
from molecli.config.shorthand import as_base, as_names, as_paths, as_template_args
from molecli.errors import UsageError, suggestion

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


def known_suite(name: str) -> str:
    """`name`, if every part of it between `+` is a suite. Raises: an error that suggests the nearest name."""
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

    id: str = Field(default=BUILTIN_BASE, min_length=1, description="base model: builtin:NAME, a folder or a hub id")
    gguf_file: str | None = Field(default=None, description="language models: a GGUF file in that folder or repository")
    dtype: Dtype = Field(
        default="auto", description="type of the base's weights; auto: bfloat16 on GPUs that support it, else float32"
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        default=None,
        description="language models: quantise the base with bitsandbytes while it is loaded (4bit is QLoRA's nf4)",
    )
    chat_template: bool = Field(
        default=True, description="language models: format prompts with the tokenizer's chat template, if it has one"
    )
    template_file: str | None = Field(
        default=None,
        min_length=1,
        description="language models: a chat template instead of the tokenizer's: a .jinja file, or a folder with one, "
        "such as a LoRA's",
    )
    system_prompt: str | None = Field(
        default=None, min_length=1, description="language models: system prompt of the chat template"
    )
    template_args: Annotated[dict[str, Any], BeforeValidator(as_template_args)] = Field(
        default_factory=dict,
        description="language models: variable of the chat template, such as enable_thinking=false",
    )
    source_language: str | None = Field(
        default=None, min_length=1, description="translation models: the tokenizer's code of the prompts' language"
    )
    target_language: str | None = Field(
        default=None, min_length=1, description="translation models: the tokenizer's code of the targets' language"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return as_base(value)


class LoraConfig(Section):
    """One trained LoRA. In YAML also "name=PATH@WEIGHT"."""

    name: str = Field(min_length=1, description="name of the LoRA in tables, --mask and --only")
    source: str = Field(min_length=1, description="built-in name, folder, .safetensors file or hub id")
    weight: float = Field(default=1.0, allow_inf_nan=False, description="coefficient of the LoRA in the fixed modes")


class DataConfig(Section):
    """The source of the examples."""

    suite: SuiteName = Field(
        default=DEFAULT_SUITE,
        description=f"task suite, or several joined by +: {', '.join(suite_names('texts'))} ({OWN_TEXTS} for your own "
        f"files); images: {', '.join(suite_names('scenes'))}",
    )
    data_dir: str | None = Field(default=None, description="folder of the suite's files; by default from the hub")
    files: Annotated[dict[str, str] | None, BeforeValidator(as_paths)] = Field(
        default=None,
        description="your own JSONL files, one per task, named by the file's stem; in YAML also task: file",
    )
    tasks: Names | None = Field(default=None, description="tasks of the suite; by default all")
    limit: int | None = Field(default=None, ge=1, description="maximum number of examples per task")
    split: Literal["train", "test"] = Field(default="train", description="split to read")
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0, description="fraction of the split to keep out of training")
    part: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]*/[1-9][0-9]*$",
        description="use only one part: 2/4 is the second of four parts that share no examples",
    )


class SceneConfig(Section):
    """LoRAs to compose in one picture. In YAML also a plain list of names."""

    loras: Names = Field(min_length=1, description="names of the LoRAs")
    prompt: str | None = Field(default=None, min_length=1, description="prompt of the picture; by default the suite's")
    task: str | None = Field(default=None, min_length=1, description="row of the results; by default the LoRAs' names")

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, value: Any) -> Any:
        return {"loras": value} if isinstance(value, (str, list, tuple)) else value


class EvalDataConfig(DataConfig):
    """The source of the examples to score: the test split by default."""

    split: Literal["train", "test"] = Field(default="test", description="split to read")
    holdout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="use only the fraction that training with this value kept out"
    )
    scenes: tuple[SceneConfig, ...] = Field(
        default=(), description=f"suite {takers('scenes', 'scenes')}: scenes to draw"
    )


class GateConfig(Section):
    """The gates of the modes that learn them."""

    granularity: Literal["network", "block", "layer", "matrix"] = Field(
        default="layer", description="matrices that share a gate; a layer is a block's attention or feed-forward layer"
    )
    input: Literal["experts", "hidden", "none"] = Field(
        default="hidden",
        description="input of the gates: the experts' outputs, the site's hidden states, or none (static weights)",
    )
    pool: Literal["auto", "mean", "running", "prompt", "token"] = Field(
        default="auto",
        description="positions that a gate averages its input over; token: weights per token; auto: by kind of base",
    )
    head: Literal["full", "per_expert", "low_rank"] = Field(default="full", description="form of the gate's weight")
    head_rank: int = Field(default=8, ge=1, description="rank of the low_rank head")
    init_std: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="std of the initial gate weights; 0: all experts start equal",
    )
    normalize: Literal["standardize", "unit", "none"] = Field(
        default="standardize", description="normalisation of the gate's input"
    )
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="(initial) softmax temperature")
    learn_temperature: bool = Field(default=True, description="learn one temperature per gate")
    top_k: int | None = Field(default=None, ge=1, description="keep the k largest gate weights, rescaled to sum to 1")
    absent: Literal["zero", "renormalize"] = Field(
        default="zero", description="share of an expert without the matrix: lost (zero) or given to the others"
    )


def _own_rates() -> str:
    """The part of the help that lists the methods with their own learning rate."""
    return "".join(f"; by default {row.lr:g} in mode {name}" for name, row in METHODS.items() if row.lr is not None)


class TrainConfig(Section):
    """Training of the gates."""

    steps: int = Field(default=300, ge=1, description="optimiser steps")
    batch_size: int = Field(default=16, ge=1, description="examples per step, of all processes together")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="examples per pass, by default the whole batch; fewer need less memory"
    )
    lr: float = Field(default=2e-2, gt=0.0, allow_inf_nan=False, description=f"peak learning rate{_own_rates()}")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="schedule of the learning rate"
    )
    warmup_steps: int = Field(default=20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False, description="weight decay of AdamW")
    grad_clip: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="maximum gradient norm; 0: no clipping"
    )
    balance: float = Field(default=0.01, ge=0.0, allow_inf_nan=False, description="weight of the balance loss (Eq. 14)")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between entries of the training log")


class LoraTrainConfig(TrainConfig):
    """Training of a LoRA: it has no gates to balance."""

    lr: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False, description="peak learning rate")
    balance: float = Field(default=0.0, ge=0.0, le=0.0, description="always 0: only gates have a balance loss")


class AdapterConfig(Section):
    """The adapter that `train-lora` trains: a LoRA, or shifts of the singular values."""

    method: Literal["lora", "svdiff"] = Field(
        default="lora", description="type of adapter; svdiff shifts the base's singular values (no rank, no alpha)"
    )
    rank: int = Field(default=8, ge=1, description="rank r of the LoRA")
    alpha: float = Field(default=16, gt=0.0, allow_inf_nan=False, description="alpha; the update is scaled by alpha/r")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="dropout on the LoRA's input")
    targets: str | tuple[str, ...] = Field(
        default="all-linear",
        description="modules: all-linear, a list of names, or a regex; images: also attention, conv",
    )
    rslora: bool = Field(default=False, description="scale the update by alpha/sqrt(r) instead (rsLoRA)")

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        for key in ("dropout", "rslora"):
            if self.method != "lora" and getattr(self, key):
                what = f"it is a setting of LoRAs, and the method is {self.method}"
                raise UsageError(f"adapter.{key}", what, "Leave it out.")
        return self


class ClipConfig(Section):
    """The CLIP model, loaded with open_clip."""

    model: str | None = Field(
        default=None,
        description="images: open_clip name, builtin:NAME, hf-hub:ID or a folder; the default fits the base",
    )
    pretrained: str | None = Field(default=None, description="images: CLIP weights: an open_clip tag or a local file")


def _metrics(takes: str) -> str:
    """The metrics of completions or of pictures, as help lists them."""
    return ", ".join(name for name, row in METRICS.items() if row.takes == takes)


class EvalConfig(Section):
    """The data and metrics of a scoring."""

    data: EvalDataConfig = Field(default_factory=EvalDataConfig, description="the examples or scenes to score")
    metrics: Names | None = Field(
        default=None,
        description=f"metrics, by default the suite's: {_metrics('texts')}; images: {_metrics('pictures')}",
    )
    batch_size: int = Field(default=32, ge=1, description="prompts or pictures in one batch")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="language models: completion length in tokens; by default the suite's"
    )
    baselines: bool = Field(default=True, description="also score the base, each LoRA alone and the fixed mixtures")
    images: int = Field(default=4, ge=1, description="images: pictures per scene, each with its own seed")
    clip: ClipConfig = Field(default_factory=ClipConfig, description="images: the CLIP model of the alignment metrics")
    bootstrap: int = Field(default=1000, ge=0, description="resamples of the paired bootstrap; 0: no intervals")


def as_files(value: Any) -> Any:
    """`a.jsonl,b.jsonl` or a list of files as {stem: file}."""
    return as_paths(as_names(value))


class CalibrationConfig(Section):
    """The inputs over which gates are averaged, and on which the export is compared with the composition."""

    examples: Annotated[dict[str, str] | None, BeforeValidator(as_files)] = Field(
        default=None, description="language models: JSONL files of inputs and targets; by default the training data"
    )
    data_dir: str | None = Field(
        default=None, description="language models: folder of the training suite's files; by default as in training"
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="images: prompts to draw; by default the pictures of the LoRAs' concepts are used"
    )
    limit: int = Field(default=64, ge=1, description="maximum number of examples of a task or pictures of a concept")
    batch_size: int = Field(default=16, ge=1, description="examples or pictures in one batch")
