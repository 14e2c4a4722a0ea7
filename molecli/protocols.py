"""The small protocols that let backbones, suites, metrics and methods stay apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Family = Literal["seq2seq", "causal", "diffusion"]
Split = Literal["train", "test"]
Granularity = Literal["network", "block", "layer", "matrix"]
# Token axes. Language models: the encoder's tokens, the decoder's (all of a causal model), and the encoder's as keys
# and values of cross-attention. Diffusion: a UNet's positions, a text encoder's tokens and the keys and values made of
# them, and the embedding of the denoising time, one vector a picture.
Stream = Literal["encoder", "decoder", "memory", "spatial", "text", "time"]
# What an element of a picture is.
ElementKind = Literal["object", "character", "clothing", "style", "background"]
# (d_out, d_in) of a linear layer, (c_out, c_in, k_h, k_w) of a convolution.
Shape = tuple[int, ...]
# What long work calls as it goes on: a label, how much is done, of how much.
Progress = Callable[[str, int, int], None]
# What work calls with a line that the user should read.
Note = Callable[[str], object]


@dataclass(frozen=True)
class Example:
    """One line of work: `prompt` goes in, any of `references` may come out; `target` is trained on."""

    task: str
    prompt: str
    target: str
    references: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return self.references or (self.target,)


@dataclass(frozen=True)
class Picture:
    """One picture to learn: `target` is its file, `task` the concept that it shows."""

    task: str
    prompt: str
    target: str


@dataclass(frozen=True)
class Element:
    """One thing a picture should show: its type (character, style, ...), its name and the features that call it."""

    kind: str
    name: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A prompt to draw with several LoRAs at once; `name` tells it from the other scenes of its task.

    elements: what a judge is told to look for, one for each LoRA; classes: what a recogniser should find.
    """

    task: str
    name: str
    prompt: str
    loras: tuple[str, ...]
    elements: tuple[Element, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moment:
    """One denoising step: `index` of `total`, from 0; `timestep` as the UNet is told it.

    guided: the UNet's rows are two halves, unconditional and conditional (classifier-free guidance).
    """

    index: int
    total: int
    timestep: float
    guided: bool


class Backbone(Protocol):
    """A frozen model that hosts experts: a language model, or the UNet and text encoder(s) of a diffusion pipeline.

    What it learns from and what it makes follow its `family`: examples and completions, or pictures.
    """

    family: Family
    model: nn.Module
    name: str

    @property
    def device(self) -> torch.device: ...

    def matrices(self) -> dict[str, Shape]:
        """Adaptable matrices: module name -> shape, whatever layout the layer stores."""
        ...

    def collate(self, rows: Sequence[Any], /) -> dict[str, Any]:
        """A batch to learn: for teacher forcing input_ids, attention_mask, labels (-100 is not scored); of pictures
        pixels, prompts, noise and timesteps."""
        ...

    def token_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed loss and the number of what it is summed over (both scalars): cross-entropies of the scored tokens,
        or squared errors of pictures."""
        ...

    def example_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The examples' or pictures' mean losses, summed, and their number (both scalars)."""
        ...

    def example_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """[B], the mean loss of each example or picture."""
        ...

    def generate(self, prompts: Sequence[str], *args: Any, **options: Any) -> list[Any]:
        """What the model makes of a batch of prompts: completions, or pictures; the options are the family's own."""
        ...

    def fingerprint(self) -> str:
        """A string that tells this base from another; see `functional.fingerprint`."""
        ...


class Metric(Protocol):
    """Scores of completions against their answers, in [0, 1] or [0, 100]; see `metrics`."""

    def __call__(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]: ...


@dataclass(frozen=True)
class Source:
    """Where a task's examples are: the path of a file ("-" is stdin), or what is asked of a public place."""

    place: str
    online: bool = False


class Suite(Protocol):
    """A named, versioned set of tasks."""

    name: str
    version: str

    def tasks(self, data_dir: str | None) -> list[str]: ...

    def known(self, data_dir: str | None) -> Sequence[str]:
        """Every task that the suite has, whether or not its examples are in `data_dir`."""
        ...

    def source(self, task: str, split: Split, data_dir: str | None) -> Source | None:
        """What `load` would read; nothing is read or asked here. None where examples are made, not read."""
        ...

    def load(self, task: str, split: Split, data_dir: str | None) -> list[Example]: ...

    def metrics(self, task: str) -> tuple[str, ...]: ...

    def max_new_tokens(self, task: str) -> int: ...


class SceneSuite(Protocol):
    """A named, versioned set of scenes, by task; which there are follows from the LoRAs at hand.

    `concepts` has an entry for each LoRA: what is known of it, such as the words that call it; None where nothing is.
    """

    name: str
    version: str

    def tasks(self, concepts: Mapping[str, Any], data_dir: str | None) -> list[str]: ...

    def scenes(self, task: str, concepts: Mapping[str, Any], data_dir: str | None) -> list[Scene]: ...

    def metrics(self, task: str) -> tuple[str, ...]: ...

    def pictures(self, lora: str, data_dir: str | None) -> str | None:
        """The folder of the pictures that show what `lora` adds, where the suite has them."""
        ...


@dataclass(frozen=True)
class Group:
    """Matrices that read the same input tensor, so that one GEMM projects them all."""

    matrices: tuple[str, ...]
    stream: Stream


@dataclass(frozen=True)
class Site:
    """Matrices under one gate, as groups in call order; the first group is the entry the gate looks at."""

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
    """What a gate sees at its site's entry: B sequences of T tokens, or B pictures of T positions.

    x: [B, T, d_in], the entry's input; u: [B, T, R], that input projected onto every expert's A;
    valid, prompt: [B, T], which tokens are not padding, and which belong to the prompt; None where nothing is padding;
    memory: [B, S, d], the encoder's output where the site sits in a seq2seq decoder, with memory_valid [B, S];
    state: what `running` pooling left behind after an earlier chunk of the same sequences;
    shared: lives as long as the pass, for what all its gates compute alike.
    """

    x: Tensor
    u: Tensor
    valid: Tensor | None
    prompt: Tensor | None
    memory: Tensor | None = None
    memory_valid: Tensor | None = None
    state: tuple[Tensor, Tensor] | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


class Gate(Protocol):
    """Weights for the experts at one site.

    Returns [N] (the same for every input), [B, N] (one per sequence) or [B, T, N] (one per token). `keep` [N] is 0 for
    masked experts. `per_sequence` gates stay as the prompt set them; those that `remember` depend on earlier tokens;
    `constant` ones need no reading.
    """

    per_sequence: bool
    remembers: bool
    constant: bool

    def __call__(self, reading: Reading | None, keep: Tensor | None = None) -> Tensor: ...


class OutputMethod(Protocol):
    """A composition that acts on the UNet's outputs: at each denoising step K branches run, each with its own weights.

    weights [N]: the experts' own, on the CPU; reads_prompt: whether `prepare` must be called for every prompt.
    `keep` [N] is 0 for masked experts, None when none is.
    """

    weights: Tensor
    reads_prompt: bool

    def prepare(self, prompt: str, encode: Callable[[Sequence[str]], Tensor]) -> None:
        """Look at the prompt, for methods that do; `encode` gives [P, T, d], texts as the base alone encodes them."""
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
