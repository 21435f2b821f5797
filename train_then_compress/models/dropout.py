"""Dropout that is quick on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = -(2**63)


class Dropout(nn.Module):
    """As ``nn.Dropout``, by `drop`."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return drop(x, self.p if self.training else 0.0)


def drop(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability ``p``, to a multiple of 2^-16, and scales the others by 1 / (1 - p).

    PyTorch's generator of the CPU makes one number after another on one core, one for each element: a third of a
    training step. Here 64 bits decide about four elements, which is three times as fast.
    """
    if not p:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(_LEAST, None)
    lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (lanes >= round(p * 2**16) - 2**15).to(x.dtype).mul_(1 / (1 - p))
