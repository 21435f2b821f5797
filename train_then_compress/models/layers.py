"""The encoder layer: self-attention and a feed-forward network, normalized before (pre) or after (post)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config.model import ModelShape
from train_then_compress.models.dropout import Dropout, drop
from train_then_compress.models.positions import rotate

Rotation = tuple[Tensor, Tensor]

#: Beyond this length whole score matrices would take too much memory.
_EXPLICIT_UP_TO = 1024
#: Up to this length fp32 is about as fast as bf16 on a CPU (0.8 to 1.3 times, with AMX), which compiles bf16
#: multiplications for every new shape.
_FP32_UP_TO = 64


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention; all [batch, heads, length, head_size], ``bias``, broadcast, goes onto the scores.

    PyTorch's fused kernel, except on the CPU in bf16, where its backward is several times slower than multiplying whole
    score matrices, which rounds the scores to bf16 (0.5 % relative error of the output against 0.2 %), and with
    dropout, which it does not have there: PyTorch falls back on whole score matrices and its slow generator.
    In bf16 on the CPU, short sequences are attended to in fp32.
    """
    in_bf16_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if in_bf16_on_cpu and max(query.shape[2], key.shape[2]) <= _FP32_UP_TO:
        with torch.autocast("cpu", enabled=False):
            mixed = attention(query.float(), key.float(), value.float(), bias, dropout)
        return mixed.to(query.dtype)
    if bias is not None:
        bias = bias.to(query.dtype)
    fused_is_slow = in_bf16_on_cpu or (query.device.type == "cpu" and dropout > 0)
    if not fused_is_slow or query.shape[2] > _EXPLICIT_UP_TO:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    return drop(scores.softmax(dim=-1), dropout) @ value


class TokenEmbedding(nn.Embedding):
    """Token ids to vectors and, where they are tied, vectors to a score for each token (Press & Wolf 2017)."""

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[.., width] -> [.., vocabulary]."""
        return F.linear(x, self.weight, bias)


def _at(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x.flatten(0, 1).index_select(0, where)


class SelfAttention(nn.Module):
    """Multi-head attention with one fused projection for queries, keys and values.

    ``heads`` may be fewer than the width has room for: structured pruning takes them away.
    """

    def __init__(self, config: ModelShape):
        super().__init__()
        self.heads, self.head_size, self.dropout = config.heads, config.width // config.heads, config.dropout
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` [batch, length, width] -> queries, keys and values, each [batch, heads, length, head_size]."""
        batch, length, _ = x.shape
        projected = self.query_key_value(x).view(batch, length, 3, self.heads, self.head_size)
        query, key, value = projected.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        return query, key, value

    def forward(self, x: Tensor, bias: Tensor | None, rotation: Rotation | None, where: Tensor | None = None) -> Tensor:
        """``x`` [batch, length, width]; ``bias``, broadcast to [batch, heads, length, length], minus infinity where
        attention must not go, or None; ``where`` as in `EncoderLayer.at`."""
        batch, length, _ = x.shape
        query, key, value = self.project(x, rotation)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, bias, dropout)
        return self.output(_at(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.head_size), where))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them (RoBERTa: GELU); the inner one has four times the width."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.activation = activation
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.outer(self.activation(self.inner(x)))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout and a residual connection."""

    def __init__(self, config: ModelShape, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config.width, activation)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor | None, rotation: Rotation | None) -> Tensor:
        """[batch, length, width] -> the same."""
        return self.at(x, bias, rotation, None)

    def at(self, x: Tensor, bias: Tensor | None, rotation: Rotation | None, where: Tensor | None) -> Tensor:
        """What `forward` gives at some positions, int64 [n] into the flattened batch, from which all are looked at:
        [n, width]. The rest is not computed."""
        if self.pre_norm:
            x = _at(x, where) + self.dropout(self.attention(self.attention_norm(x), bias, rotation, where))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(_at(x, where) + self.dropout(self.attention(x, bias, rotation, where)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
