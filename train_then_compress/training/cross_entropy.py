"""Cross-entropy, with label smoothing (Szegedy et al. 2016, section 7) as fairseq has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train_then_compress.evaluation.predictions import IGNORED

#: Smaller probabilities are not known to all their digits in fp32.
_LEAST = 1e-30


class _CrossEntropy(torch.autograd.Function):
    """torch's takes each logit's exponential twice, and smooths in twice as many passes over them: with thousands of
    kinds that is a tenth of a training step on a CPU."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, uniform: float) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = logits.softmax(dim=1)
        counts, own = targets != IGNORED, targets.clamp(min=0)[:, None]
        context.save_for_backward(probabilities, counts, own)
        context.uniform = uniform
        chosen = logits.gather(1, own)[:, 0]
        wanted = (1 - uniform) * chosen
        if uniform:
            wanted += uniform * logits.mean(dim=1)
        return (_log_sum_exp(logits, probabilities, chosen, own) - wanted)[counts].sum()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, counts, own = context.saved_tensors
        if context.uniform:
            gradient -= context.uniform / gradient.shape[1]
        gradient.scatter_add_(1, own, gradient.new_full(own.shape, context.uniform - 1))
        gradient.index_fill_(0, (~counts).nonzero()[:, 0], 0)
        if gradients[0] != 1:
            gradient *= gradients[0]
        return gradient, None, None


def _log_sum_exp(logits: Tensor, probabilities: Tensor, chosen: Tensor, own: Tensor) -> Tensor:
    """Of each row, without another pass over it: by the target's probability or, where that has been rounded away, by
    the largest."""
    likelihood = probabilities.gather(1, own)[:, 0]
    total = chosen - likelihood.log()
    rows = (likelihood < _LEAST).nonzero()[:, 0]
    total[rows] = logits[rows].amax(dim=1) - probabilities[rows].amax(dim=1).log()
    return total


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with a distribution that gives ``smoothing`` of the right kind away, in equal parts to all others
    (fairseq's ``label_smoothed_nll_loss``), summed over the rows of ``logits`` [n, kinds]; ``targets`` int64 [n], some
    `IGNORED`. Of bf16 logits it is computed in fp32. Its gradient can be had once.
    """
    kinds = logits.shape[1]
    loss: Tensor = _CrossEntropy.apply(logits, targets, smoothing * kinds / (kinds - 1))  # type: ignore[no-untyped-call]
    return loss
