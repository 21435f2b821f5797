"""What a person sees of a running stage: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

BAR_WIDTH = 24
REFRESH_SECONDS = 0.2
PLAIN_SECONDS = 15.0

#: Drawing waits this many times as long as the last drawing took, so that it never takes more than 0.2 % of the time.
REST = 500

LABELS = {
    "loss": "loss {:.3f}", "perplexity": "validation perplexity {:.2f}", "accuracy": "validation accuracy {:.2%}",
    "bleu": "validation BLEU {:.2f}",
}  # fmt: skip


class StageProgress:
    """One stage's progress through its budget, on standard error; a context manager.

    In a terminal a bar is redrawn at most five times a second, and only from within `update`: no thread competes with
    the training. Elsewhere (a file, a pipe, a notebook) a line is printed every 15 seconds, and one at the end.
    """

    def __init__(self, description: str, run_name: str = "", console: Console | None = None) -> None:
        self.title = f"{description} {run_name}".rstrip()
        self.console = console or standard_error()
        self.facts: dict[str, float] = {}
        self.fraction = 0.0
        self._live: Live | None = None
        self._entered = self._due = time.monotonic()
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> StageProgress:
        self._entered = time.monotonic()
        if self.console.is_interactive:
            # Standard output may be a pipe that wants its lines; only what lands on the screen goes around the bar.
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
            self._live.start()
            self._draw(self._entered)
        else:
            self._due = self._entered + PLAIN_SECONDS
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw(time.monotonic())
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    def update(self, fraction: float, **facts: float) -> None:
        """Note how much of the budget is spent, in [0, 1], and the newest facts; draw if it is time to.

        ``loss``, ``perplexity``, ``accuracy`` and ``bleu`` (of validation) and ``tokens_per_second`` have words of
        their own; a fact stays in view until it is given anew.
        """
        self.fraction = fraction
        self.facts.update(facts)
        now = time.monotonic()
        if self._first is None:
            self._first = (now, fraction)
        if now >= self._due:
            self._draw(now)

    def listen(self, row: dict[str, Any]) -> None:
        """Take the facts of a metric row (a listener of `MetricsLog`)."""
        names = ("perplexity", "accuracy", "bleu") if row["split"] == "validation" else ("loss", "tokens_per_second")
        self.update(row["progress"], **{name: row[name] for name in names if row.get(name) is not None})

    def time_left(self, now: float) -> float | None:
        """Wall-clock seconds to the end at the pace since the first `update`, or None before there is a pace.

        A resumed stage starts with a fraction above zero that cost this process nothing.
        """
        if self._first is None or self.fraction <= self._first[1]:
            return None
        started, fraction = self._first
        return max(0.0, 1 - self.fraction) * (now - started) / (self.fraction - fraction)

    def describe(self, now: float) -> str:
        """Percent of the budget, times and facts: ``43.2% | 1:20 left | 1:02 elapsed | loss 3.210 | ...``."""
        left = self.time_left(now)
        times = ([] if left is None else [f"{clock(left)} left"]) + [f"{clock(now - self._entered)} elapsed"]
        return " | ".join([f"{self.fraction:.1%}", *times, *(_fact(*fact) for fact in self.facts.items())])

    def _draw(self, now: float) -> None:
        try:
            if self._live is not None:
                self._live.update(self._bar(self.describe(now)), refresh=True)
                self._due = now + max(REFRESH_SECONDS, REST * (time.monotonic() - now))
            else:
                print(f"{self.title}: {self.describe(now)}", file=self.console.file, flush=True)
                self._due = now + PLAIN_SECONDS
        except OSError:
            # The terminal or the pipe's reader has gone; the training goes on unseen.
            self._due = math.inf

    def _bar(self, description: str) -> Text:
        full, empty = ("#", ".") if self.console.options.ascii_only else ("━", "─")
        filled = round(min(max(self.fraction, 0.0), 1.0) * BAR_WIDTH)
        return Text.assemble(
            (self.title, "bold"), " ", (full * filled, "cyan"), (empty * (BAR_WIDTH - filled), "dim"), " ", description
        )


@cache
def standard_error() -> Console:
    """One console for all stages: a log handler made while one stage's bar stood prints around the next one's too."""
    return Console(stderr=True)


def _fact(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value / 1000:.1f}k tokens/s" if value >= 1000 else f"{value:.0f} tokens/s"
    return LABELS[name].format(value) if name in LABELS else f"{name.replace('_', ' ')} {value:.4g}"


def clock(seconds: float) -> str:
    """A duration as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
