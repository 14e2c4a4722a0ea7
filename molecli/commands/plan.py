"""What a run would do, checked without loading weights, for `--dry-run`; every run begins with the same checks.

make_plan    recipe -> Plan; raises what the run itself would raise for a wrong recipe, LoRA or data file
Plan         what is known beforehand: LoRAs, matrices, gates, steps, passes, memory
plan_lines   a Plan as text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from molecli.adapters import AdapterInfo, Coverage, check_coverage, read_info_for
from molecli.bases.fused import fused_places
from molecli.bases.loading import load_skeleton, pick_device, pick_dtype
from molecli.commands import compose, evaluate
from molecli.commands.domain import Domain, domain_of
from molecli.commands.train_lora import domain_to_train
from molecli.config import AdapterConfig, ComposeRecipe, EvaluateRecipe, ExportRecipe, Recipe, TrainLoraRecipe
from molecli.errors import UsageError
from molecli.experts import Expert, LowRank
from molecli.files.composition import Composition, check_base, load_composition
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.mixture.attach import base_of, specs_of
from molecli.mixture.build import build_mixture
from molecli.mixture.layout import adaptable_matrices
from molecli.protocols import Matrices, Shape
from molecli.suites.origins import Sources, source_lines
from molecli.training.planned_work import PlannedWork

# AdamW keeps a float32 parameter, its gradient and two moments.
BYTES_PER_TRAINED = 16
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class LoraPlan:
    """One LoRA and how much of the base it adapts; `left_out` is the share of its weights in the unmatched matrices."""

    name: str
    source: str
    rank: int
    alpha: float
    matched: int
    unmatched: tuple[str, ...]
    left_out: float = 0.0
    taken_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a run would do: counts, and memory in bytes; None if it does not apply.

    Examples that would be downloaded cannot be counted: `examples` has their limit, if there is one.
    """

    command: str
    base: str
    parameters: int
    dtype: str
    adaptable_matrices: int
    adapted_matrices: int
    mode: str | None = None
    loras: tuple[LoraPlan, ...] = ()
    sites: int | None = None
    trained_parameters: int = 0
    steps: int | None = None
    passes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Sources] = field(default_factory=dict)
    compositions: tuple[dict[str, Any], ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    memory_of: str = ""
    learns_from: str = "examples"
    export: dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return asdict(self)


def make_plan(recipe: Recipe, *, domain: Domain | None = None, fetch: bool = False) -> Plan:
    """The plan of `recipe`. domain: that of the base, if it is known.

    fetch: download examples from public places and count them (RunError if that fails).
    Raises: UsageError and MismatchError, as the run would.
    """
    if isinstance(recipe, ComposeRecipe):
        return _plan_compose(recipe, domain or domain_of(recipe.base))
    if isinstance(recipe, TrainLoraRecipe):
        return _plan_train_lora(recipe, domain or domain_to_train(recipe), fetch=fetch)
    if isinstance(recipe, EvaluateRecipe):
        return _plan_evaluate(recipe, domain, fetch=fetch)
    if isinstance(recipe, ExportRecipe):
        return _plan_export(recipe, domain, fetch=fetch)
    raise UsageError(f"mole {recipe.command}", "it has no dry run", "Leave out --dry-run.")


def _plan_compose(recipe: ComposeRecipe, domain: Domain) -> Plan:
    task: compose.Task = domain.command("compose").prepare(recipe)
    recipe, row = task.recipe, task.row
    skeleton = load_skeleton(recipe.base)
    shapes = adaptable_matrices(skeleton)
    infos = [read_info_for(lora, shapes) for lora in recipe.loras]
    covered = [check_coverage(info, shapes, allow_partial=recipe.allow_partial) for info in infos]
    experts = [_outline(found) for found in covered]
    mixture = build_mixture(
        skeleton,
        experts,
        mode=row.name,
        gate=recipe.gate,
        only=next(iter(recipe.only), None),
        method=recipe.method,
        triggers=task.triggers,
        kinds=task.kinds,
    )
    trained = sum(p.numel() for p in mixture.named_parameters().values())
    examples, passes = {}, {}
    stepped = row.trained and row.level == "site"
    if stepped:
        examples["train"] = task.examples
        micro = recipe.train.micro_batch_size or recipe.train.batch_size
        passes["train"] = round(recipe.train.steps * ceil(recipe.train.batch_size / micro) * task.passes)
    elif row.trained:
        examples["train"] = min(task.examples, recipe.method.examples)
        passes["train"] = recipe.method.evaluations * ceil(examples["train"] / recipe.train.batch_size)
    if recipe.evaluate is not None:
        examples["evaluate"] = task.scored
        methods = 1 + (3 + len(recipe.loras) if recipe.evaluate.baselines else 0)
        passes["evaluate"] = methods * ceil(examples["evaluate"] / recipe.evaluate.batch_size)
    return Plan(
        mode=recipe.mode,
        loras=_lora_plans(infos, covered),
        adapted_matrices=len(mixture.bank.matrices),
        sites=len(mixture.sites) if row.level == "site" else None,
        trained_parameters=trained,
        steps=recipe.train.steps if stepped else recipe.method.evaluations if row.trained else None,
        passes=passes,
        examples=examples,
        memory=_memory(recipe, domain, skeleton, shapes, _factor_count(experts), trained),
        **_shared(recipe, domain, skeleton, shapes),
    )


def _plan_train_lora(recipe: TrainLoraRecipe, domain: Domain, *, fetch: bool) -> Plan:
    skeleton = load_skeleton(recipe.base)
    shapes = adaptable_matrices(skeleton)
    fused = fused_places(skeleton)
    layers = Matrices.of(shapes).without(fused)
    work: PlannedWork = domain.command("plan").to_train(recipe, layers, fetch=fetch)
    held, trained = _adapter_numbers(recipe.adapter, [Matrices.of(shapes).named[name] for name in work.targets])
    micro = recipe.train.micro_batch_size or recipe.train.batch_size
    return Plan(
        adapted_matrices=len(work.targets),
        trained_parameters=trained,
        steps=recipe.train.steps,
        passes={"train": recipe.train.steps * ceil(recipe.train.batch_size / micro)},
        examples={"train": work.count} if work.count else {},
        sources=dict(work.sources),
        memory=_memory(recipe, domain, skeleton, shapes, held, trained),
        **_shared(recipe, domain, skeleton, shapes),
    )


def _plan_evaluate(recipe: EvaluateRecipe, domain: Domain | None, *, fetch: bool) -> Plan:
    compositions = evaluate.read_compositions(recipe)
    domain = domain or evaluate.domain_for(recipe, compositions)
    base = base_of(recipe.base, next(iter(compositions.values()), None))
    skeleton = load_skeleton(base)
    shapes = adaptable_matrices(skeleton)
    work: PlannedWork = domain.command("plan").to_evaluate(recipe, compositions, fetch=fetch)
    infos = [read_info_for(lora, shapes) for lora in work.loras]
    # A LoRA that a composition remembers may match the base in part: that was accepted when it was composed.
    covered = [check_coverage(info, shapes, allow_partial=not recipe.loras) for info in infos]
    made = zip(recipe.compositions, compositions.values(), strict=True)
    return Plan(
        loras=_lora_plans(infos, covered),
        adapted_matrices=len(
            {m for c in compositions.values() for expert in c.experts for m in expert.matrices}
            | {m for found in covered for m in found.matched}
        ),
        passes={"evaluate": work.passes} if work.count else {},
        examples={"evaluate": work.count} if work.count else {},
        sources=dict(work.sources),
        compositions=tuple(_composition(path, c.base, c) for path, c in made),
        **_shared(recipe.model_copy(update={"base": base}), domain, skeleton, shapes),
    )


def _plan_export(recipe: ExportRecipe, domain: Domain | None, *, fetch: bool) -> Plan:
    from molecli.commands import export  # which imports PEFT

    composition = load_composition(str(recipe.composition))
    base = base_of(recipe.base, composition)
    domain = domain or domain_of(base)
    task = export.prepare(recipe, composition, domain)
    layout, count, sources = export.chosen_layout(recipe, task), 0, {}
    if export.needs_inputs(recipe, composition):
        sources, count = dict(task.sources), task.count(fetch=fetch)
    skeleton = load_skeleton(base)
    shapes = adaptable_matrices(skeleton)
    check_base(composition, fingerprint(skeleton), same_base)
    infos = [read_info_for(lora, shapes) for lora in recipe.loras or specs_of(composition)]
    # A LoRA that a composition remembers may match the base in part: that was accepted when it was composed.
    covered = [check_coverage(info, shapes, allow_partial=True) for info in infos]
    return Plan(
        loras=_lora_plans(infos, covered),
        adapted_matrices=len({matrix for record in composition.experts for matrix in record.matrices}),
        examples={"calibrate": count} if count else {},
        sources=sources,
        compositions=(_composition(str(recipe.composition), base.id, composition),),
        export={"format": layout, "rank": recipe.rank, "dtype": recipe.dtype},
        **_shared(recipe.model_copy(update={"base": base}), domain, skeleton, shapes),
    )


def _composition(path: str, base: str, composition: Composition) -> dict[str, Any]:
    return {"path": path, "mode": composition.mode, "base": base, "experts": list(composition.names)}


def _adapter_numbers(adapter: AdapterConfig, shapes: Sequence[Shape]) -> tuple[int, int]:
    """(how many numbers an adapter needs besides the base, how many of them train).

    SVDiff trains a shift per singular value (fewer if one repeats) and keeps the singular vectors in memory.
    """
    if adapter.method == "lora":
        return 0, sum(_factor_numbers(shape, adapter.rank) for shape in shapes)
    widths = [min(shape[0], prod(shape[1:])) for shape in shapes]
    return sum(_factor_numbers(shape, width) for shape, width in zip(shapes, widths, strict=True)), sum(widths)


def _factor_numbers(shape: Shape, rank: int) -> int:
    """How many numbers the two factors have at that rank; in a convolution A has the kernel and B is 1x1."""
    return rank * (prod(shape[1:]) + shape[0])


def _outline(found: Coverage) -> Expert:
    """The LoRA as an expert whose factors have their shapes but no memory: one zero, expanded."""
    info, zero = found.info, torch.zeros(1)
    factors = {}
    for name in found.matched:
        matrix = info.adapted[name]
        A = zero.view([1] * len(matrix.shape)).expand(matrix.rank, *matrix.shape[1:])
        factors[name] = LowRank(A, zero.view(1, 1).expand(matrix.shape[0], matrix.rank), matrix.scaling)
    return Expert(info.name, factors, info.source, info.sha256, info.rank, info.alpha)


def _lora_plans(infos: Sequence[AdapterInfo], covered: Sequence[Coverage]) -> tuple[LoraPlan, ...]:
    return tuple(
        LoraPlan(
            info.name,
            info.source,
            info.rank,
            info.alpha,
            len(found.matched),
            found.unmatched,
            found.left_out,
            found.info.taken_for,
        )
        for info, found in zip(infos, covered, strict=True)
    )


def _shared(recipe: Any, domain: Domain, skeleton: nn.Module, shapes: Shapes) -> dict[str, Any]:
    plan = domain.command("plan")
    return {
        "command": recipe.command,
        "memory_of": plan.at_once(_rows(recipe)),
        "learns_from": plan.LEARNS_FROM,
        "base": recipe.base.id,
        "parameters": _count(skeleton.parameters()),
        "dtype": _dtype_name(recipe),
        "adaptable_matrices": len(shapes),
        "output": recipe.output,
        "recipe": recipe.model_dump(mode="json"),
    }


def _memory(
    recipe: Any, domain: Domain, skeleton: nn.Module, shapes: Shapes, factors: int, trained: int
) -> dict[str, int]:
    """Estimated bytes at the peak of a training step: base, stacked experts, what trains, one copy of activations."""
    width = getattr(torch, _dtype_name(recipe)).itemsize
    parts = {
        "base": _count(skeleton.parameters()) * width,
        "experts": factors * width,
        "trained": trained * BYTES_PER_TRAINED,
        "activations": domain.command("plan").kept_bytes(skeleton, shapes, rows=_rows(recipe), width=width),
    }
    return {**parts, "total": sum(parts.values())}


def _rows(recipe: Any) -> int:
    """Examples or pictures at once in training."""
    return (recipe.train.micro_batch_size or recipe.train.batch_size) if hasattr(recipe, "train") else 0


def _dtype_name(recipe: Any) -> str:
    return str(pick_dtype(recipe.base.dtype, pick_device(recipe.device))).removeprefix("torch.")


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _factor_count(experts: Sequence[Expert]) -> int:
    return sum(f.A.numel() + f.B.numel() for expert in experts for f in expert.factors.values())


def plan_lines(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    lines = [
        f"base      {plan.base}: {plan.parameters:,} parameters, {plan.dtype}",
        f"matrices  {plan.adapted_matrices} adapted of {plan.adaptable_matrices}",
    ]
    for lora in plan.loras:
        missing = f", {len(lora.unmatched)} not in this base" if lora.unmatched else ""
        share = f" ({lora.left_out:.1%} of its weights)" if lora.unmatched else ""
        size = f"rank {lora.rank}, alpha {lora.alpha:g}, {lora.matched} matrices"
        lines.append(f"lora      {lora.name}: {size}{missing}{share}")
        lines += [f"          {text}" for text in lora.taken_for]
    for composition in plan.compositions:
        names = ", ".join(composition["experts"])
        lines.append(f"compose   {composition['path']}: {composition['mode']} of {names}")
    if plan.mode:
        sites = f", {plan.sites} sites" if plan.sites is not None else ""
        lines.append(f"mode      {plan.mode}{sites}")
    if plan.export:
        rank = "exact" if plan.export["rank"] is None else f"rank {plan.export['rank']} at most"
        lines.append(f"export    {plan.export['format']}, {plan.export['dtype']}, {rank}")
    if plan.steps is not None:
        lines.append(f"training  {plan.trained_parameters:,} parameters, {plan.steps} steps")
    for sources in plan.sources.values():
        lines += source_lines(sources)
    for part, count in plan.examples.items():
        most = "at most " if part in plan.sources and plan.sources[part].online else ""
        lines.append(
            f"{part:9} {most}{count:,} {plan.learns_from}"
            + (f", {plan.passes[part]:,} passes" if part in plan.passes else "")
        )
    if plan.memory:
        parts = ", ".join(f"{name} {_size(n)}" for name, n in plan.memory.items() if name != "total")
        lines.append(f"memory    about {_size(plan.memory['total'])} ({parts}; {plan.memory_of})")
    lines.append(f"output    {plan.output}")
    return lines


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
