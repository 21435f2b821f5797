"""Points as files for other libraries. A format is a module here with a function ``write(point, directory)``."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

from train_then_compress.export.point import ExportError, find_point, split_name

__all__ = ["FORMATS", "ExportError", "export"]

FORMATS = ("onnx", "onnx_int8", "safetensors", "hf", "fairseq", "ctranslate2", "ctranslate2_int8")


def export(text: str, to: str, out: Path | None = None) -> Path:
    """Write a point (``RUN_DIRECTORY`` or ``RUN_DIRECTORY:RECIPE``) in a format, whole or not at all.

    Returns the directory: ``out``, or ``export/<recipe>-<format>`` in the run's. Raises `ExportError`, and
    `Unavailable` where a package of the extra ``export`` is missing.
    """
    if to not in FORMATS:
        raise ExportError(f"--to {to}: no such format; known are {', '.join(FORMATS)}")
    run, recipe = split_name(text)
    directory = out or run / "export" / f"{recipe}-{to}"
    if directory.exists():
        raise ExportError(f"{directory} is there already; delete it, or name another place by --out")
    point = find_point(text)
    if not point.tokenizer.is_file():
        raise ExportError(f"{run}: it keeps no tokenizer.json: train it again with this version")
    temporary = directory.with_name(f".{directory.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        importlib.import_module(f"{__package__}.{to}").write(point, temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
