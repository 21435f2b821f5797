"""Recipes: ``none`` or a ``+``-joined sequence of steps, each a method and its strength (``prune60+quant4``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from train_then_compress.config.base import ConfigError, explain
from train_then_compress.config.model import ModelConfig
from train_then_compress.config.steps import STEPS, StepConfig
from train_then_compress.config.steps.base import PHASES

_STEP = re.compile(r"([a-z_]+?)(\d*)")


@dataclass(frozen=True)
class Step:
    """One step of a recipe with its validated settings; ``strength`` is 0 where the method takes none."""

    method: str
    strength: int
    config: StepConfig

    @property
    def name(self) -> str:
        """As it is written in a recipe, e.g. ``quant4``."""
        return f"{self.method}{self.strength}" if self.config.has_strength else self.method


def parse_recipe(recipe: str, settings: Mapping[str, Any], model: ModelConfig, task: str = "mlm") -> list[Step]:
    """The steps of a recipe for a model and a task, with the methods' settings from the config's ``steps``.

    Raises `ConfigError` naming the recipe for an unknown method, an impossible strength or wrong settings.
    """
    if recipe == "none":
        return []
    steps: list[Step] = []
    for part in recipe.split("+"):
        match = _STEP.fullmatch(part)
        if match is None:
            raise ConfigError(f"recipes: {recipe!r}: {part!r} is not a method and a strength such as quant4 or prune60")
        method, strength = match[1], int(match[2] or 0)
        if method not in STEPS:
            raise ConfigError(f"recipes: {recipe!r}: unknown method {method!r}; known are {', '.join(sorted(STEPS))}")
        if bool(match[2]) != STEPS[method].has_strength:
            wanted = (
                "a method and a strength such as quant4" if STEPS[method].has_strength else "a method without strength"
            )
            raise ConfigError(f"recipes: {recipe!r}: {part!r} is not {wanted}")
        config = step_settings(method, settings.get(method, {}))
        if task not in config.tasks:
            raise ConfigError(f"recipes: {recipe!r}: {method} works for task={', '.join(config.tasks)} only")
        config.check_task(task)
        if model.impl not in config.impls:
            raise ConfigError(f"recipes: {recipe!r}: {method} works for model.impl={', '.join(config.impls)} only")
        config.check(strength, model)
        step = Step(method, strength, config)
        _check_order(recipe, steps, step)
        steps.append(step)
    return steps


def _check_order(recipe: str, before: list[Step], step: Step) -> None:
    """Architecture, then pruning, then quantization, once; a later pruning of weights, or of units, must prune more."""
    for earlier in before:
        if earlier.config.phase == "quantization":
            raise ConfigError(f"recipes: {recipe!r}: {earlier.name} must be the last step")
        if "training" in (earlier.config.phase, step.config.phase):
            continue
        if PHASES.index(step.config.phase) < PHASES.index(earlier.config.phase):
            raise ConfigError(f"recipes: {recipe!r}: {step.name} changes shapes and must stand before {earlier.name}")
        again = step.config.phase == earlier.config.phase == "pruning" or step.method == earlier.method == "structured"
        if again and step.strength <= earlier.strength:
            raise ConfigError(f"recipes: {recipe!r}: {step.name} must prune more than {earlier.name} before it")


def step_settings(method: str, values: Any) -> StepConfig:
    """A method's settings from those of the config's ``steps``; raises `ConfigError` naming every wrong key."""
    try:
        config: StepConfig = TypeAdapter(STEPS[method]).validate_python(values)
    except ValidationError as error:
        raise explain(error, f"steps.{method}") from None
    return config
