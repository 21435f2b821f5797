"""Recipes: ``none`` or a ``+``-joined sequence of steps, each a method and its strength (``prune60+quant4``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from train_then_compress.config.base import ConfigError, explain
from train_then_compress.config.steps import STEPS, StepConfig

_STEP = re.compile(r"([a-z_]+?)(\d+)")


@dataclass(frozen=True)
class Step:
    """One step of a recipe with its validated settings."""

    method: str
    strength: int
    config: StepConfig

    @property
    def name(self) -> str:
        """As it is written in a recipe, e.g. ``quant4``."""
        return f"{self.method}{self.strength}"


def parse_recipe(recipe: str, settings: Mapping[str, Any], width: int) -> list[Step]:
    """The steps of a recipe for a model of ``width``, with the methods' settings from the config's ``steps``.

    Raises `ConfigError` naming the recipe for an unknown method, an impossible strength or wrong settings.
    """
    if recipe == "none":
        return []
    steps: list[Step] = []
    for part in recipe.split("+"):
        match = _STEP.fullmatch(part)
        if match is None:
            raise ConfigError(f"recipes: {recipe!r}: {part!r} is not a method and a strength such as quant4 or prune60")
        method, strength = match[1], int(match[2])
        if method not in STEPS:
            raise ConfigError(f"recipes: {recipe!r}: unknown method {method!r}; known are {', '.join(sorted(STEPS))}")
        if steps and steps[-1].config.last:
            raise ConfigError(f"recipes: {recipe!r}: {steps[-1].name} must be the last step")
        config = _settings(method, settings.get(method, {}))
        config.check(strength, width)
        if steps and strength <= steps[-1].strength and not config.last:
            raise ConfigError(f"recipes: {recipe!r}: {part} must prune more than {steps[-1].name} before it")
        steps.append(Step(method, strength, config))
    return steps


def _settings(method: str, values: Any) -> StepConfig:
    try:
        config: StepConfig = TypeAdapter(STEPS[method]).validate_python(values)
    except ValidationError as error:
        raise explain(error, f"steps.{method}") from None
    return config
