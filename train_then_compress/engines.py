"""`ttc engines`: how fast the encoder of a point is on several engines, on one machine, all taking turns."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train_then_compress.compression.compressed import Codes
from train_then_compress.compression.packed_linear import to_packed_linears
from train_then_compress.cost import machine
from train_then_compress.cost.engines import (
    Engine,
    Unavailable,
    compiled,
    eager,
    load,
    onnx_runtime,
    take_turns,
    torchao_int8,
)
from train_then_compress.data.prepare import MASK
from train_then_compress.export.onnx import to_onnx
from train_then_compress.export.onnx_int8 import quantize
from train_then_compress.export.point import ExportError, Point, find_point
from train_then_compress.models.transformer import Translator
from train_then_compress.records import write_json

SIMULATED = (
    "Measured: the encoder (tokens to hidden states, full sequences, no padding), in fp32 but for the matrices.",
    "Weights of compressed points are unpacked to fp32 for engines without a kernel for them, and for int8 rounded "
    "again: nothing is faster there for being smaller in its file, and pruned weights are multiplied as zeros. A point "
    "that rounds its activations rounds them in fp32.",
)


class Unpadded(nn.Module):
    """An encoder that takes full sequences."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, length] -> float32 [batch, length, width]."""
        hidden: Tensor = self.encoder(tokens, padded=False)
        return hidden


def _encoder(point: Point) -> nn.Module:
    return Unpadded(point.model.get_submodule("encoder"))


def _onnx(point: Point, directory: Path, threads: int) -> Engine:
    return onnx_runtime(_onnx_file(point, directory), threads)


def _onnx_int8(point: Point, directory: Path, threads: int) -> Engine:
    path = directory / "int8.onnx"
    quantize(_onnx_file(point, directory), path)
    return onnx_runtime(path, threads)


def _onnx_file(point: Point, directory: Path) -> Path:
    load("onnxruntime")
    path = directory / "model.onnx"
    if not path.exists():
        to_onnx(_encoder(point), point.longest, path, "hidden", point.facts)
    return path


def _int4(point: Point, directory: Path, threads: int) -> Engine:
    codes = point.compressed.codes.values()
    if not any(isinstance(code, Codes) and code.bits == 4 for code in codes):
        raise Unavailable("the point has no matrices in uniform codes of 4 bits")
    return eager(Unpadded(to_packed_linears(point.compressed).get_submodule("encoder")))


#: What each engine computes the matrices with, and what makes a point ready on it.
ENGINES: dict[str, tuple[str, Callable[[Point, Path, int], Engine]]] = {
    "eager": ("fp32", lambda point, directory, threads: eager(_encoder(point))),
    "compiled": ("fp32", lambda point, directory, threads: compiled(_encoder(point))),
    "torchao_int8": ("int8", lambda point, directory, threads: torchao_int8(_encoder(point))),
    "onnx": ("fp32", _onnx),
    "onnx_int8": ("int8", _onnx_int8),
    "int4": ("4-bit codes as stored", _int4),
}


def report(texts: list[str], names: list[str], length: int, threads: int, rounds: int, out: Path | None) -> str:
    """Find the points, hold the machine, measure, write JSON to ``out``, and return a Markdown table.

    ``names`` of engines: all where empty. Raises `ExportError` for what cannot be found, `Busy` on a busy machine.
    """
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise ExportError(f"--engines {','.join(unknown)}: no such engine; known are {', '.join(ENGINES)}")
    points = [find_point(text) for text in texts]
    with machine.held("cpu", exclusive=True):
        measured = measure_engines(points, names or list(ENGINES), length, threads, rounds)
    if out is not None:
        write_json(out, measured)
    return render(measured)


def measure_engines(
    points: list[Point], names: list[str], length: int, threads: int, rounds: int, batch: int = 16
) -> dict[str, Any]:
    """Latency of one sequence and throughput of ``batch``, each point on each engine; ``threads`` 0: all cores.

    ``rows``: one for each point and engine; an engine that is not to be had has its reason in ``unavailable`` and no
    numbers. Times are medians over the rounds of the median of a turn, with their interquartile range.
    ``output_error``: relative Frobenius distance of the outputs from those of PyTorch eager.
    """
    for point in points:
        if isinstance(point.model, Translator):
            raise ExportError(f"{point.name}: a translator; ttc engines measures encoders, ttc table has its speed")
        if length > point.longest:
            raise ExportError(f"--length {length}: {point.name} takes sequences of at most {point.longest} tokens")
    cores = len(machine.usable_cores())
    if threads > cores:
        raise ExportError(f"--threads {threads}: at most the {cores} usable cores")
    earlier, threads = torch.get_num_threads(), threads or cores
    torch.set_num_threads(threads)
    try:
        with TemporaryDirectory() as directory, torch.no_grad():
            before = machine.calibrate()
            rows = _rows(points, names, Path(directory), length, threads, rounds, batch)
            after = machine.calibrate()
    finally:
        torch.set_num_threads(earlier)
    return {
        "machine": machine.identity(), "calibration": {"before": before, "after": after}, "threads": threads,
        "length": length, "batch": batch, "rounds": rounds, "python": platform.python_version(),
        "simulated": list(SIMULATED), "rows": rows,
    }  # fmt: skip


def _rows(
    points: list[Point], names: list[str], directory: Path, length: int, threads: int, rounds: int, batch: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    parties: list[tuple[dict[str, Any], Callable[[], Tensor], Callable[[], Tensor]]] = []
    for number, point in enumerate(points):
        tokens = torch.randint(MASK + 1, point.vocab_size, (batch, length), generator=generator)
        expected = _encoder(point)(tokens)
        place = directory / str(number)
        place.mkdir()
        for name in names:
            weights, prepare = ENGINES[name]
            row: dict[str, Any] = {"point": point.name, "engine": name, "weights": weights, "unavailable": None}
            rows.append(row)
            try:
                engine = prepare(point, place, threads)
                one, many = partial(engine.run, tokens[:1]), partial(engine.run, tokens)
                one()
                error = (many() - expected).norm() / expected.norm()
            except Unavailable as reason:
                row["unavailable"] = str(reason)
                continue
            row |= {"version": engine.version, "bytes": engine.bytes, "output_error": float(error)}
            parties.append((row, one, many))
    latencies = take_turns([one for _, one, _ in parties], rounds)
    batches = take_turns([many for _, _, many in parties], rounds)
    for (row, _, _), seconds, batch_seconds in zip(parties, latencies, batches, strict=True):
        row |= _speed(seconds, batch_seconds, batch * length)
    return rows


def _speed(one: list[float], many: list[float], tokens: int) -> dict[str, float]:
    """Milliseconds of one sequence; tokens per second of a batch."""
    quarter, half, three_quarters = (float(value) for value in np.percentile(one, [25, 50, 75]))
    slow, middle, fast = (float(value) for value in np.percentile([tokens / seconds for seconds in many], [25, 50, 75]))
    return {
        "latency_ms": 1e3 * half, "latency_iqr_ms": 1e3 * (three_quarters - quarter),
        "throughput": middle, "throughput_iqr": fast - slow,
    }  # fmt: skip


def render(measured: dict[str, Any]) -> str:
    """A Markdown table, and below it what was not to be had and what the numbers are of."""
    heading = ["point", "engine", "weights", "weights (MB)", "latency (ms)", f"tokens/s, batch {measured['batch']}",
               "output error", "version"]  # fmt: skip
    lines = [heading, ["---"] * 3 + ["---:"] * 4 + ["---"]]
    for row in measured["rows"]:
        if row["unavailable"] is None:
            lines.append([
                row["point"], row["engine"], row["weights"], f"{row['bytes'] / 1e6:.3g}",
                f"{row['latency_ms']:.3g} (IQR {row['latency_iqr_ms']:.2g})",
                f"{row['throughput']:,.0f} (IQR {row['throughput_iqr']:,.0f})",
                f"{row['output_error']:.1e}", row["version"],
            ])  # fmt: skip
    table = [f"| {' | '.join(line)} |" for line in lines]
    missing = [f"{row['point']} on {row['engine']}: unavailable: {row['unavailable']}"
               for row in measured["rows"] if row["unavailable"] is not None]  # fmt: skip
    calibration = {when: {dtype: f"{speed / 1e9:.0f} GFLOP/s" for dtype, speed in speeds.items()}
                   for when, speeds in measured["calibration"].items()}  # fmt: skip
    setting = (f"{measured['machine']['cpu']}, {measured['threads']} threads, {measured['length']} tokens a sequence, "
               f"{measured['rounds']} rounds; matrix multiplication {json.dumps(calibration)}")  # fmt: skip
    return "\n".join([*table, "", *missing, *measured["simulated"], setting]) + "\n"
