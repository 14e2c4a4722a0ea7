"""A LoRA's modules under the names that a base gives its matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from molecli.adapters.blocks import original_names
from molecli.adapters.info import AdapterInfo
from molecli.adapters.keys import CLIP_PREFIX, KOHYA, component_of, is_bare, underscored
from molecli.adapters.weights import Shape
from molecli.errors import MismatchError
from molecli.files.lora_spec import COMPONENTS


def place(info: AdapterInfo, matrices: Mapping[str, Shape]) -> AdapterInfo:
    """`info` under the names and in the shapes of a base's `matrices`; what the base does not have stays as it is.

    A matrix stored as a 1x1 convolution and one stored as a linear layer are the same: the base's shape is taken.
    Raises: MismatchError where a name could mean two matrices, or two names mean one.
    """
    names = _resolved(info, matrices)
    adapted = {}
    sources: dict[str, str] = {}
    for module, matrix in info.adapted.items():
        name = names.get(module, module)
        if name in sources:
            what = f"{sources[name]!r} and {module!r} both adapt {name!r}"
            raise MismatchError(info.where, what, "Leave one of them out of the file.")
        sources[name] = module
        adapted[name] = replace(matrix, shape=_as_in_base(matrix.shape, matrices.get(name)))
    return replace(info, adapted=adapted)


def components_in(names: Iterable[str]) -> tuple[str, ...]:
    """The components of a pipeline that matrix names mention, in order; none for a language model."""
    found = {component_of(name) for name in names}
    return tuple(component for component in COMPONENTS if component in found)


def _resolved(info: AdapterInfo, matrices: Mapping[str, Shape]) -> dict[str, str]:
    """module -> matrix, for the modules of `info` that the base has under another name."""
    wanted = {module: matrix.shape for module, matrix in info.adapted.items() if module not in matrices}
    if not wanted or not components_in(matrices):
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
    """(spelling, matrix) for every spelling of every matrix; "text_model." is left out of all of them."""
    matrices = list(matrices)
    originals = original_names(n.removeprefix("unet.") for n in matrices if n.startswith("unet."))
    for name in matrices:
        component, _, path = name.partition(".")
        path = path.removeprefix(CLIP_PREFIX)
        yield f"{component}.{path}", name
        for start in (start for start, owner in KOHYA.items() if owner == component):
            yield start + underscored(path), name
            if component == "unet" and path in originals:
                yield start + underscored(originals[path]), name


def _spelled(module: str) -> str:
    """`module` as `_spellings` has it."""
    start = next((start for start in KOHYA if module.startswith(start)), "")
    if start:
        return start + module.removeprefix(start).removeprefix(underscored(CLIP_PREFIX))
    component, _, path = module.partition(".")
    return f"{component}.{path.removeprefix(CLIP_PREFIX)}"


def _component_of_bare(
    where: str, bare: Mapping[str, Shape], known: Mapping[str, list[str]], matrices: Mapping[str, Shape]
) -> str | None:
    """The component that names without one belong to: that which has most of them, and in their shapes; None if none.

    Raises: MismatchError when two encoders have all of them alike.
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
        what = f"does not say whether it adapts {' or '.join(best)}, and both would do"
        raise MismatchError(where, what, f"Put it into a subfolder named after the one it was trained on: {best[0]}/.")
    return best[0]


def _as_in_base(shape: Shape, base: Shape | None) -> Shape:
    """`shape`, or the base's where the two differ by a 1x1 kernel's axes alone."""
    if base is not None and shape[:2] == tuple(base[:2]) and {*shape[2:], *base[2:]} <= {1}:
        return tuple(base)
    return shape
