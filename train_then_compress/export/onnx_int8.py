"""ONNX with weights of 8 bits, by ONNX Runtime's dynamic quantizer."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from train_then_compress.cost.engines import load, quiet
from train_then_compress.export import onnx
from train_then_compress.export.point import Point
from train_then_compress.export.tokenizer import write_tokenizer


def write(point: Point, directory: Path) -> None:
    """Write ``model.onnx`` as `onnx.write` does, its weights int8, inputs of multiplications quantized as they come.

    The weights of a compressed point are unpacked first and rounded again.
    """
    load("onnxruntime")
    with TemporaryDirectory(dir=directory.parent) as temporary:
        onnx.write(point, Path(temporary))
        quantize(Path(temporary) / "model.onnx", directory / "model.onnx")
    write_tokenizer(point.tokenizer, directory)


def quantize(source: Path, target: Path) -> None:
    """Quantize an ONNX file's weights to int8; raises `Unavailable` without the package ``onnxruntime``.

    Their range is that of 7 bits: processors without VNNI add products of int8 in 16 bits, where full ones saturate.
    """
    quantization, standard = load("onnxruntime.quantization"), load("onnx")
    model = standard.load(source)
    _untie(model.graph)
    with quiet():
        quantization.quantize_dynamic(model, target, weight_type=quantization.QuantType.QInt8, reduce_range=True)


def _untie(graph: Any) -> None:
    """Give each multiplication weights of its own: the quantizer transposes them, also for the look-up they share.

    Shapes that the exporter noted go too (the quantizer finds them again): they would be those from before.
    """
    graph.ClearField("value_info")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gemm" and sum(node.input[1] in other.input for other in graph.node) > 1:
            own = graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{own.name} of {node.name}"
