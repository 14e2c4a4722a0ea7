"""Whether a LoRA was made for a base of another architecture: said before anything else about its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from molecli.adapters.coverage import check_base, coverage, foreign_architecture, other_base
from molecli.adapters.info import Adapted, AdapterInfo, read_info
from molecli.adapters.keys import Keys, is_bare, outlined
from molecli.adapters.metadata import named_base
from molecli.adapters.place import components_in
from molecli.adapters.source import lora_files, resolve_source
from molecli.adapters.svdiff import is_svdiff
from molecli.adapters.weights import Shape, metadata_of, opened_lora
from molecli.errors import MismatchError
from molecli.files.lora_spec import LoraLike

_OF_AN_ENCODER = re.compile(r"self_attn|mlp[._]fc")


def check_architecture(spec: LoraLike, matrices: Mapping[str, Shape]) -> None:
    """Checks the names and shapes in the LoRA's files, of any kind of adapter, against a base's `matrices`.

    A missing alpha or a kind that is not read would be said of a LoRA that the user has to replace anyway.
    Raises: UsageError as `lora_files` does; MismatchError that names the family.
    """
    files = lora_files(resolve_source(spec)).files
    shapes: dict[str, Shape] = {}
    base = None
    for component, path in files.items():
        with opened_lora(path) as file:
            metadata = metadata_of(file)
            if is_svdiff(metadata):
                return
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        base = base or named_base(path, metadata)
        found = outlined(stored)
        shapes |= {f"{component}.{m}" if component and is_bare(m) else m: shape for m, shape in found.items()}
    where = next(iter(files.values())) if len(files) == 1 else resolve_source(spec)
    # A text encoder's matrix without a component belongs to the encoder that `place` finds.
    told = {name: shape for name, shape in shapes.items() if not (is_bare(name) and _OF_AN_ENCODER.search(name))}
    foreign = foreign_architecture(told, matrices)
    if foreign is not None:
        raise MismatchError(f"{spec.name} ({where})", foreign, other_base(base))
    whole = {name: shape for name, shape in shapes.items() if len(shape) in (2, 4)}
    if whole and components_in(matrices):
        try:
            covered = coverage(_outline(spec.name, where, whole, base), matrices)
        except MismatchError:  # names that fit two matrices: said when the LoRA is read
            return
        check_base(covered, matrices)


def _outline(name: str, path: Path, shapes: Mapping[str, Shape], base: str | None) -> AdapterInfo:
    """A description of which only the matrices and the base count."""
    keys = Keys(path, "", "")
    adapted = {module: Adapted(shape, 1, 1.0, 1.0, keys) for module, shape in shapes.items()}
    return AdapterInfo(name, "", path, "", 1, 1.0, adapted, base)


def read_info_for(spec: LoraLike, matrices: Mapping[str, Shape]) -> AdapterInfo:
    """`read_info`, for a base with these matrices: a LoRA of another architecture is refused as that.

    Raises: as `check_architecture`, then as `read_info` does.
    """
    check_architecture(spec, matrices)
    return read_info(spec)
