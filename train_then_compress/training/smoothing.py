"""Label-smoothed cross-entropy (Szegedy et al. 2016, section 7), as fairseq has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train_then_compress.evaluation.predictions import IGNORED


class _Smoothed(torch.autograd.Function):
    """torch's `cross_entropy` can smooth, too, but in about twice as many passes over the logits: with thousands of
    kinds that is a tenth of a training step on a CPU."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, uniform: float) -> Tensor:
        log_probabilities = logits.log_softmax(dim=1)
        counts, own = targets != IGNORED, targets.clamp(min=0)
        context.save_for_backward(log_probabilities, counts, own)
        context.uniform = uniform
        right = log_probabilities.gather(1, own[:, None])[:, 0]
        return -((1 - uniform) * right + uniform * log_probabilities.mean(dim=1))[counts].sum()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        log_probabilities, counts, own = context.saved_tensors
        gradient = log_probabilities.exp()
        gradient -= context.uniform / gradient.shape[1]
        gradient[torch.arange(len(own), device=own.device), own] -= 1 - context.uniform
        return gradient.mul_((gradients[0] * counts)[:, None]), None, None


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with a distribution that gives ``smoothing`` of the right kind away, in equal parts to all others
    (fairseq's ``label_smoothed_nll_loss``), summed over the rows of ``logits`` [n, kinds]; ``targets`` int64 [n], some
    `IGNORED`.
    """
    kinds = logits.shape[1]
    loss: Tensor = _Smoothed.apply(logits, targets, smoothing * kinds / (kinds - 1))  # type: ignore[no-untyped-call]
    return loss
