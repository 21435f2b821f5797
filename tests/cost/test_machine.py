"""Holding the machine: exclusively, or beside others, told from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from train_then_compress.cost import machine
from train_then_compress.records import Busy

HOLD = """
import os, sys
from train_then_compress.cost.machine import held
from train_then_compress.records import Busy
device, exclusive, *cores = sys.argv[1:]
if cores:
    os.sched_setaffinity(0, {int(core) for core in cores})
try:
    with held(device, exclusive == "exclusive"):
        print("in", flush=True)
        input()
except Busy as error:
    print(error, flush=True)
"""


@pytest.fixture
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs on this machine shall not be disturbed, nor disturb."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@contextmanager
def child(device: str, manner: str, *cores: int) -> Iterator[str]:
    """Another process that holds the machine until the end; gives what it said."""
    command = [sys.executable, "-c", HOLD, device, manner, *map(str, cores)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "first, second, allowed",
    [
        ("exclusive", "exclusive", False),
        ("exclusive", "shared", False),
        ("shared", "exclusive", False),
        ("shared", "shared", True),
    ],
)
@pytest.mark.usefixtures("own_locks")
def test_an_exclusive_run_stands_alone(device: str, first: str, second: str, allowed: bool) -> None:
    with machine.held(device, first == "exclusive"), child(device, second) as said:
        if allowed:
            assert said == "in"
        else:
            place = f"core{machine.usable_cores()[0]}" if device == "cpu" else "cuda"
            assert said.startswith(f"{place} is in use by another run (process {os.getpid()}), and one of the two is")
            assert said.endswith("wait for the other, stop it, or give each cores of its own (taskset)")


@pytest.mark.usefixtures("own_locks")
def test_runs_that_are_not_timed_are_warned_of_each_other(caplog: pytest.LogCaptureFixture) -> None:
    with machine.held("cpu", exclusive=False):
        assert not caplog.messages
        with machine.held("cuda", exclusive=False):
            assert not caplog.messages
    with child("cpu", "shared"), machine.held("cpu", exclusive=False):
        assert "another run uses the same cores" in caplog.text
    caplog.clear()
    with machine.held("cpu", exclusive=False):
        assert not caplog.messages


@pytest.mark.usefixtures("own_locks")
def test_it_is_free_again_afterwards_even_after_a_kill() -> None:
    with child("cpu", "exclusive") as said:
        assert said == "in"
        with pytest.raises(Busy, match="in use by another run"), machine.held("cpu", exclusive=False):
            pass
    with machine.held("cpu", exclusive=True), child("cpu", "exclusive") as said:
        assert "in use" in said
    command = [sys.executable, "-c", HOLD, "cpu", "exclusive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        process.kill()
    with child("cpu", "exclusive") as said:
        assert said == "in"


@pytest.mark.usefixtures("own_locks")
def test_runs_with_cores_of_their_own_do_not_meet() -> None:
    first, second = machine.usable_cores()[:2]
    with child("cpu", "exclusive", first) as one, child("cpu", "exclusive", second) as other:
        assert one == other == "in"
        with child("cpu", "exclusive", first, second) as both:
            assert f"core{first} is in use" in both
        with child("cuda", "exclusive") as gpu:
            assert gpu == "in"


@pytest.mark.usefixtures("own_locks")
def test_a_refused_run_holds_nothing() -> None:
    """It takes the first core and is refused the second: the first must be free again."""
    first, second = machine.usable_cores()[:2]
    with child("cpu", "exclusive", second):
        with pytest.raises(Busy, match=f"core{second}"), machine.held("cpu", exclusive=True):
            pass
        with child("cpu", "exclusive", first) as said:
            assert said == "in"


def test_the_usable_cores_are_those_of_the_process() -> None:
    code = "import os; from train_then_compress.cost import machine as m\nos.sched_setaffinity(0, {%d}); "
    core = machine.usable_cores()[-1]
    code = code % core + "print(m.usable_cores(), m.identity()['cores'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"[{core}] 1"
    assert machine.identity()["cores"] == len(os.sched_getaffinity(0)) and machine.identity()["cpu"]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_calibration_is_a_speed_by_dtype(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    """bf16 is left out where a processor would take seconds for one multiplication."""
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(machine, "_SIZE", 64)
    speeds = machine.calibrate(seconds=0.05)
    assert set(speeds) == {"fp32", *["bf16"] * has_bf16} and all(1e6 < speed < 1e15 for speed in speeds.values())
