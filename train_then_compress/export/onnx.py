"""ONNX, by torch's exporter on top of `torch.export` (``dynamo=True``), the one that torch still develops.

The older one, which traces, fixes some shapes without saying so and is deprecated.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from train_then_compress.cost.engines import load, quiet
from train_then_compress.data.prepare import BOS
from train_then_compress.export.point import ExportError, Point
from train_then_compress.export.tokenizer import write_tokenizer
from train_then_compress.models.early_exit import EarlyExitClassifier
from train_then_compress.models.transformer import Translator

#: The version that torch's operators are translated to first; others are converted from it.
OPSET = 18


class Everywhere(nn.Module):
    """A masked LM's logits at every position."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 [batch, length] -> logits [batch, length, vocabulary]."""
        logits: Tensor = self.model(tokens, torch.arange(tokens.numel(), device=tokens.device))
        return logits.view(*tokens.shape, logits.shape[-1])


class FirstSure(nn.Module):
    """The logits with which each example leaves a classifier with early exits; here it passes all layers first."""

    def __init__(self, model: EarlyExitClassifier):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 [batch, length] -> logits [batch, labels]."""
        logits = self.model.every_exit(tokens)
        sure = logits.softmax(dim=-1).amax(dim=-1) >= self.model.threshold
        leaves = torch.cat([sure[:-1], torch.ones_like(sure[-1:])]).int().argmax(dim=0)
        return logits.gather(0, leaves[None, :, None].expand(1, *logits.shape[1:])).squeeze(0)


def write(point: Point, directory: Path) -> None:
    """Write ``model.onnx`` and ``tokenizer.json``.

    Input ``tokens`` int64 [batch, length], any batch and any length up to the run's, padded at the end with id 1;
    output ``logits`` float32 [batch, length, vocabulary] of a masked LM, [batch, labels] of a classifier. Compressed
    weights are unpacked to fp32. Metadata: the point's facts (see `Point.facts`).
    Raises `ExportError` for a translator.
    """
    if isinstance(point.model, Translator):
        raise ExportError(f"{point.name}: ONNX files hold no beam search; --to ctranslate2 does it")
    model = point.model if point.labels else Everywhere(point.model)
    if isinstance(model, EarlyExitClassifier):
        model = FirstSure(model)
    to_onnx(model, point.longest, directory / "model.onnx", "logits", point.facts)
    write_tokenizer(point.tokenizer, directory)


def to_onnx(model: nn.Module, longest: int, path: Path, output: str, facts: dict[str, str]) -> None:
    """Write a model from ``tokens`` to one output; batch and length (at most ``longest``) stay free.

    Weights of more than 1.5 GB stand in a second file beside ``path``. Raises `Unavailable` without the packages
    ``onnx`` and ``onnxscript``.
    """
    for package in ("onnx", "onnxscript"):
        load(package)
    example = torch.full((2, min(8, longest)), BOS)
    with quiet():
        program = torch.onnx.export(
            model.eval(), (example,), input_names=["tokens"], output_names=[output], opset_version=OPSET, dynamo=True,
            dynamic_shapes=({0: Dim("batch"), 1: Dim("length", max=longest)},), verbose=False,
        )  # fmt: skip
    assert program is not None
    # Stack traces and the like: more bytes than a small model's weights, and nothing of what the model computes.
    load("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(facts)
    program.save(path)
