"""Dropout against what it is by definition, and against chance."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from train_then_compress.models.dropout import Dropout, drop


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 7), (400, 501)])
def test_each_element_goes_with_the_probability_and_the_rest_is_scaled(p: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    y = drop(x, p)
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / (1 - p))
    assert stats.binomtest(int(kept.sum()), kept.numel(), 1 - p).pvalue > 1e-3
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, kept / (1 - p))


def test_neighbours_are_independent() -> None:
    """The four elements that share 64 random bits, and elements further apart."""
    torch.manual_seed(0)
    kept = drop(torch.ones(100_000, 8), 0.3) != 0
    for first in range(8):
        for second in range(first):
            table = [[int((kept[:, first].eq(a) & kept[:, second].eq(b)).sum()) for a in (0, 1)] for b in (0, 1)]
            assert stats.chi2_contingency(table).pvalue > 1e-4, (first, second)


def test_a_seed_repeats_it_and_evaluation_leaves_everything() -> None:
    x, module = torch.ones(50, 3, dtype=torch.bfloat16), Dropout(0.25)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(first, module(x)) and not torch.equal(first, second)
    assert first.dtype == x.dtype
    assert module.eval()(x) is x and drop(x, 0.0) is x
