"""Programs that take turns: one at a time, what does not count, and what is said of one that fails."""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType

import pytest

#: Says after each interval, every 10 ms, that it has seen 100 tokens, and keeps a log of when.
PROGRAM = """
import sys, time
print("starting up", flush=True)
with open(sys.argv[1], "w", buffering=1) as log:
    while True:
        time.sleep(0.01)
        log.write(f"{time.perf_counter()}\\n")
        print("tokens 100", flush=True)
"""


@pytest.fixture(scope="module")
def turns(benchmarks: Path) -> ModuleType:
    return importlib.import_module("common.turns")


def read(line: str) -> float | None:
    return float(line.split()[1]) if line.startswith("tokens") else None


def test_one_computes_while_the_others_are_stopped(turns: ModuleType, tmp_path: Path) -> None:
    logs = [tmp_path / name for name in "abc"]
    parties = [turns.Party(log.name, [sys.executable, "-c", PROGRAM, str(log)], read) for log in logs]
    began: list[float] = []
    turns.take_turns(parties, rounds=3, seconds=0.1, before_round=lambda: began.append(time.perf_counter()))
    times = sorted((float(line), log.name) for log in logs for line in log.read_text().split())
    groups = [(name, [when for when, _ in group]) for name, group in groupby(times, key=lambda line: line[1])]
    # One after the other warms up; then rounds, each begun by another one.
    assert "".join(name for name, _ in groups) == "abc" + "abc" + "bca" + "cab"
    assert [sum(when > start for when, _ in times) > 0 for start in began] == [True] * 3 and began == sorted(began)
    for party in parties:
        assert [len(turn) > 3 for turn in party.intervals] == [True] * 3
        # The program's own clock, which a busy machine slows as much.
        own = [group for name, group in groups[len(parties) :] if name == party.name]
        assert party.speeds() == pytest.approx([100 * (len(t) - 1) / (t[-1] - t[0]) for t in own], rel=0.3)
        speeds = [100 / (after - before) for group in own for before, after in pairwise(group)]
        assert party.facts()["tokens_per_second"]["median"] == pytest.approx(statistics.median(speeds), rel=0.3)
        assert party.peak_memory is None or 1e6 < party.peak_memory < 1e9
        with pytest.raises(ProcessLookupError):
            os.killpg(party.process.pid, 0)


def test_the_interval_that_a_pause_falls_into_does_not_count(turns: ModuleType, tmp_path: Path) -> None:
    party = turns.Party("it", [sys.executable, "-c", PROGRAM, str(tmp_path / "log")], read)
    party.start()
    try:
        party.warm_up()
        time.sleep(0.3)
        party.take_turn(0.05)
    finally:
        party.end()
    assert max(seconds for seconds, _ in party.intervals[0]) < 0.2


def test_a_program_that_ends_is_an_error_with_its_last_words(turns: ModuleType) -> None:
    well = turns.Party("well", [sys.executable, "-c", PROGRAM, os.devnull], read)
    ill = turns.Party("ill", [sys.executable, "-c", "print('tokens 1'); raise SystemExit('no memory left')"], read)
    with pytest.raises(turns.Unmeasured, match=r"(?s)ill has ended early, with status 1.*no memory left"):
        turns.take_turns([well, ill], rounds=1, seconds=0.1)
    assert well.process.poll() is not None
