"""What machine this is, how fast it is right now, and holding it for oneself."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from train_then_compress.records import Busy

log = logging.getLogger(__name__)

#: Of the matrices that `calibrate` multiplies.
_SIZE = 1024


def cpu_facts() -> tuple[str, frozenset[str]]:
    """The processor's name and feature flags, as Linux reports them (elsewhere: its name and no flags)."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), frozenset()
    facts = dict(line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in facts.items()}
    return values.get("model name", platform.machine()), frozenset(values.get("flags", "").split())


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware."""
    return bool(cpu_facts()[1] & {"avx512_bf16", "amx_bf16"})


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def identity() -> dict[str, Any]:
    """What makes wall-clock results belong to one machine: processor and number of usable cores; GPU, if any."""
    driver = Path("/proc/driver/nvidia/gpus")
    gpus = [
        line.split(":", 1)[1].strip()
        for gpu in (sorted(driver.iterdir()) if driver.is_dir() else [])
        for line in (gpu / "information").read_text().splitlines()
        if line.startswith("Model:")
    ]
    return {"cpu": cpu_facts()[0], "cores": len(usable_cores()), "gpus": gpus}


def calibrate(device: str = "cpu", seconds: float = 0.5) -> dict[str, float]:
    """Speed of a 1024^3 matrix multiplication in FLOP/s (2 n^3 each), by dtype: a noisy machine shows here.

    bf16 only where the hardware multiplies it: elsewhere a single one takes seconds.
    """
    import torch

    dtypes = {"fp32": torch.float32}
    if device == "cuda" or cpu_has_bf16():
        dtypes["bf16"] = torch.bfloat16
    speeds = {}
    for name, dtype in dtypes.items():
        a = torch.randn(_SIZE, _SIZE, device=device).to(dtype)
        a @ a
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / 2 or count == 0:
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            count += 1
        speeds[name] = count * 2 * _SIZE**3 / elapsed
    return speeds


@contextmanager
def held(device: str, exclusive: bool) -> Iterator[None]:
    """Hold this process's cores (or the GPU) for the length of a run.

    Wall-clock budgets need the machine for themselves: they hold it exclusively and refuse to begin beside any other
    run on the same cores; other runs only refuse beside an exclusive one, and are warned of each other. Raises `Busy`.
    """
    places = [f"core{core}" for core in usable_cores()] if device == "cpu" else ["cuda"]
    directory = Path(tempfile.gettempdir()) / f"train_then_compress-{os.getuid()}"
    directory.mkdir(exist_ok=True)
    beside = False
    with ExitStack() as stack:
        for place in places:
            file = stack.enter_context((directory / place).open("a+"))
            file.seek(0)
            other = file.read()
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except OSError:
                raise Busy(
                    f"{place} is in use by another run (process {other or 'unknown'}), and one of the two is timed: "
                    "wait for the other, stop it, or give each cores of its own (taskset)"
                ) from None
            beside |= not exclusive and _runs(other)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            stack.callback(file.truncate, 0)
        if beside:
            log.warning("another run uses the same cores: seconds and latencies measured now mean little, and both are "
                        "slow unless each has threads of its own (runtime.threads)")  # fmt: skip
        yield


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OSError):
        return False
    return True
