"""Whether a command runs on a language model or a diffusion pipeline: decided here, once per command.

A domain is a package with a module for each command. All domains have the same functions:

    compose        prepare(recipe, note) -> commands.compose.Task
    train_lora     train_lora(recipe, accelerator, *, resume, progress, note) -> report
    sample         sample(recipe, composition, *, progress, note) -> commands.sample.Samples; IN_FOLDER
    evaluate       evaluate(recipe, compositions, *, progress, note) -> EvaluationReport; RESUMES
    inspect_gates  defaults(composition) -> keys; inspect_gates(recipe, composition, *, progress, note) -> GateReport
    export         prepare(recipe, composition, note) -> commands.export.Task
    plan           to_train(recipe, shapes, fetch), to_evaluate(...), activations(...); LEARNS_FROM, at_once(count)

A third kind of base would be one more folder, and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from molecli.files.base_source import find_base

if TYPE_CHECKING:
    from molecli.files.base_source import BaseSettings


@dataclass(frozen=True)
class Domain:
    """A kind of base: its package, of which each command imports only its own module and libraries."""

    package: str

    def command(self, name: str) -> Any:
        """The module for one command, such as `train_lora`."""
        return import_module(f"{self.package}.{name}")


TEXT, IMAGES = Domain("molecli.text"), Domain("molecli.images")


def domain_of(base: BaseSettings) -> Domain:
    """The domain of a base. Raises: UsageError if there is no such base; RunError if GGUF cannot be read here."""
    return IMAGES if find_base(base).pipeline else TEXT
