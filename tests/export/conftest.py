"""Points to export: small models far from their initialization, and batches with padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train_then_compress.compression.compressed import Compressed
from train_then_compress.config import Config
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, Prepared
from train_then_compress.export.point import Point, new_model
from train_then_compress.models.transformer import Translator

LENGTH = 32
LABELS = ["harbour", "library", "orchard"]


@pytest.fixture
def point_of(build_config: Callable[..., Config], prepared: Prepared, labelled_file: Path) -> Callable[..., Point]:
    """A function that makes a point of a random model: ``point_of("mlm", norm="post")``."""

    def make(task: str, **model: Any) -> Point:
        if task == "mlm":
            config, labels = build_config(model=model), []
        elif task == "translation":
            config, labels = Config.build({
                "task": {"name": task}, "data": {"name": "debian_pairs"}, "budget": {"kind": "steps", "value": 20},
                "model": {"name": "transformer", "depth": 2, "decoder_depth": 3, "width": 32, "head_size": 16,
                          "length": LENGTH, **model},
            }), []  # fmt: skip
        else:
            shape = {"depth": 2, "width": 32, "head_size": 16, **model}
            config, labels = Config.build({
                "task": {"name": task}, "pretrain": {"data": {"name": "sotu_wiki", "sequence_length": LENGTH}},
                "data": {"name": "csv_files", "train": str(labelled_file), "sequence_length": LENGTH},
                "model": shape, "budget": {"kind": "epochs", "value": 1},
            }), LABELS  # fmt: skip
        torch.manual_seed(0)
        made = new_model(config, prepared.vocab_size, labels).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            if isinstance(made, Translator):
                let_translations_end(made)
        return Point("run:none", config, Compressed(made), prepared.tokenizer, prepared.vocab_size, labels)

    return make


def let_translations_end(model: Translator) -> None:
    """Make ``</s>`` the likeliest token at three of five positions: a beam finds translations of several lengths."""
    last = [module for module in model.decoder.modules() if isinstance(module, nn.LayerNorm)][-1]
    scoring = (model.embedding if model.config.tied else model.output_embedding).weight
    norms = scoring.norm(dim=1)
    scoring[EOS] *= 1.1 * norms.max() / norms[EOS]  # the longest gains most by its own direction
    source, target = (torch.randint(MASK + 1, len(model.embedding.weight), (16, 12)) for _ in range(2))
    while (model(source, target, torch.arange(target.numel())).argmax(dim=1) == EOS).float().mean() < 0.6:
        last.bias += 0.1 * scoring[EOS]


def batch_of(ends: list[int], length: int) -> Tensor:
    """int64 [sequences, length]: a sequence up to each end, then padding."""
    tokens = torch.randint(MASK + 1, 300, (len(ends), length), generator=torch.Generator().manual_seed(1))
    for row, end in zip(tokens, ends, strict=True):
        row[0], row[end - 1], row[end:] = BOS, EOS, PAD
    return tokens


@pytest.fixture
def batches() -> list[Tensor]:
    """One sequence, several of one length, padded ones, and the shortest."""
    return [batch_of(*ends) for ends in (([32], 32), ([20] * 5, 20), ([31, 4, 2, 17], 32), ([3, 2], 9), ([2], 2))]


@pytest.fixture
def logits_alone() -> Callable[[Point, Tensor], list[Tensor]]:
    """A function for our own logits of each sequence by itself, without padding, batches or masks."""

    def compute(point: Point, tokens: Tensor) -> list[Tensor]:
        rows = [row[row != PAD][None] for row in tokens]
        where = [(torch.arange(row.shape[1]),) if not point.labels else () for row in rows]
        with torch.inference_mode():
            return [point.model(row, *at, padded=False) for row, at in zip(rows, where, strict=True)]

    return compute


@pytest.fixture
def assert_agrees(logits_alone: Callable[[Point, Tensor], list[Tensor]]) -> Callable[..., None]:
    """A function that compares an engine's logits with our own, padding's left out: ``(point, tokens, logits)``."""

    def compare(point: Point, tokens: Tensor, logits: Tensor) -> None:
        for row, theirs, ours in zip(tokens, logits, logits_alone(point, tokens), strict=True):
            kept = theirs[row != PAD] if not point.labels else theirs[None]
            assert kept.shape == ours.shape and ours.abs().max() > 0.3
            assert float((kept - ours).abs().max()) < 1e-4

    return compare
