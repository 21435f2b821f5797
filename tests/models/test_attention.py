"""Attention on a CPU in bf16: of short sequences that of fp32, rounded once; of long ones, whole score matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train_then_compress.models.layers import attention


def inputs(length: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values in bf16, and a bias that hides the last key of the first sequence."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2, size, 16, generator=generator).bfloat16() for size in (length, keys, keys)]
    bias = torch.zeros(3, 1, 1, keys)
    bias[0, ..., -1] = -torch.inf
    return made[0], made[1], made[2], bias


def of_fp32(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """torch's, in fp32."""
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=bias)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(7, 7), (1, 64), (64, 5)])
def test_short_sequences_are_attended_to_in_fp32(length: int, keys: int, autocast: bool) -> None:
    given = inputs(length, keys)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = attention(*given, dropout=0.0)
    assert mixed.dtype == torch.bfloat16
    one_rounding = torch.finfo(torch.bfloat16).eps / 2
    assert torch.allclose(mixed.float(), of_fp32(*given), rtol=1.01 * one_rounding, atol=1e-6)


@pytest.mark.parametrize(("length", "keys"), [(65, 65), (3, 65), (65, 3)])
def test_long_ones_are_not(length: int, keys: int) -> None:
    given = inputs(length, keys)
    mixed = attention(*given, dropout=0.0)
    query, key, value, bias = given
    scores = (query * 0.25) @ key.transpose(2, 3) + bias.bfloat16()
    assert torch.equal(mixed, scores.softmax(dim=-1) @ value)
    assert torch.allclose(mixed.float(), of_fp32(*given), atol=0.05)
