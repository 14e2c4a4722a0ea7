"""Small protocols that keep backbones, suites, metrics and methods independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Family = Literal["seq2seq", "causal", "diffusion"]
Split = Literal["train", "test"]
Granularity = Literal["network", "block", "layer", "matrix"]
# Token axes. Language models: the tokens of the encoder, those of the decoder (all tokens of a causal model), and the
# encoder's as keys and values of cross-attention. Diffusion: the positions of the UNet, the tokens of a text encoder
# and the keys and values made from them, and the embedding of the timestep, one vector per picture.
Stream = Literal["encoder", "decoder", "memory", "spatial", "text", "time"]
# The type of an element of a picture.
ElementKind = Literal["object", "character", "clothing", "style", "background"]
# (d_out, d_in) of a linear layer, (c_out, c_in, k_h, k_w) of a convolution.
Shape = tuple[int, ...]
# The name in a base of a module that a file names otherwise, by the base's own rules; the same name if it has none.
Renaming = Callable[[str], str]
# Called by long work: label, number of steps done, total number.
Progress = Callable[[str, int, int], None]
# Called with a line for the user to read.
Note = Callable[[str], object]


class Matrices(dict[str, Shape]):
    """The adaptable matrices of a base, those of `all-linear`: name -> shape, and what else a LoRA's file may name.

    head: the output head, which is adapted only where it is named; tables: the input embeddings and the output head,
    whose weights a file may repeat; renamed: the base's own rules for names of other releases.
    """

    def __init__(
        self,
        matrices: Mapping[str, Shape],
        *,
        head: Mapping[str, Shape] | None = None,
        tables: Mapping[str, Shape] | None = None,
        renamed: Renaming = str,
    ) -> None:
        super().__init__(matrices)
        self.head, self.tables, self.renamed = dict(head or {}), dict(tables or {}), renamed

    @property
    def named(self) -> dict[str, Shape]:
        """All matrices that a LoRA may name: the head is the last one."""
        return {**self, **self.head}

    def without(self, names: Collection[str]) -> Matrices:
        """The same base with fewer adaptable matrices."""
        kept = {name: shape for name, shape in self.items() if name not in names}
        return Matrices(kept, head=self.head, tables=self.tables, renamed=self.renamed)

    @classmethod
    def of(cls, matrices: Mapping[str, Shape]) -> Matrices:
        """`matrices` itself, or with no head and no rules if it is a plain mapping."""
        return matrices if isinstance(matrices, cls) else cls(matrices)


@dataclass(frozen=True)
class Example:
    """One example: `prompt` is the input, any of `references` is a correct output, `target` is trained on."""

    task: str
    prompt: str
    target: str
    references: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return self.references or (self.target,)


class Completion(str):
    """The text that a language model wrote; `answer` is what is scored of it.

    A reasoning model's answer is without its thoughts; None if they did not end, so that there is no answer.
    """

    answer: str | None

    def __new__(cls, text: str, answer: str | None) -> Completion:
        made = super().__new__(cls, text)
        made.answer = answer
        return made

    def __getnewargs__(self) -> tuple[str, str | None]:  # type: ignore[override]
        return str(self), self.answer


@dataclass(frozen=True)
class Picture:
    """One training picture: `target` is its file, `task` the concept that it shows."""

    task: str
    prompt: str
    target: str


@dataclass(frozen=True)
class Element:
    """One element that a picture should show: its type (character, style, ...), its name and its trigger words."""

    kind: str
    name: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A prompt to draw with several LoRAs at once; `name` is unique within its task.

    elements: what a judge should look for, one per LoRA; classes: what a recogniser should find.
    """

    task: str
    name: str
    prompt: str
    loras: tuple[str, ...]
    elements: tuple[Element, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moment:
    """One denoising step: `index` of `total`, from 0; `timestep` is the input of the UNet.

    guided: the batch has two halves, unconditional and conditional (classifier-free guidance); None if it is not known
    what its rows are.
    """

    index: int
    total: int
    timestep: float
    guided: bool | None


class Backbone(Protocol):
    """A frozen model that hosts experts: a language model, or the UNet and text encoder(s) of a diffusion pipeline.

    Its `family` determines its training data and outputs: examples and completions, or pictures.
    """

    family: Family
    model: nn.Module
    name: str

    @property
    def device(self) -> torch.device: ...

    def matrices(self) -> dict[str, Shape]:
        """Adaptable matrices: module name -> shape, independent of the layer's storage layout."""
        ...

    def collate(self, rows: Sequence[Any], /) -> dict[str, Any]:
        """A training batch: input_ids, attention_mask and labels (-100 is not scored) for teacher forcing; for pictures
        pixels, prompts, noise and timesteps."""
        ...

    def token_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of summands (both scalars): cross-entropies of the scored tokens, or squared
        errors of pictures."""
        ...

    def example_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the mean losses of the examples or pictures, and their number (both scalars)."""
        ...

    def example_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """[B], the mean loss of each example or picture."""
        ...

    def generate(self, prompts: Sequence[str], *args: Any, **options: Any) -> list[Any]:
        """The completions or pictures for a batch of prompts; the options depend on the family."""
        ...

    def fingerprint(self) -> str:
        """A string that identifies this base; see `functional.fingerprint`."""
        ...


class Metric(Protocol):
    """Scores completions against their answers, in [0, 1] or [0, 100]; see `metrics`."""

    def __call__(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]: ...


@dataclass(frozen=True)
class Source:
    """The place of a task's examples: the path of a file ("-" is stdin), or with `online` a public data set."""

    place: str
    online: bool = False


class Suite(Protocol):
    """A named, versioned set of tasks."""

    name: str
    version: str

    def tasks(self, data_dir: str | None) -> list[str]: ...

    def known(self, data_dir: str | None) -> Sequence[str]:
        """All tasks of the suite, even if their examples are not in `data_dir`."""
        ...

    def source(self, task: str, split: Split, data_dir: str | None) -> Source | None:
        """What `load` would read, without reading or requesting it. None if the examples are generated."""
        ...

    def load(self, task: str, split: Split, data_dir: str | None) -> list[Example]: ...

    def metrics(self, task: str) -> tuple[str, ...]: ...

    def max_new_tokens(self, task: str) -> int: ...


class SceneSuite(Protocol):
    """A named, versioned set of scenes, by task; the scenes depend on the given LoRAs.

    `concepts` has an entry for each LoRA: its known concept, such as its trigger words, or None.
    """

    name: str
    version: str

    def tasks(self, concepts: Mapping[str, Any], data_dir: str | None) -> list[str]: ...

    def scenes(self, task: str, concepts: Mapping[str, Any], data_dir: str | None) -> list[Scene]: ...

    def metrics(self, task: str) -> tuple[str, ...]: ...

    def pictures(self, lora: str, data_dir: str | None) -> str | None:
        """The folder of pictures that show what `lora` adds, or None if the suite has none."""
        ...


@dataclass(frozen=True)
class Group:
    """Matrices that read the same input tensor, so that one matrix product projects them all."""

    matrices: tuple[str, ...]
    stream: Stream


@dataclass(frozen=True)
class Site:
    """Matrices under one gate, as groups in call order; the gate reads the input of the first group, the entry."""

    name: str
    groups: tuple[Group, ...]

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(m for group in self.groups for m in group.matrices)

    @property
    def entry(self) -> Group:
        return self.groups[0]

    @property
    def stream(self) -> Stream:
        return self.entry.stream


@dataclass
class Reading:
    """The input of a gate at the entry of its site: B sequences of T tokens, or B pictures of T positions.

    x: [B, T, d_in], the input of the entry; u: [B, T, R], this input projected by the A of every expert;
    valid, prompt: [B, T], which tokens are not padding, and which belong to the prompt; None without padding;
    memory: [B, S, d], the encoder's output for sites in a seq2seq decoder, with memory_valid [B, S];
    state: the state of `running` pooling after an earlier chunk of the same sequences; it is replaced by the states
    after the last `kept` tokens, or after the last one without `kept`;
    shared: exists during one pass, for values that all its gates share.
    """

    x: Tensor
    u: Tensor
    valid: Tensor | None
    prompt: Tensor | None
    memory: Tensor | None = None
    memory_valid: Tensor | None = None
    state: tuple[Tensor, Tensor] | None = None
    kept: int | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


class Gate(Protocol):
    """Weights for the experts at one site.

    Returns [N] (the same for every input), [B, N] (one per sequence) or [B, T, N] (one per token). `keep` [N] is 0 for
    masked experts. `per_sequence` gates are fixed after the prompt; gates that `remember` depend on earlier tokens;
    `constant` gates need no reading. Of the others, `reads_entry` says
    whether a gate reads the tokens at its site, or only the memory.
    """

    per_sequence: bool
    remembers: bool
    constant: bool

    def reads_entry(self, *, memory: bool) -> bool: ...

    def __call__(self, reading: Reading | None, keep: Tensor | None = None) -> Tensor: ...


class OutputMethod(Protocol):
    """A composition that acts on the UNet's outputs: at each denoising step K branches run, each with its own weights.

    weights [N]: the user's weights of the experts, on the CPU; reads_prompt: whether `prepare` must be called for every
    prompt. `keep` [N] is 0 for masked experts, or None if none is masked.
    """

    weights: Tensor
    reads_prompt: bool

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Read the prompt, in methods that use it; `encode` gives [P, T, d], texts encoded by the base alone."""
        ...

    def text_weights(self, keep: Tensor | None) -> Tensor:
        """[N], the experts' weights in the text encoder(s)."""
        ...

    def branches(self, moment: Moment, keep: Tensor | None) -> Tensor:
        """[K, N], the experts' weights in each branch at this step."""
        ...

    def combine(self, outputs: Tensor, moment: Moment, keep: Tensor | None) -> Tensor:
        """[B, C, H, W] of the branches' outputs [K, B, C, H, W]."""
        ...
