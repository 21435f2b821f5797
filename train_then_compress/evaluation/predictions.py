"""Loss and accuracy of predictions: of masked tokens, of labels, or of a translation's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The target at places that only fill up a batch.
IGNORED = -100
#: Predictions come in multiples of this: each new number of rows costs milliseconds of kernel compilation (oneDNN).
_ROWS = 32


def fill_up(where: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and what to predict there, both int64 [n], with places that only fill them up: 0 and `IGNORED`."""
    fill = (0, -len(where) % _ROWS)
    return np.pad(where, fill), np.pad(targets, fill, constant_values=IGNORED)


def prediction_sums(
    model: nn.Module, batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]
) -> tuple[float, float, float]:
    """Summed cross-entropy (nats), number of correct predictions, number of predictions.

    Each batch is (what the model is called with, targets int64 [n], some `IGNORED`); the model gives logits [n, kinds].
    """
    loss, correct, count = 0.0, 0.0, 0.0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for inputs, targets in batches:
            logits = model(*inputs).float()
            loss += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            correct += float((logits.argmax(dim=-1) == targets).sum())
            count += float((targets != IGNORED).sum())
    model.train(training)
    return loss, correct, count


def prediction_facts(loss: float, correct: float, count: float) -> dict[str, float]:
    """Mean loss in nats per prediction, and the share that is right."""
    return {"loss": loss / count, "accuracy": correct / count}


def perplexity(loss: float) -> float:
    """The exponential of a mean loss in nats."""
    return math.exp(min(loss, 700.0))
