"""What a run would do, checked without loading weights: `--dry-run`, and the first look of every run.

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

from molecli.backbones.layouts import adaptable_matrices
from molecli.backbones.loading import load_skeleton, pick_device, pick_dtype
from molecli.backbones.pipeline import PipelineModules
from molecli.catalog import BUILTIN_PREFIX
from molecli.compose import get_method
from molecli.compose.options import check_options, told
from molecli.engine.attach import specs_of
from molecli.engine.compose import domain_of
from molecli.engine.data import load_tasks, split_tasks
from molecli.engine.evaluate import chosen
from molecli.engine.mixing import build_mixture
from molecli.engine.sample import base_of
from molecli.engine.sources import Sources, find_sources, source_lines
from molecli.errors import UsageError
from molecli.experts import Expert, LowRank
from molecli.files.adapters import AdapterInfo, Coverage, check_coverage, read_info
from molecli.files.composition import check_base, load_composition
from molecli.files.recipe import (
    AdapterConfig,
    ComposeRecipe,
    DataConfig,
    EvalDataConfig,
    EvaluateRecipe,
    ExportRecipe,
    Recipe,
    TrainLoraRecipe,
)
from molecli.functional.fingerprint import fingerprint, same_base
from molecli.protocols import Shape
from molecli.suites import load_suite, select_tasks

# A guess at the length of an example, prompt and target: real lengths need the tokenizer and every line.
TOKENS_PER_EXAMPLE = 256
# AdamW keeps a float32 parameter, its gradient and two moments.
BYTES_PER_TRAINED = 16
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class LoraPlan:
    """One LoRA and how much of the base it adapts."""

    name: str
    source: str
    rank: int
    alpha: float
    matched: int
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a run would do. Counts are numbers of things, memory is in bytes; None where it does not apply.

    Examples that would be fetched are not counted: of them, `examples` holds at most what a limit allows, else nothing.
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
        """The plan as JSON would hold it."""
        return asdict(self)


def make_plan(recipe: Recipe, *, fetch: bool = False) -> Plan:
    """The plan of `recipe`. Raises: UsageError and MismatchError as the run would.

    fetch: examples from public places are fetched and counted, and a RunError raised where they cannot be.
    """
    if isinstance(recipe, ComposeRecipe):
        return _plan_compose(recipe)
    if isinstance(recipe, TrainLoraRecipe):
        return _plan_train_lora(recipe, fetch=fetch)
    if isinstance(recipe, EvaluateRecipe):
        return _plan_evaluate(recipe, fetch=fetch)
    if isinstance(recipe, ExportRecipe):
        return _plan_export(recipe, fetch=fetch)
    raise UsageError(f"mole {recipe.command}", "it has no dry run", "Leave out --dry-run.")


def _plan_compose(recipe: ComposeRecipe) -> Plan:
    domain = domain_of(recipe)
    recipe = domain.recipe
    infos = [read_info(lora) for lora in recipe.loras]
    skeleton = load_skeleton(recipe.base)
    shapes = adaptable_matrices(skeleton)
    covered = [check_coverage(info, shapes, allow_partial=recipe.allow_partial) for info in infos]
    experts = [_outline(found) for found in covered]
    mixture = build_mixture(
        skeleton,
        experts,
        mode=recipe.mode,
        gate=recipe.gate,
        only=next(iter(recipe.only), None),
        method=recipe.method,
        triggers=domain.triggers,
        kinds=domain.kinds,
    )
    row, gated = get_method(recipe.mode), get_method(recipe.mode).level == "site"
    trained = sum(p.numel() for p in mixture.named_parameters().values())
    examples, passes = {}, {}
    stepped = row.trained and gated
    if stepped:
        examples["train"] = domain.examples
        micro = recipe.train.micro_batch_size or recipe.train.batch_size
        passes["train"] = round(recipe.train.steps * ceil(recipe.train.batch_size / micro) * domain.passes)
    elif row.trained:
        examples["train"] = min(domain.examples, recipe.method.examples)
        passes["train"] = recipe.method.evaluations * ceil(examples["train"] / recipe.train.batch_size)
    if recipe.evaluate is not None:
        examples["evaluate"] = _count_examples(recipe.evaluate.data)
        methods = 1 + (3 + len(recipe.loras) if recipe.evaluate.baselines else 0)
        passes["evaluate"] = methods * ceil(examples["evaluate"] / recipe.evaluate.batch_size)
    return Plan(
        command=recipe.command,
        mode=recipe.mode,
        loras=tuple(_lora_plan(info, found) for info, found in zip(infos, covered, strict=True)),
        adapted_matrices=len(mixture.bank.matrices),
        sites=len(mixture.sites) if gated else None,
        trained_parameters=trained,
        steps=recipe.train.steps if stepped else recipe.method.evaluations if row.trained else None,
        passes=passes,
        examples=examples,
        memory=_memory(recipe, skeleton, shapes, _factor_count(experts), trained),
        **_shared(recipe, skeleton, shapes),
    )


def _plan_train_lora(recipe: TrainLoraRecipe, *, fetch: bool) -> Plan:
    skeleton = load_skeleton(recipe.base)
    shapes = adaptable_matrices(skeleton)
    if recipe.pictures is not None or isinstance(skeleton, PipelineModules):
        from molecli.engine.images.plan import plan_pictures

        targets, count = plan_pictures(recipe, shapes)
        sources = {}
    else:
        from molecli.engine.train_lora import target_matrices  # imports PEFT, which the other plans can do without

        targets, sources = target_matrices(recipe.adapter.targets, shapes), {"train": find_sources(recipe.data)}
        count = _count_examples(recipe.data, fetch=fetch)
    held, trained = _adapter_numbers(recipe.adapter, [shapes[name] for name in targets])
    micro = recipe.train.micro_batch_size or recipe.train.batch_size
    return Plan(
        command=recipe.command,
        adapted_matrices=len(targets),
        trained_parameters=trained,
        steps=recipe.train.steps,
        passes={"train": recipe.train.steps * ceil(recipe.train.batch_size / micro)},
        examples={"train": count} if count else {},
        sources=sources,
        memory=_memory(recipe, skeleton, shapes, held, trained),
        **_shared(recipe, skeleton, shapes),
    )


def _plan_evaluate(recipe: EvaluateRecipe, *, fetch: bool) -> Plan:
    compositions = [(path, load_composition(path)) for path in recipe.compositions]
    base = recipe.base or _base_of([composition.recipe for _, composition in compositions])
    skeleton = load_skeleton(base)
    shapes = adaptable_matrices(skeleton)
    if isinstance(skeleton, PipelineModules):
        from molecli.engine.images.plan_evaluate import plan_scenes

        scenes = plan_scenes(recipe)
        infos, count, passes = [read_info(lora) for lora in scenes.loras], scenes.pictures, scenes.passes
        sources = {}
    else:
        loras, modes = chosen(recipe, dict(compositions), builtin=base.id.startswith(BUILTIN_PREFIX))
        check_options(recipe.method, told(modes))
        needed = loras if set(modes) - {"base"} else recipe.loras
        infos, sources = [read_info(lora) for lora in needed], {"evaluate": find_sources(recipe.eval.data)}
        count = _count_examples(recipe.eval.data, fetch=fetch)
        unmixed = {"base": 1, "single": len(infos)}
        methods = len(recipe.switched) * (len(compositions) + sum(mode not in unmixed for mode in modes))
        methods += sum(unmixed.get(mode, 0) for mode in modes)
        passes = methods * ceil(count / recipe.eval.batch_size)
    # A LoRA that a composition remembers may match the base in part: that was accepted when it was composed.
    covered = [check_coverage(info, shapes, allow_partial=not recipe.loras) for info in infos]
    return Plan(
        command=recipe.command,
        loras=tuple(_lora_plan(info, found) for info, found in zip(infos, covered, strict=True)),
        adapted_matrices=len(
            {m for _, c in compositions for expert in c.experts for m in expert.matrices}
            | {m for found in covered for m in found.matched}
        ),
        passes={"evaluate": passes} if count else {},
        examples={"evaluate": count} if count else {},
        sources=sources,
        compositions=tuple(
            {"path": path, "mode": c.mode, "base": c.base, "experts": list(c.names)} for path, c in compositions
        ),
        **_shared(recipe.model_copy(update={"base": base}), skeleton, shapes),
    )


def _plan_export(recipe: ExportRecipe, *, fetch: bool) -> Plan:
    from molecli.engine.export import chosen_layout, export_domain, needs_inputs  # which imports PEFT

    composition = load_composition(str(recipe.composition))
    domain = export_domain(recipe, composition)
    layout, data, count, sources = chosen_layout(recipe, domain), domain.data, 0, {}
    if needs_inputs(recipe, composition):
        sources = {} if data is None else {"calibrate": find_sources(data)}
        online = any(found.online for found in sources.values())
        count = _count_examples(data, fetch=fetch) if data is not None and online else domain.inputs
    base = base_of(recipe.base, composition)
    skeleton = load_skeleton(base)
    shapes = adaptable_matrices(skeleton)
    check_base(composition, fingerprint(skeleton), same_base)
    infos = [read_info(lora) for lora in recipe.loras or specs_of(composition)]
    # A LoRA that a composition remembers may match the base in part: that was accepted when it was composed.
    covered = [check_coverage(info, shapes, allow_partial=True) for info in infos]
    made = {"path": recipe.composition, "mode": composition.mode, "base": base.id, "experts": list(composition.names)}
    return Plan(
        command=recipe.command,
        loras=tuple(_lora_plan(info, found) for info, found in zip(infos, covered, strict=True)),
        adapted_matrices=len({matrix for record in composition.experts for matrix in record.matrices}),
        examples={"calibrate": count} if count else {},
        sources=sources,
        compositions=(made,),
        export={"format": layout, "rank": recipe.rank, "dtype": recipe.dtype},
        **_shared(recipe.model_copy(update={"base": base}), skeleton, shapes),
    )


def _base_of(recipes: Sequence[str]) -> Any:
    """The base that the compositions' own recipes name; the built-in one without any."""
    import yaml

    from molecli.files.recipe import BaseConfig

    return BaseConfig.model_validate(yaml.safe_load(recipes[0])["base"]) if recipes else BaseConfig()


def _adapter_numbers(adapter: AdapterConfig, shapes: Sequence[Shape]) -> tuple[int, int]:
    """(numbers that an adapter needs beside the base, numbers of it that train).

    Of shifts there is one for each singular value (fewer where one repeats), and the singular vectors stay.
    """
    if adapter.method == "lora":
        return 0, sum(_factor_numbers(shape, adapter.rank) for shape in shapes)
    widths = [min(shape[0], prod(shape[1:])) for shape in shapes]
    return sum(_factor_numbers(shape, width) for shape, width in zip(shapes, widths, strict=True)), sum(widths)


def _factor_numbers(shape: Shape, rank: int) -> int:
    """The numbers in the two factors of rank `rank`: of a convolution, A has its kernel and B is 1x1."""
    return rank * (prod(shape[1:]) + shape[0])


def _outline(found: Coverage) -> Expert:
    """The LoRA as an expert whose factors have shapes and no memory: one zero, seen at every place."""
    info, zero = found.info, torch.zeros(1)
    factors = {}
    for name in found.matched:
        matrix = info.adapted[name]
        A = zero.view([1] * len(matrix.shape)).expand(matrix.rank, *matrix.shape[1:])
        factors[name] = LowRank(A, zero.view(1, 1).expand(matrix.shape[0], matrix.rank), matrix.scaling)
    return Expert(info.name, factors, info.source, info.sha256, info.rank, info.alpha)


def _lora_plan(info: AdapterInfo, found: Coverage) -> LoraPlan:
    return LoraPlan(info.name, info.source, info.rank, info.alpha, len(found.matched), found.unmatched)


def _count_examples(data: DataConfig, *, fetch: bool = True) -> int:
    """The number of examples; unless they are to be fetched, of those online what the limit allows, 0 without one."""
    if not fetch and find_sources(data).online:
        suite = load_suite(data.suite, files=data.files)
        return (data.limit or 0) * len(select_tasks(suite, data.tasks, data.data_dir))
    tasks = load_tasks(data) if data.holdout == 0 else split_tasks(data)[isinstance(data, EvalDataConfig)]
    return sum(map(len, tasks.values()))


def _shared(recipe: Any, skeleton: nn.Module, shapes: Shapes) -> dict[str, Any]:
    pictures = isinstance(skeleton, PipelineModules)
    at_once = recipe.train.micro_batch_size or recipe.train.batch_size if hasattr(recipe, "train") else 0
    shown = f"{at_once} picture{'s' if at_once > 1 else ''} at once"
    return {
        "memory_of": shown if pictures else f"{TOKENS_PER_EXAMPLE} tokens an example",
        "learns_from": "pictures" if pictures else "examples",
        "base": recipe.base.id,
        "parameters": _count(skeleton.parameters()),
        "dtype": _dtype_name(recipe),
        "adaptable_matrices": len(shapes),
        "output": recipe.output,
        "recipe": recipe.model_dump(mode="json"),
    }


def _memory(recipe: Any, skeleton: nn.Module, shapes: Shapes, factors: int, trained: int) -> dict[str, int]:
    """Estimated bytes at the peak of a training step: base, stacked experts, what trains, one copy of activations."""
    width = getattr(torch, _dtype_name(recipe)).itemsize
    at_once = recipe.train.micro_batch_size or recipe.train.batch_size
    if isinstance(skeleton, PipelineModules):
        from molecli.engine.images.plan import activations

        kept = at_once * activations(skeleton, shapes) * width
    else:
        vocabulary = int(getattr(skeleton.config, "vocab_size", 0))
        # The loss keeps the logits and their gradient in float32.
        kept = at_once * TOKENS_PER_EXAMPLE * (sum(map(sum, shapes.values())) * width + vocabulary * 8)
    parts = {
        "base": _count(skeleton.parameters()) * width,
        "experts": factors * width,
        "trained": trained * BYTES_PER_TRAINED,
        # Each matrix keeps its input and its output.
        "activations": kept,
    }
    return {**parts, "total": sum(parts.values())}


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
        lines.append(f"lora      {lora.name}: rank {lora.rank}, alpha {lora.alpha:g}, {lora.matched} matrices{missing}")
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
