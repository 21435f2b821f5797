"""Positions: learned and sinusoidal tables added to the embeddings, and rotary rotations of queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train_then_compress.data.prepare import PAD

#: fairseq and transformers number positions from here; the rows of a table before it are never read.
FIRST_POSITION = PAD + 1


def sinusoidal(length: int, width: int, offset: int = 0) -> Tensor:
    """float32 [length, width], as fairseq has it: all sines, then all cosines (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    frequency = torch.exp(torch.arange(half) * -(math.log(10000) / max(1, half - 1)))
    angle = torch.arange(offset, offset + length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def rotary_angles(length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each float32 [length, head_size] (Su et al. 2021, equation 34; halves, not pairs).

    The sines of the first half are negated, as that half of `rotate`'s exchange is.
    """
    frequency = 10000 ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.cos(), angle.cos()], dim=1), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``x`` [batch, heads, length, head_size] by the angle of each position."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine.to(x.dtype) + torch.cat([second, first], dim=-1) * sine.to(x.dtype)
