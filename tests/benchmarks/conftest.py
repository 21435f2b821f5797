"""Benchmarks are scripts: they and what they share are imported from their directory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


@pytest.fixture
def one_interval(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that is a party, in this process, until it tells of its first interval: ``(party, config, steps)``."""

    class Enough(Exception):
        pass

    def say(tokens: int) -> None:
        raise Enough(tokens)

    def run(party: Callable[[Any, int], None], config: Any, steps: int) -> int:
        monkeypatch.setattr(importlib.import_module("parties.loops"), "say", say)
        with pytest.raises(Enough) as told:
            party(config, steps)
        return int(told.value.args[0])

    return run


@pytest.fixture
def fairseq_interval(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[Sequence[str], Callable[[str], float | None]], float]:
    """A function that is fairseq-train, in this process, to its end; what is read of the first interval in its log."""

    def run(command: Sequence[str], read: Callable[[str], float | None]) -> float:
        from fairseq_cli.train import cli_main
        from hydra.version import Version, VersionBase

        # It calls Hydra as of 1.1; a run of ours in this process has set another version.
        monkeypatch.setattr(VersionBase.instance(), "version_base", Version("1.1"))
        monkeypatch.setattr(sys, "argv", ["fairseq-train", *command[3:]])
        with caplog.at_level("INFO"), caplog.at_level("INFO", logger="fairseq"):
            cli_main()
        found = [read(f"time | INFO | {record.name} | {record.getMessage()}") for record in caplog.records]
        return next(tokens for tokens in found if tokens is not None)

    return run


@pytest.fixture
def made_up_turns(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parties that have taken their turns without being started: the first 200 tokens a second, the others 100."""

    def take_turns(parties: Sequence[Any], rounds: int, seconds: float, before_round: Callable[[], object]) -> None:
        for _ in range(rounds):
            before_round()
        for number, party in enumerate(parties):
            party.intervals = [[(0.5, 50.0 if number else 100.0)]] * rounds

    monkeypatch.setattr(importlib.import_module("common.contest"), "take_turns", take_turns)
