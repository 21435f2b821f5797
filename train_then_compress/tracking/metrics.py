"""The local record of a run: one row of ``metrics.jsonl`` for every measurement, told to whoever listens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_then_compress.records import append_row, read_rows, rewrite_rows

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes metric rows, and hands each to the ``listeners`` (the progress display, a tracker) once it is on disk.

    A listener that raises is removed, with one warning: what watches a training never stops it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a failure to write the file itself is raised."""
        append_row(self.path, row)
        for listener in list(self.listeners):
            try:
                listener(row)
            except Exception as error:
                self.listeners.remove(listener)
                name = _name(listener)
                logger.warning("%s no longer follows %s: %s: %s", name, self.path, type(error).__name__, error)

    def drop_after(self, stage: str, step: int) -> None:
        """Remove the rows of a stage (``pretrain-<hash8>``) past a step; ``step=-1`` removes all of them.

        Called on resume, since the steps after the checkpoint are done, and recorded, again.
        """
        rows = read_rows(self.path)
        kept = [row for row in rows if row["stage"] != stage or row["steps"] <= step]
        if len(kept) < len(rows):
            rewrite_rows(self.path, kept)


def _name(listener: Callable[..., None]) -> str:
    owner = getattr(listener, "__self__", listener)
    return str(getattr(owner, "__name__", type(owner).__name__))
