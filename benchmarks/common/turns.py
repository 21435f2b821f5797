"""Programs that take turns: each trains in a process of its own, stopped while another one has the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.record import Unmeasured, quartiles

#: Intervals that a program computes before its first turn: memory, kernels and caches have found their form then.
_WARM_UP = 3
_LAST_LINES = 15


@dataclass
class Party:
    """A program that says after every interval of some steps how many tokens it has seen in it.

    ``read`` takes a line of its output and gives that number, or None for any other line. ``intervals``: seconds and
    tokens of those that count, by turn.
    """

    name: str
    command: Sequence[str]
    read: Callable[[str], float | None]
    environment: dict[str, str] = field(default_factory=dict)
    intervals: list[list[tuple[float, float]]] = field(default_factory=list)
    peak_memory: int | None = None

    def start(self) -> None:
        """Start the program, in a process group of its own."""
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._rest = b""
        self._output, output = os.pipe()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | self.environment,
        )  # fmt: skip
        os.close(output)

    def warm_up(self) -> None:
        """Let it begin to train, and stop it."""
        for _ in range(_WARM_UP):
            self._next()
        self._stop()

    def take_turn(self, seconds: float) -> None:
        """Go on for a while. The first interval of a turn began before it: it is computed, but does not count."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self._next()
        start = last = time.perf_counter()
        taken = []
        while not taken or last - start < seconds:
            tokens = self._next()
            now = time.perf_counter()
            taken.append((now - last, tokens))
            last = now
        self._stop()
        self.intervals.append(taken)

    def end(self) -> None:
        """Kill the program, noting its peak memory (`peak_memory`, bytes; where the system tells it)."""
        status = Path(f"/proc/{self.process.pid}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        self.peak_memory = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._output)

    def speeds(self) -> list[float]:
        """Tokens per second of each turn."""
        return [sum(tokens for _, tokens in turn) / sum(seconds for seconds, _ in turn) for turn in self.intervals]

    def facts(self) -> dict[str, object]:
        """What was measured: medians and quartiles over single intervals."""
        speeds = [tokens / seconds for turn in self.intervals for seconds, tokens in turn]
        return {
            "tokens_per_second": quartiles(speeds), "by_turn": self.speeds(), "intervals": self.intervals,
            "peak_memory": self.peak_memory,
        }  # fmt: skip

    def _stop(self) -> None:
        """Stop the program and forget what it has said meanwhile."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        os.set_blocking(self._output, False)
        try:
            while os.read(self._output, 1 << 16):
                pass
        except BlockingIOError:
            self._rest = b""
        finally:
            os.set_blocking(self._output, True)

    def _next(self) -> float:
        """Wait for the end of an interval; its tokens."""
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if not found:
                more = os.read(self._output, 1 << 16)
                if not more:
                    said = "\n".join(self._said)
                    raise Unmeasured(f"{self.name} has ended early, with status {self.process.wait()}:\n{said}")
                self._rest += more
                continue
            self._rest = rest
            text = line.decode(errors="replace")
            self._said.append(text)
            if (tokens := self.read(text)) is not None:
                return tokens


def take_turns(
    parties: Sequence[Party], rounds: int, seconds: float, before_round: Callable[[], object] = lambda: None
) -> None:
    """All parties in every round, each time another one first; raises `Unmeasured` where one fails. ``before_round`` is
    called while all are stopped."""
    with ExitStack() as started:
        for party in parties:
            party.start()
            started.callback(party.end)
            party.warm_up()
        for number in range(rounds):
            before_round()
            for place in range(len(parties)):
                parties[(number + place) % len(parties)].take_turn(seconds)
