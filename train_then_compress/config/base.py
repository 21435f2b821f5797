"""What every config dataclass shares: validation at construction, and errors that name the key."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")

#: Keys whose dataclass is chosen by their ``name``.
_UNIONS = ("data", "task", "model")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and what is allowed."""


# Field is left out of field_specifiers: checkers would overlook its default where that stands first.
@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked by pydantic and that takes no unknown key."""
    decorate: Callable[[type[T]], Any] = pydantic_dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    )
    result: type[T] = decorate(cls)
    return result


def reject(key: str, value: object, allowed: str) -> ConfigError:
    """The error for a value that a single field's type cannot rule out."""
    return ConfigError(f"{key}={value}: {allowed}")


def explain(error: ValidationError, prefix: str = "") -> ConfigError:
    """All problems pydantic found, one line each: ``key=value: what it must be``."""
    lines = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            lines.append(str(cause))
            continue
        names = [str(part) for part in problem["loc"] if not str(part)[:1].isupper()]
        key = ".".join(filter(None, [prefix, *_without_tag(names)]))
        if problem["type"] == "union_tag_invalid":
            lines.append(f"{key}.name={problem['ctx']['tag']!r}: must be one of {problem['ctx']['expected_tags']}")
            continue
        if problem["type"] == "unexpected_keyword_argument":
            lines.append(f"{key}={problem['input']!r}: there is no such setting")
            continue
        message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        lines.append(f"{key}={problem['input']!r}: must be {message}" if key else message)
    return ConfigError("\n".join(lines))


def _without_tag(names: list[str]) -> list[str]:
    """Drop the tag that follows a discriminated union's key (``data.text_files.train`` -> ``data.train``)."""
    kept = names[:1]
    for before, name in pairwise(names):
        if before not in _UNIONS:
            kept.append(name)
    return kept
