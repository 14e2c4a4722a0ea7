"""LoRAs on the routed experts of a mixture-of-experts base, whose weights transformers keeps as fused parameters.

A fused parameter [E, ., .] has one matrix per routed expert: that of expert 3 in the parameter `gate_up_proj` of the
module M is called "M.3.gate_up_proj". Merges, coverage and exports treat it like every other matrix. A parameter [., .]
that no linear layer holds, such as a router's, is one matrix: "M", or "M.w1" if it is not called `weight`. Files hold:

stacked     PEFT's `target_parameters`: M.lora_A [E·r, d_in] and M.lora_B [d_out, r·E] for the module's last parameter,
            M.base_layer.lora_A for the one before it, and so on
by expert   M.3.gate_proj.lora_A, from when each routed expert had linear layers; gate and up are now rows of one matrix

Contents: matrix_name, unfused, slice_of, EXPERT_LAYERS.
Source of both layouts: peft.tuners.lora.layer.ParamWrapper, peft.utils.transformers_weight_conversion.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from molecli.adapters.info import Adapted, AdapterInfo
from molecli.adapters.module_names import plain
from molecli.adapters.weights import Shape, check_rank
from molecli.errors import MismatchError

_INNER = ".base_layer"
# A matrix of one routed expert: module, expert, parameter (or the linear layer that the expert used to have).
_OF_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
# Linear layer of one expert -> (the parameter that it is now a part of, which of its two halves; None for all of it).
_PARTS: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
    "fc1": ("gate_up_proj", 0),
    "fc3": ("gate_up_proj", 1),
    "fc2": ("down_proj", None),
}
# Names of linear layers that routed experts and routers had; PEFT takes every layer of such a name for one of those.
EXPERT_LAYERS = frozenset({"gate", "down_proj", *_PARTS})
# module -> parameter -> its matrices, in the base's order.
_Parameters = Mapping[str, Mapping[str, list[str]]]


def matrix_name(module: str, parameter: str, expert: int | None = None) -> str:
    """The name of the matrix of one routed expert, or (None) of a parameter that is one matrix."""
    if expert is not None:
        return f"{module}.{expert}.{parameter}"
    return module if parameter == "weight" else f"{module}.{parameter}"


def unfused(info: AdapterInfo, matrices: Mapping[str, Shape]) -> AdapterInfo:
    """`info` with the names of the base's `matrices` for all that it adapts in fused parameters.

    What the base lacks stays unchanged. Raises: MismatchError if the factors do not fit the parameters that the LoRA's
    configuration names.
    """
    parameters = _parameters(matrices)
    moved = _moved(info.adapted, parameters)
    adapted: dict[str, Adapted] = {}
    stacks: dict[tuple[str, str], dict[int, Adapted]] = defaultdict(dict)
    for old, matrix in info.adapted.items():
        renamed = _renamed(old, moved)
        name = renamed if old not in matrices and _known(renamed, matrices, parameters) else old
        module, named = _outside(name), _outside(old)
        if module in parameters and _targeted(named, parameters[module], matrix, name in matrices):
            stacks[module, named][(len(name) - len(module)) // len(_INNER)] = matrix
        else:
            if name in matrices:
                _check_plain(info, old, matrix)
            adapted[name] = matrix
    for (module, named), levels in stacks.items():
        adapted |= _unstacked(info, named, levels, parameters[module])
    return replace(info, adapted=_gathered(adapted, matrices))


def slice_of(a: Tensor, b: Tensor, expert: int, experts: int) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] of one routed expert, from stacked A [E·r, d_in] and B [d_out, r·E].

    A holds the experts one after the other; B holds, rank by rank, one column of every expert.
    """
    return a.reshape(experts, -1, a.shape[1])[expert], b.reshape(b.shape[0], -1, experts)[..., expert]


def _parameters(matrices: Iterable[str]) -> _Parameters:
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in matrices:
        of_expert = _OF_EXPERT.fullmatch(name)
        if of_expert is not None:
            found[of_expert["module"]][of_expert["leaf"]].append(name)
        parent, _, leaf = name.rpartition(".")
        found[parent][leaf].append(name)
        found[name]["weight"].append(name)
    return found


def _targeted(module: str, parameters: Mapping[str, list[str]], matrix: Adapted, plain: bool) -> bool:
    """Whether the factors at `module` belong to its own parameters; `plain`: the base has a matrix of this name."""
    named = matrix.parameters
    if not named:
        return False
    return bool(_chosen(module, parameters, named)) or not plain


def _chosen(module: str, parameters: Iterable[str], named: Iterable[str]) -> list[str]:
    """Those of the module's parameters that the configuration names, by their ends as in PEFT."""
    full = {parameter: f"{module}.{parameter}" for parameter in parameters}
    return [p for p, name in full.items() if any(name == end or name.endswith(f".{end}") for end in named)]


def _unstacked(
    info: AdapterInfo, module: str, levels: Mapping[int, Adapted], parameters: Mapping[str, list[str]]
) -> dict[str, Adapted]:
    """The matrices of a module's parameters, from the factors at each level of PEFT's nesting (0 is the last).

    module: its name in the file, which patterns and target_parameters refer to.
    """
    chosen = _chosen(module, parameters, next(iter(levels.values())).parameters)
    if sorted(levels) != list(range(len(chosen))):
        what = f"target_parameters names {len(chosen)} parameters of {module!r} in this base"
        what += f" ({', '.join(chosen)}), and the file has factors for {len(levels)}"
        raise MismatchError(info.where, what, "Name the base it was trained on with --base.")
    found = {}
    for level, parameter in enumerate(reversed(chosen)):
        matrix, names, name = levels[level], parameters[parameter], f"{module}.{parameter}"
        settings, local = matrix.said.of(name)
        assert settings is not None  # it names the parameters
        rank = settings.rank_of(local)
        if matrix.rank != rank * len(names):
            what = f"its factors of {name!r} have {matrix.rank} rows, not {len(names)} times the rank {rank}: that "
            what += f"parameter has {len(names)} matrices in this base"
            raise MismatchError(info.where, what, "Name the base it was trained on with --base.")
        alpha = settings.alpha_of(local)
        part = replace(matrix, rank=rank, alpha=alpha, scaling=settings.scaling(alpha, rank))
        if len(names) == 1:
            found[names[0]] = part
        else:
            for i, of_expert in enumerate(names):
                found[of_expert] = replace(part, keys=replace(matrix.keys, expert=(i, len(names))))
    return found


def _check_plain(info: AdapterInfo, name: str, matrix: Adapted) -> None:
    """Checks the rank of a matrix that is no stack, which a file with stacks leaves open."""
    settings, local = matrix.said.of(name)
    if settings is not None and settings.parameters:
        check_rank(info.where, name, matrix.rank, settings.rank_of(local), matrix.said)


def _gathered(adapted: Mapping[str, Adapted], matrices: Mapping[str, Shape]) -> dict[str, Adapted]:
    """`adapted` with the linear layers of single experts as (parts of) the matrices that they are now."""
    found: dict[str, Adapted] = {}
    parts: dict[str, list[tuple[int, Adapted]]] = defaultdict(list)
    for name, matrix in adapted.items():
        target, half = _now(name)
        if name in matrices or target not in matrices:
            found[name] = matrix
        elif half is None:
            found[target] = matrix
        else:
            parts[target].append((half, matrix))
    return found | {target: _joined(halves) for target, halves in parts.items()}


def _now(name: str) -> tuple[str, int | None]:
    """(the matrix that a linear layer of one expert is now part of, which half of it; None for all); "" for others."""
    of_expert = _OF_EXPERT.fullmatch(name)
    parameter, half = _PARTS.get(of_expert["leaf"], ("", None)) if of_expert else ("", None)
    return (matrix_name(of_expert["module"], parameter, int(of_expert["expert"])) if of_expert else ""), half


def _known(name: str, matrices: Mapping[str, Shape], parameters: _Parameters) -> bool:
    """Whether the base has what `name` means."""
    return name in matrices or _now(name)[0] in matrices or _outside(name) in parameters


def _joined(halves: list[tuple[int, Adapted]]) -> Adapted:
    """One matrix whose upper and lower half (0 and 1) the given ones update."""
    shapes = {matrix.shape for _, matrix in halves}
    rows, columns = max(shapes)
    scalings = {matrix.scaling for _, matrix in halves}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    rank = sum(matrix.rank for _, matrix in halves)
    first = halves[0][1]
    return replace(
        first,
        shape=(2 * rows, columns),
        rank=rank,
        alpha=scaling * rank,
        scaling=scaling,
        parts=tuple((half * rows, matrix) for half, matrix in sorted(halves, key=lambda pair: pair[0])),
    )


def _moved(adapted: Iterable[str], parameters: _Parameters) -> dict[str, str]:
    """Old path -> path in the base, where routed experts have another name (block_sparse_moe -> mlp, other prefixes).

    They are found by block and last name, if these mean only one module of the base.
    """
    stacks = {module for module, held in parameters.items() if any(len(names) > 1 for names in held.values())}
    here: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in stacks:
        here[_block_and_leaf(module)].append(module)
    moved = {}
    for name in adapted:
        of_expert = _OF_EXPERT.fullmatch(name)
        module = of_expert["module"] if of_expert else _outside(name)
        block, leaf = _block_and_leaf(module)
        alike = here.get((block, leaf), [])
        # Of several, the one whose whole name it ends with, without the parts of wrappers.
        candidates = [one for one in alike if f".{plain(module)}".endswith(f".{one}")] or alike
        if block and module not in stacks and len(candidates) == 1:
            old, new = module.rpartition(".")[0], candidates[0].rpartition(".")[0]
            moved[f"{old}."] = f"{new}."
    return moved


def _outside(name: str) -> str:
    """The module whose factors `name` has in PEFT's nesting."""
    while name.endswith(_INNER):
        name = name.removesuffix(_INNER)
    return name


def _block_and_leaf(module: str) -> tuple[str, str]:
    block = re.match(r"(?:.*?\.)?(\w+\.\d+)\.", f"{module}.")
    return (block[1] if block else ""), module.rpartition(".")[2]


def _renamed(name: str, moved: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in moved.items() if name.startswith(old)), name)
