"""Cross-entropy, with label smoothing (Szegedy et al. 2016, section 7) as fairseq has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train_then_compress.evaluation.predictions import IGNORED


class _CrossEntropy(torch.autograd.Function):
    """torch's takes each logit's exponential twice, and smooths in twice as many passes over them: with thousands of
    kinds that is a tenth of a training step on a CPU."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, uniform: float) -> Tensor:
        probabilities = logits.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        counts, own = targets != IGNORED, targets.clamp(min=0)[:, None]
        context.save_for_backward(probabilities, counts, own)
        context.uniform = uniform
        # The logarithm of the sum of exponentials, of the likeliest: a less likely one's probability may round to zero.
        total = logits.amax(dim=1).to(probabilities.dtype) - probabilities.amax(dim=1).log()
        wanted = (1 - uniform) * logits.gather(1, own)[:, 0].to(probabilities.dtype)
        if uniform:
            wanted += uniform * logits.mean(dim=1, dtype=probabilities.dtype)
        return (total - wanted)[counts].sum()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, counts, own = context.saved_tensors
        if context.uniform:
            gradient -= context.uniform / gradient.shape[1]
        gradient.scatter_add_(1, own, gradient.new_full(own.shape, context.uniform - 1))
        return gradient.mul_((gradients[0] * counts)[:, None]), None, None


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with a distribution that gives ``smoothing`` of the right kind away, in equal parts to all others
    (fairseq's ``label_smoothed_nll_loss``), summed over the rows of ``logits`` [n, kinds]; ``targets`` int64 [n], some
    `IGNORED`. Of bf16 logits it is computed in fp32. Its gradient can be had once.
    """
    kinds = logits.shape[1]
    loss: Tensor = _CrossEntropy.apply(logits, targets, smoothing * kinds / (kinds - 1))  # type: ignore[no-untyped-call]
    return loss
