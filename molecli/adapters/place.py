"""Renames the modules of a LoRA to the matrices of a base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from molecli.adapters.blocks import original_names
from molecli.adapters.fused import unfused
from molecli.adapters.info import AdapterInfo
from molecli.adapters.keys import CLIP_PREFIX, component_of, is_bare, underscored
from molecli.adapters.module_names import plain, resolved, taken_for
from molecli.adapters.prefixes import KOHYA
from molecli.adapters.weights import Shape
from molecli.errors import MismatchError
from molecli.files.lora_spec import COMPONENTS
from molecli.protocols import Matrices


def place(info: AdapterInfo, matrices: Mapping[str, Shape]) -> AdapterInfo:
    """`info` with the names and shapes of a base's `matrices`; matrices that the base lacks stay unchanged.

    A 1x1 convolution and a linear layer count as the same, and the base's shape is used. `taken_for` says which names
    of a language model's modules were read as others.
    Raises: MismatchError if a name fits two matrices, or two names fit one.
    """
    base = Matrices.of(matrices)
    pipeline, matrices = bool(components_in(base)), base.named
    info = unfused(info, matrices)
    names = _in_pipeline(info, matrices) if pipeline else resolved(info.where, info.matrices, base)
    adapted = {}
    sources: dict[str, str] = {}
    for module, matrix in info.adapted.items():
        name = names.get(module, module)
        if name in sources:
            what = f"{sources[name]!r} and {module!r} both adapt {name!r}"
            raise MismatchError(info.where, what, "Leave one of them out of the file.")
        sources[name] = module
        adapted[name] = replace(matrix, shape=_as_in_base(matrix.shape, matrices.get(name)))
    return replace(info, adapted=adapted, taken_for=() if pipeline else taken_for(names.items()))


def components_in(names: Iterable[str]) -> tuple[str, ...]:
    """The components of a pipeline in the matrix names, in order; () for a language model."""
    found = {component_of(name) for name in names}
    return tuple(component for component in COMPONENTS if component in found)


def _in_pipeline(info: AdapterInfo, matrices: Mapping[str, Shape]) -> dict[str, str]:
    """module -> matrix, for the modules of `info` that have another name in the base."""
    wanted = {module: matrix.shape for module, matrix in info.adapted.items() if module not in matrices}
    if not wanted:
        return {}
    known: dict[str, list[str]] = defaultdict(list)
    for alias, name in _spellings(matrices):
        if name not in known[alias]:
            known[alias].append(name)
    bare = {module: shape for module, shape in wanted.items() if is_bare(module)}
    owner = _component_of_bare(info.where, bare, known, matrices)
    names: dict[str, str] = {}
    for module in wanted:
        candidates = known.get(_spelled(f"{owner}.{module}" if owner and is_bare(module) else module), [])
        if len(candidates) > 1:
            what = f"{module!r} could mean {' or '.join(map(repr, candidates))} in this base"
            raise MismatchError(info.where, what, "Convert it to the diffusers layout.")
        if candidates:
            names[module] = candidates[0]
    return names


def _spellings(matrices: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(spelling, matrix) for all spellings of all matrices, without "text_model."."""
    matrices = list(matrices)
    originals = original_names(n.removeprefix("unet.") for n in matrices if n.startswith("unet."))
    for name in matrices:
        component, _, path = name.partition(".")
        path = path.removeprefix(CLIP_PREFIX)
        yield f"{component}.{path}", name
        if component == "unet" and path in originals:
            yield f"unet.{originals[path]}", name
        for start in (start for start, owner in KOHYA.items() if owner == component):
            yield start + underscored(path), name
            if component == "unet" and path in originals:
                yield start + underscored(originals[path]), name


def _spelled(module: str) -> str:
    """`module` in the form of `_spellings`."""
    module = plain(module)
    start = next((start for start in KOHYA if module.startswith(start)), "")
    if start:
        return start + module.removeprefix(start).removeprefix(underscored(CLIP_PREFIX))
    component, _, path = module.partition(".")
    return f"{component}.{path.removeprefix(CLIP_PREFIX)}"


def _component_of_bare(
    where: str, bare: Mapping[str, Shape], known: Mapping[str, list[str]], matrices: Mapping[str, Shape]
) -> str | None:
    """The component of names without one: the component that has most of them in their shapes; None if none has any.

    Raises: MismatchError if two encoders fit equally well.
    """

    def fit(component: str) -> tuple[int, int]:
        named = [(s, known[key]) for m, s in bare.items() if (key := _spelled(f"{component}.{m}")) in known]
        alike = [s for s, names in named if _as_in_base(s, matrices[names[0]]) == tuple(matrices[names[0]])]
        return len(named), len(alike)

    fits = {component: fit(component) for component in COMPONENTS}
    most = max(fits.values())
    best = [component for component in COMPONENTS if fits[component] == most]
    if most == (0, 0):
        return None
    if len(best) > 1:
        what = f"it does not say whether it adapts {' or '.join(best)}, and it fits both"
        raise MismatchError(where, what, f"Put it into a subfolder with the name of the right one, such as {best[0]}/.")
    return best[0]


def _as_in_base(shape: Shape, base: Shape | None) -> Shape:
    """`shape`, or the base's shape if they differ only by the axes of a 1x1 kernel."""
    if base is not None and shape[:2] == tuple(base[:2]) and {*shape[2:], *base[2:]} <= {1}:
        return tuple(base)
    return shape
