"""Benchmarks are scripts: they and what they share are imported from their directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parents[2] / "benchmarks"
WORDS = ("a machine", "the model", "some text", "every batch", "its clock", "one round")
VERBS = ("measures", "repeats", "forgets", "compares", "holds")


@pytest.fixture(scope="session", autouse=True)
def benchmarks() -> Iterator[Path]:
    """The directory, importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(DIRECTORY), *sys.path])
        yield DIRECTORY


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents, no two alike."""
    blocks = [
        f"Number {number}: {WORDS[number % 6]} {VERBS[number % 5]} {WORDS[number % 4]}. It took {number * 7} steps."
        for number in range(400)
    ]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(blocks))
    return path
