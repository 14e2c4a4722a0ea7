"""The tensor names of LoRA files in all supported layouts: the adapted module and the factor of each tensor.

PEFT       base_model.model.<path>.lora_A.weight
diffusers  <component>.<path>.lora_A.weight, and its older forms with lora.down, to_q_lora.down, lora_linear_layer.down
kohya      lora_unet_<path with underscores>.lora_down.weight, with .alpha; lora_te_, lora_te1_, lora_te2_
others     the same factors under the prefixes of `prefixes`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molecli.adapters.prefixes import KOHYA, without_prefix
from molecli.adapters.settings import MERGE, PLAIN, unsupported
from molecli.errors import MismatchError
from molecli.files.lora_spec import COMPONENTS

PEFT_PREFIX = "base_model.model."
# In files, the modules of CLIP's text model have this prefix; in transformers 5 a bare encoder lacks it.
CLIP_PREFIX = "text_model."
AGAIN = "Download or export it again."

_PEFT_PAIR = ("lora_A", "lora_B")
_PAIRS = (
    _PEFT_PAIR,
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)
_FACTORS = {mark: ("AB"[i], pair) for pair in _PAIRS for i, mark in enumerate(pair)}
_FACTOR = re.compile(rf"(?P<module>.+?)(?P<joint>[._])(?P<mark>{'|'.join(map(re.escape, _FACTORS))})\.(?P<rest>.+)")
# The oldest diffusers files use the same names for the attention matrices of the UNet and of CLIP.
_OLD_UNET = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_OLD_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Tables of the base that PEFT stores beside a LoRA (save_embedding_layers).
_TABLE = re.compile(
    r"(?P<module>(.+\.)?(lm_head|embed_out|embed_in|embed_tokens|wte|shared|word_embeddings|embeddings|head))"
    r"(\.base_layer)?\.(?P<part>weight|bias)"
)
# Part of a key -> the kind of adapter that has it
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lora_embedding_": "LoRA on an embedding (lora_embedding_A)",
    "modules_to_save": "LoRA with modules_to_save",
    "trainable_tokens_": "LoRA with trainable tokens (trainable_tokens_delta)",
    "hada_w": "LoHa",
    "hada_t": "LoHa",
    "lokr_": "LoKr",
    "lora_mid.": "LoRA with a Tucker core (lora_mid)",
    ".oft_": "OFT",
    "bundle_emb.": "LoRA with textual inversions (bundle_emb)",
}
# Those of them that train weights of the base itself.
OWN_WEIGHTS = ("lora_embedding_", "modules_to_save", "trainable_tokens_")


@dataclass(frozen=True)
class Keys:
    """The file and the keys of one module's factors; `alpha` is the key of its alpha, if that is stored.

    `implied`: without a stored alpha the layout means scaling 1 (alpha = rank), as in kohya's and diffusers' layouts.
    `expert`: (index, E) if the factors are those of E routed experts, stacked, and the module is one of them.
    """

    path: Path
    A: str
    B: str
    alpha: str | None = None
    pair: tuple[str, str] = _PEFT_PAIR
    implied: bool = False
    expert: tuple[int, int] | None = None


def outlined(keys: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """module -> shape of its matrix, as far as a file's keys and shapes tell; () where they do not. Nothing is checked.

    A key that is no factor counts as a module.
    """
    found: dict[str, dict[str, Sequence[int]]] = {}
    for key, shape in keys.items():
        match = _FACTOR.fullmatch(key)
        halves = found.setdefault(_module(match["module"] if match else key), {})
        if match is not None and match["rest"].endswith("weight") and len(shape) >= 2:
            halves[_FACTORS[match["mark"]][0]] = shape
    return {module: (ab["B"][0], *ab["A"][1:]) if len(ab) == 2 else () for module, ab in found.items()}


def factor_keys(where: str, path: Path, names: Iterable[str]) -> dict[str, Keys]:
    """module -> its keys in the file at `path`, in the file's order.

    Modules are dotted, with their component if the file names one. Names in kohya's layout stay unchanged: only with
    the base is it known which "_" stands for a dot. Raises: UsageError that names an unsupported kind of adapter;
    MismatchError if one factor of a pair is missing.
    """
    names = list(names)
    for part, kind in _FOREIGN.items():
        if any(part in name for name in names):
            raise unsupported(where, kind, MERGE if part in OWN_WEIGHTS else PLAIN)
    tables = table_keys(names)
    found: dict[str, dict[str, str]] = {}
    pairs: dict[str, tuple[str, str]] = {}
    for name in names:
        if name in tables:
            continue
        module, part, pair = _split(where, name)
        if part in found.setdefault(module, {}):
            what = f"it holds several adapters: {found[module][part]!r} and {name!r}"
            raise MismatchError(where, what, "Save one of them by itself.")
        found[module][part] = name
        if pair is not None:
            pairs[module] = pair
    if not found:
        raise MismatchError(where, "there is no LoRA in it", "Name a LoRA that was trained and saved.")
    for module, parts in found.items():
        for part, mark in zip("AB", pairs.get(module, _PEFT_PAIR), strict=True):
            if part not in parts:
                raise MismatchError(where, f"{mark} of {module!r} is missing", AGAIN)
    return {
        module: Keys(path, parts["A"], parts["B"], parts.get("alpha"), pairs[module], _implied(module, pairs[module]))
        for module, parts in found.items()
    }


def table_keys(names: Iterable[str]) -> dict[str, str]:
    """Key -> parameter of the base (`lm_head.weight`) that a file of a language model's LoRA repeats under it."""
    found = ((name, _TABLE.fullmatch(name)) for name in names if is_bare(name))
    return {name: f"{_module(match['module'])}.{match['part']}" for name, match in found if match is not None}


def is_bare(name: str) -> bool:
    """Whether a key or module names no component of a pipeline, as in PEFT's layout and language models."""
    return name.partition(".")[0] not in COMPONENTS and not name.startswith(tuple(KOHYA))


def component_of(module: str) -> str:
    """The component in the name of `module`, dotted or in kohya's layout; "" for none."""
    prefix = module.partition(".")[0]
    return next((c for start, c in KOHYA.items() if module.startswith(start)), prefix if prefix in COMPONENTS else "")


def filed(component: str, path: str) -> str:
    """The path of a component's module in files, where a text encoder's layers are under "text_model."."""
    return CLIP_PREFIX + path if component != "unet" and path.startswith("encoder.") else path


def underscored(path: str) -> str:
    """A module's path in kohya's layout."""
    return path.replace(".", "_")


def _implied(module: str, pair: tuple[str, str]) -> bool:
    return not is_bare(module) or pair != _PEFT_PAIR


def _split(where: str, key: str) -> tuple[str, str, tuple[str, str] | None]:
    """(module, "A", "B" or "alpha", names of the factors) of one key. Raises: UsageError for other kinds of adapter."""
    name, dot, last = key.rpartition(".")
    if dot and last == "alpha":
        return _module(name), last, None
    match = _FACTOR.fullmatch(key)
    if match is not None and match["rest"].endswith("bias"):
        raise unsupported(where, "LoRA with bias")
    # "lora_A.weight" as saved, "lora_A.NAME.weight" in a raw state dict.
    if match is not None and (match["rest"] == "weight" or match["rest"].endswith(".weight")):
        module = _module(match["module"])
        if match["joint"] == "_":
            module = _old_attention(module)
        if module:
            return module, *_FACTORS[match["mark"]]
    kind = "LoRA with bias" if key.endswith("bias") else f"a LoRA that also has {key!r}"
    raise unsupported(where, kind)


def _module(name: str) -> str:
    """`name` without the additions of wrappers (PEFT's prefix, the attention processor), its part as a component."""
    name = without_prefix(name.replace(".processor.", ".").removeprefix(PEFT_PREFIX))
    component, dot, path = name.partition(".")
    return f"{component}.{path.removeprefix(PEFT_PREFIX)}" if dot and component in COMPONENTS else name


def _old_attention(module: str) -> str:
    """The matrix for "….to_q" of a key "….to_q_lora.down.weight"; "" if it is not one of the four."""
    attention, _, last = module.rpartition(".")
    names = _OLD_CLIP if attention.endswith("self_attn") else _OLD_UNET
    return f"{attention}.{names[last]}" if last in names else ""
