"""Cross-entropy and its smoothing against torch's, which spreads over all kinds, the right one among them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from train_then_compress.evaluation.predictions import IGNORED
from train_then_compress.training.cross_entropy import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_value_and_gradient_are_torchs(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 10, IGNORED, 0, 5, IGNORED, 5])
    theirs = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing * 11 / 10)
    ours = cross_entropy(logits, targets, smoothing)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (expected,), (gradient,) = torch.autograd.grad(3 * theirs, logits), torch.autograd.grad(3 * ours, logits)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_no_prediction_is_no_loss() -> None:
    logits = torch.zeros(0, 11, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64), 0.1)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and logits.grad.shape == (0, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_computed_in_fp32_however_unlikely_the_target(dtype: torch.dtype) -> None:
    """The probability of the last target is exp(-500): zero in fp32, and its loss is not infinite."""
    logits = torch.tensor([[0.5, 300.0, 299.0], [-2.0, 1.0, 0.0], [0.0, 500.0, 400.0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([2, 0, 0])
    theirs = F.cross_entropy(logits.float(), targets, reduction="sum")
    ours = cross_entropy(logits, targets)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (expected,), (gradient,) = torch.autograd.grad(theirs, logits), torch.autograd.grad(ours, logits)
    assert gradient.dtype == dtype and torch.allclose(gradient, expected, atol=1e-6)


def test_its_gradient_can_be_had_once() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
