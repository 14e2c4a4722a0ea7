"""A LoRA described from its configuration and its file's header: no tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molecli.errors import MismatchError, UsageError
from molecli.files.adapters.settings import LoraSettings, parse_config, read_config
from molecli.files.adapters.source import canonical_source, resolve_source, weights_file
from molecli.files.adapters.weights import Keys, factor_keys, factor_shapes, metadata_of, opened_lora, sha256_of
from molecli.files.lora_spec import CONFIG_FILE, LoraLike

# Metadata keys under which a single file may carry PEFT's configuration as JSON; the first is diffusers'.
_CONFIG_KEYS = ("lora_adapter_metadata", "adapter_config", "peft_config", "config")


@dataclass(frozen=True)
class AdapterInfo:
    """One LoRA without its tensors.

    `rank` and `alpha` are the configured ones; `ranks`, `alphas`, `scalings` and `matrices` ((d_out, d_in)) are by
    matrix name; `keys` are the tensors' names in the file at `path`.
    """

    name: str
    source: str
    path: Path
    sha256: str
    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    scalings: dict[str, float]
    matrices: dict[str, tuple[int, int]]
    base_model: str | None
    keys: dict[str, Keys]

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{self.name} ({self.path})"


def read_info(spec: LoraLike) -> AdapterInfo:
    """The description of the LoRA that `spec` names.

    Raises: UsageError (missing, a pickle, a kind that is not read), MismatchError (damaged or contradictory).
    """
    path = weights_file(resolve_source(spec))
    where = f"{spec.name} ({path})"
    with opened_lora(path) as file:
        # The configuration first: it names an unsupported kind better than the tensors' keys do.
        settings = _settings(where, path, metadata_of(file))
        keys = factor_keys(where, list(file.keys()))
        shapes = {m: (file.get_slice(k.A).get_shape(), file.get_slice(k.B).get_shape()) for m, k in keys.items()}
        stored = {m: float(file.get_tensor(k.alpha)) for m, k in keys.items() if k.alpha is not None}
    sizes = {matrix: factor_shapes(where, matrix, a, b) for matrix, (a, b) in shapes.items()}
    ranks = {matrix: rank for matrix, (rank, _, _) in sizes.items()}
    if settings is None:
        settings = _from_alphas(where, path, stored, ranks)
    else:
        _check_ranks(where, settings, ranks)
    # An alpha stored beside the factors is the one they were trained with.
    alphas = {matrix: stored.get(matrix, settings.alpha_of(matrix)) for matrix in ranks}
    return AdapterInfo(
        name=spec.name,
        source=canonical_source(spec),
        path=path,
        sha256=sha256_of(path),
        rank=settings.rank,
        alpha=settings.alpha,
        ranks=ranks,
        alphas=alphas,
        scalings={matrix: settings.scaling(alphas[matrix], rank) for matrix, rank in ranks.items()},
        matrices={matrix: (d_out, d_in) for matrix, (_, d_out, d_in) in sizes.items()},
        base_model=settings.base_model,
        keys=keys,
    )


def _settings(where: str, path: Path, metadata: Mapping[str, str]) -> LoraSettings | None:
    """From adapter_config.json beside the file, else from its metadata, else None."""
    beside = path.parent / CONFIG_FILE
    if beside.exists():
        return parse_config(where, read_config(beside))
    for key in _CONFIG_KEYS:
        config = _json_mapping(metadata.get(key, ""))
        if config is not None and ("r" in config or "lora_alpha" in config):
            return parse_config(where, config)
    return None


def _json_mapping(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`, a prefix common to all its keys ("transformer.") removed; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    prefixes = {key.partition(".")[0] for key in value}
    if len(prefixes) == 1 and all("." in key for key in value):
        return {key.partition(".")[2]: entry for key, entry in value.items()}
    return value


def _from_alphas(where: str, path: Path, stored: Mapping[str, float], ranks: Mapping[str, int]) -> LoraSettings:
    """Settings from the alphas beside the factors. Raises: UsageError when there are none: alpha is never guessed."""
    missing = next((matrix for matrix in ranks if matrix not in stored), None)
    if missing is not None:
        rank = max(ranks.values())
        example = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": ALPHA}}'
        remedy = f"Put {CONFIG_FILE} into {path.parent} with {example}."
        raise UsageError(where, f"does not say its alpha (rank {rank})", remedy)
    first = next(iter(ranks))
    return LoraSettings(rank=max(ranks.values()), alpha=stored[first])


def _check_ranks(where: str, settings: LoraSettings, ranks: Mapping[str, int]) -> None:
    for matrix, rank in ranks.items():
        configured = settings.rank_of(matrix)
        if configured != rank:
            what = f"{matrix!r} has rank {rank}, but {CONFIG_FILE} says {configured}"
            raise MismatchError(where, what, "Its two files belong to different LoRAs, or rank_pattern is missing.")
