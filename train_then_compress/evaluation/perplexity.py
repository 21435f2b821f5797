"""Masked-LM loss, perplexity and masked-token accuracy on fixed masks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The target at places that only fill up a batch.
IGNORED = -100


def masked_lm_sums(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float, float]:
    """Summed cross-entropy (nats), number of correct predictions, number of predictions.

    Each batch is (tokens [sequences, length], where [n] into the flattened tokens, targets [n], some `IGNORED`).
    """
    loss, correct, count = 0.0, 0.0, 0.0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for tokens, where, targets in batches:
            logits = model(tokens, where).float()
            loss += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            correct += float((logits.argmax(dim=-1) == targets).sum())
            count += float((targets != IGNORED).sum())
    model.train(training)
    return loss, correct, count


def masked_lm_facts(loss: float, correct: float, count: float) -> dict[str, float]:
    """Mean loss in nats per masked token, its exponential, and the share of masked tokens predicted right."""
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": correct / count}
