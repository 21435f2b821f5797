"""Label smoothing against torch's, which spreads over all kinds, the right one among them; its gradient numerically."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from train_then_compress.evaluation.predictions import IGNORED
from train_then_compress.training.smoothing import smoothed_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_value_and_gradient_are_torchs(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 10, IGNORED, 0, 5, IGNORED, 5])
    theirs = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing * 11 / 10)
    ours = smoothed_cross_entropy(logits, targets, smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (expected,), (gradient,) = torch.autograd.grad(3 * theirs, logits), torch.autograd.grad(3 * ours, logits)
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: smoothed_cross_entropy(x, targets, smoothing), logits)


def test_no_prediction_is_no_loss() -> None:
    logits = torch.zeros(0, 11, requires_grad=True)
    loss = smoothed_cross_entropy(logits, torch.zeros(0, dtype=torch.int64), 0.1)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and logits.grad.shape == (0, 11)
