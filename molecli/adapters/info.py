"""The description of a LoRA from its configuration and the headers of its files, without reading factors."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from molecli.adapters.keys import Keys, factor_keys, is_bare, table_keys
from molecli.adapters.metadata import Configured, configured
from molecli.adapters.settings import LoraSettings
from molecli.adapters.source import canonical_source, lora_files, resolve_source
from molecli.adapters.svdiff import Origin, described, is_svdiff
from molecli.adapters.weights import (
    Shape,
    alpha_in,
    check_rank,
    factor_shape,
    metadata_of,
    opened_lora,
    sha256_of,
)
from molecli.errors import MismatchError, UsageError
from molecli.files.lora_spec import CONFIG_FILE, DIFFUSERS_FILE, LoraLike


@dataclass(frozen=True)
class Adapted:
    """One adapted matrix: its shape (from the factors), its scaling, and the keys of its factors.

    said: the configuration of its file. parts: (first row, matrix) if it is updated by several pairs of factors, each
    of which updates some of its rows; see `fused`.
    """

    shape: Shape
    rank: int
    alpha: float
    scaling: float
    keys: Keys
    said: Configured = field(default_factory=Configured)
    parts: tuple[tuple[int, Adapted], ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that its file adapts without a layer."""
        return next((settings.parameters for settings in self.said.by_component.values() if settings.parameters), ())

    @property
    def stored(self) -> tuple[Keys, ...]:
        """The keys of all its factors."""
        return tuple(part.keys for _, part in self.parts) or (self.keys,)


@dataclass(frozen=True)
class Table:
    """A weight of the base that a LoRA's file repeats: the parameter's name, and the copy's place and shape."""

    parameter: str
    path: Path
    key: str
    shape: Shape


@dataclass(frozen=True)
class AdapterInfo:
    """One LoRA without its tensors; `adapted` is by matrix name.

    `rank` and `alpha` are the configured ones, else the most frequent ones. Matrices have the names in the file (in
    kohya's layout with underscores; bare names lack their component) until `place` renames them to those of a base.
    `path` is the file, or the folder with one subfolder per component. `origin` is set for SVDiff adapters, which have
    shifts instead of factors. `taken_for` says which names `place` read as others; `tables` are the base's own weights
    that the file repeats.
    """

    name: str
    source: str
    path: Path
    sha256: str
    rank: int
    alpha: float
    adapted: dict[str, Adapted]
    base_model: str | None
    origin: Origin | None = None
    taken_for: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def where(self) -> str:
        """Its name in messages."""
        return f"{self.name} ({self.path})"

    @property
    def matrices(self) -> dict[str, Shape]:
        return {name: matrix.shape for name, matrix in self.adapted.items()}

    @property
    def ranks(self) -> dict[str, int]:
        return {name: matrix.rank for name, matrix in self.adapted.items()}

    @property
    def alphas(self) -> dict[str, float]:
        return {name: matrix.alpha for name, matrix in self.adapted.items()}

    @property
    def scalings(self) -> dict[str, float]:
        return {name: matrix.scaling for name, matrix in self.adapted.items()}


def read_info(spec: LoraLike) -> AdapterInfo:
    """The description of the LoRA that `spec` names.

    Raises: UsageError (missing, a pickle, a kind that is not read), MismatchError (damaged or contradictory).
    """
    source = resolve_source(spec)
    there = lora_files(source)
    _warn_of_unread(spec.name, source, there.unread)
    files = there.files
    adapted: dict[str, Adapted] = {}
    settings: list[LoraSettings] = []
    bases: list[str | None] = []
    tables: list[Table] = []
    origin = None
    for component, path in files.items():
        found, said, origin = _read_file(f"{spec.name} ({path})", path)
        tables += _tables(path)
        part = {f"{component}.{m}" if component and is_bare(m) else m: matrix for m, matrix in found.items()}
        if twice := next((module for module in part if module in adapted), None):
            what = f"two of its files adapt {twice!r}: {adapted[twice].keys.path} and {path}"
            raise MismatchError(f"{spec.name} ({source})", what, "Leave one of them out.")
        adapted |= part
        settings += said.by_component.values()
        bases.append(said.base_model)
    paths = list(files.values())
    return AdapterInfo(
        name=spec.name,
        source=canonical_source(spec),
        path=paths[0] if len(paths) == 1 else source,
        sha256=sha256_of(paths),
        rank=settings[0].rank if settings else _commonest(m.rank for m in adapted.values()),
        alpha=settings[0].alpha if settings else _commonest(m.alpha for m in adapted.values()),
        adapted=adapted,
        base_model=next(filter(None, bases), None),
        origin=origin,
        tables=tuple(tables),
    )


def _tables(path: Path) -> list[Table]:
    with opened_lora(path) as file:
        found = table_keys(file.keys())
        return [Table(name, path, key, tuple(file.get_slice(key).get_shape())) for key, name in found.items()]


def _warn_of_unread(name: str, source: Path, unread: Sequence[Path]) -> None:
    if unread:
        files = ", ".join(str(file.relative_to(source)) for file in unread[:3]) + (", ..." if len(unread) > 3 else "")
        warnings.warn(f"{name}: {len(unread)} other weights file(s) in {source} are not read: {files}", stacklevel=3)


def _read_file(where: str, path: Path) -> tuple[dict[str, Adapted], Configured, Origin | None]:
    """(matrices by the file's names, the configuration found, the origin of shifts) of one file."""
    with opened_lora(path) as file:
        names, metadata = list(file.keys()), metadata_of(file)
        if is_svdiff(metadata):
            origin, shifted = described(where, file, metadata)
            ranks = {name: min(shape[0], prod(shape[1:])) for name, (_, shape) in shifted.items()}
            # Shifts become factors of full rank with the scaling included.
            matrices = {
                name: Adapted(shape, ranks[name], float(ranks[name]), 1.0, Keys(path, key, key))
                for name, (key, shape) in shifted.items()
            }
            return matrices, Configured(base_model=origin.base), origin
        # The configuration first: it names an unsupported kind better than the tensor keys do. An adapter_config.json
        # belongs to PEFT's layout: it is ignored next to a file in another layout.
        said = configured(where, path, metadata, beside=all(map(is_bare, names)))
        keys = factor_keys(where, path, names)
        shapes = {m: (file.get_slice(k.A).get_shape(), file.get_slice(k.B).get_shape()) for m, k in keys.items()}
        stored = {m: alpha_in(where, m, file.get_tensor(k.alpha)) for m, k in keys.items() if k.alpha is not None}
    sizes = {module: factor_shape(where, module, keys[module], a, b) for module, (a, b) in shapes.items()}
    ranks = {module: rank for module, (rank, _) in sizes.items()}
    _check_alphas(where, path, keys, ranks, stored, said)
    adapted = {}
    for module, (rank, shape) in sizes.items():
        settings, local = said.of(module)
        if settings is not None and not settings.parameters:  # else the rank may be that of a stack: see `fused`
            check_rank(where, module, rank, settings.rank_of(local), said)
        # An alpha stored with the factors is the one of the training.
        alpha = stored.get(module, settings.alpha_of(local) if settings else float(rank))
        scaling = settings.scaling(alpha, rank) if settings else alpha / rank
        adapted[module] = Adapted(shape, rank, alpha, scaling, keys[module], said)
    return adapted, said, None


def _check_alphas(
    where: str,
    path: Path,
    keys: Mapping[str, Keys],
    ranks: Mapping[str, int],
    stored: Mapping[str, float],
    said: Configured,
) -> None:
    """Checks that every alpha is given or implied by the layout: none is guessed. Raises: UsageError."""
    if path.name == DIFFUSERS_FILE:  # in this file a missing alpha means alpha = rank, whatever the keys
        return
    if any(m not in stored and not k.implied and said.of(m)[0] is None for m, k in keys.items()):
        rank = max(ranks.values())
        example = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": ALPHA}}'
        remedy = f"Put {CONFIG_FILE} into {path.parent} with {example}."
        raise UsageError(where, f"its alpha is not given (its rank is {rank})", remedy)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
