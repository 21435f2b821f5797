"""CTranslate2 with weights of 8 bits."""

from __future__ import annotations

from pathlib import Path

from train_then_compress.export import ctranslate2
from train_then_compress.export.point import Point


def write(point: Point, directory: Path) -> None:
    """Write what `ctranslate2.write` does, its matrices int8 with a scale for each row.

    The weights of a compressed point are unpacked first and rounded again.
    """
    ctranslate2.write(point, directory, "int8")
