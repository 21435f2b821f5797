"""SIGTERM and SIGINT ask for a checkpoint and an end; the loop looks after every step."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(Exception):
    """Training was asked to stop, has written its checkpoint, and can be continued."""


_requested = False


def _ask(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def listen() -> None:
    """From now on a signal asks for an orderly end instead of ending the process."""
    global _requested
    _requested = False
    signal.signal(signal.SIGTERM, _ask)
    signal.signal(signal.SIGINT, _ask)


def requested() -> bool:
    """Whether a signal has come."""
    return _requested
