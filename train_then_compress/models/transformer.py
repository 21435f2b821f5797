"""The Transformer for translation (Vaswani et al. 2017): encoder, decoder with caches, embeddings tied or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config.model import TransformerConfig
from train_then_compress.config.parts import EMBEDDINGS
from train_then_compress.data.prepare import PAD
from train_then_compress.models.cache import Cache, Memory, RaggedCache
from train_then_compress.models.dropout import Dropout
from train_then_compress.models.factored import FactoredEmbedding
from train_then_compress.models.layers import EncoderLayer, Rotation, TokenEmbedding, attention
from train_then_compress.models.positions import FIRST_POSITION, rotary_angles, sinusoidal

Side = Literal["source", "target"]


class CrossAttention(nn.Module):
    """Multi-head attention from target positions to source positions."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.head_size, self.dropout = config.heads, config.width // config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def remember(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of encoded sources [sentences, length, width], each [sentences, heads, length, head_size]."""
        sentences, length, _ = source.shape
        projected = self.key_value(source).view(sentences, length, 2, self.heads, self.head_size)
        key, value = projected.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` [sentences, n, width] -> the same: n target positions, or n hypotheses of one sentence, share keys."""
        sentences, count, _ = x.shape
        query = self.query(x).view(sentences, count, self.heads, self.head_size).transpose(1, 2)
        mixed = attention(query, key, value, bias, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).reshape(sentences, count, self.heads * self.head_size))


class TransformerLayer(EncoderLayer):
    """Self-attention, in the decoder attention to the source, and feed-forward, each with dropout and a residual."""

    def __init__(self, config: TransformerConfig, decoder: bool):
        super().__init__(config, F.relu)
        if decoder:
            self.cross_attention = CrossAttention(config)
            self.cross_attention_norm = nn.LayerNorm(config.width)

    def forward(
        self, x: Tensor, bias: Tensor | None, rotation: Rotation | None,
        source: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:  # fmt: skip
        """``x`` [sentences, length, width] -> the same; ``source``: keys, values and bias of the encoded source."""
        x = self._residual(x, self.attention_norm, lambda y: self.attention(y, bias, rotation))
        if source is not None:
            x = self._residual(x, self.cross_attention_norm, lambda y: self.cross_attention(y, *source))
        return self._residual(x, self.feed_forward_norm, self.feed_forward)

    def step(
        self, x: Tensor, layer: int, cache: Cache, rotation: Rotation | None, source: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """One more target position of each hypothesis, or several of a sentence's only one: ``x`` [sentences,
        hypotheses or positions, width] -> the same."""
        sentences, count, width = x.shape

        def attend(y: Tensor) -> Tensor:
            query, key, value = self.attention.project(y.view(cache.rows, -1, width), rotation)
            keys, values = cache.append(layer, key, value)
            scores = (query * query.shape[3] ** -0.5) @ keys.transpose(2, 3)
            if cache.bias is not None:
                scores = scores + cache.bias
            mixed = scores.softmax(dim=-1) @ values
            return self.attention.output(mixed.transpose(1, 2).reshape(sentences, count, -1))

        x = self._residual(x, self.attention_norm, attend)
        x = self._residual(x, self.cross_attention_norm, lambda y: self.cross_attention(y, *source))
        return self._residual(x, self.feed_forward_norm, self.feed_forward)

    def _residual(self, x: Tensor, norm: nn.Module, inner: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(inner(norm(x)))
        normalized: Tensor = norm(x + self.dropout(inner(x)))
        return normalized


class Stack(nn.Module):
    """The layers of one side, with a last normalization under pre-norm."""

    def __init__(self, config: TransformerConfig, depth: int, decoder: bool):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config, decoder) for _ in range(depth))
        self.final_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def __iter__(self) -> Iterator[TransformerLayer]:
        return (layer for layer in self.layers if isinstance(layer, TransformerLayer))


class Translator(nn.Module):
    """Source tokens and the target's beginning to logits of the target's next token.

    One embedding for source, target and output or, untied, one for each; scaled by sqrt(width) where it is looked up
    (Vaswani et al., section 3.4).
    """

    positions: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(self, config: TransformerConfig, vocab_size: int, length: int):
        super().__init__()
        self.config, self.length = config, length
        self.embedding: TokenEmbedding | FactoredEmbedding = TokenEmbedding(vocab_size, config.width, PAD)
        if not config.tied:
            self.target_embedding: nn.Module = TokenEmbedding(vocab_size, config.width, PAD)
            self.output_embedding = nn.Linear(config.width, vocab_size, bias=False)
        if config.positions == "learned":
            self.source_positions = nn.Parameter(torch.empty(length, config.width))
            self.target_positions = nn.Parameter(torch.empty(length, config.width))
        elif config.positions == "sinusoidal":
            table = sinusoidal(length, config.width, FIRST_POSITION)
            self.register_buffer("source_positions", table, persistent=False)
            self.register_buffer("target_positions", table, persistent=False)
        else:
            cosine, sine = rotary_angles(length, config.width // config.heads)
            self.register_buffer("cosine", cosine, persistent=False)
            self.register_buffer("sine", sine, persistent=False)
        self.dropout = Dropout(config.dropout)
        self.encoder = Stack(config, config.encoder_layers, decoder=False)
        self.decoder = Stack(config, config.decoder_layers, decoder=True)
        initialize(self)

    def _embed(self, tokens: Tensor, side: Side, positions: Tensor | slice) -> Tensor:
        embedding = self.embedding if side == "source" or self.config.tied else self.target_embedding
        x: Tensor = embedding(tokens) * math.sqrt(self.config.width)
        if self.config.positions == "rotary":
            return x
        table: Tensor = getattr(self, f"{side}_positions")
        return x + table[positions]

    def _project(self, hidden: Tensor) -> Tensor:
        if self.config.tied:
            return self.embedding.project(hidden)
        logits: Tensor = self.output_embedding(hidden)
        return logits

    def _rotation(self, start: int, end: int) -> Rotation | None:
        return (self.cosine[start:end], self.sine[start:end]) if self.config.positions == "rotary" else None

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [sentences, length], padded at the end -> hidden states [sentences, length, width] and the bias that
        keeps attention off padding, [sentences, 1, 1, length]."""
        x = self.dropout(self._embed(source, "source", slice(source.shape[1])))
        bias = torch.zeros_like(source, dtype=x.dtype).masked_fill(source == PAD, -math.inf)[:, None, None, :]
        rotation = self._rotation(0, source.shape[1])
        for layer in self.encoder:
            x = layer(x, bias, rotation)
        return self.encoder.final_norm(x), bias

    def forward(self, source: Tensor, target: Tensor, where: Tensor) -> Tensor:
        """Logits [n, vocabulary] at ``where``, int64 [n] into the flattened ``target`` [sentences, length], whose every
        position sees only itself and those before it."""
        encoded, source_bias = self.encode(source)
        length = target.shape[1]
        x = self.dropout(self._embed(target, "target", slice(length)))
        future = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        rotation = self._rotation(0, length)
        for layer in self.decoder:
            key, value = layer.cross_attention.remember(encoded)
            x = layer(x, future, rotation, (key, value, source_bias))
        hidden = self.decoder.final_norm(x).flatten(0, 1).index_select(0, where)
        return self._project(hidden)

    def remember(self, source: Tensor) -> Memory:
        """Encode sources [sentences, length] for decoding."""
        encoded, bias = self.encode(source)
        pairs = [layer.cross_attention.remember(encoded) for layer in self.decoder]
        return Memory([key for key, _ in pairs], [value for _, value in pairs], bias)

    def new_cache(self, rows: int) -> Cache:
        """An empty cache for so many hypotheses."""
        return Cache(rows, *self._cache_shape())

    def new_ragged_cache(self, rows: int) -> RaggedCache:
        """An empty cache for so many sentences, each with one hypothesis."""
        return RaggedCache(rows, *self._cache_shape())

    def _cache_shape(self) -> tuple[list[int], int, Tensor]:
        layers = list(self.decoder)
        heads = [layer.attention.heads for layer in layers]
        return heads, layers[0].attention.head_size, layers[0].attention_norm.weight

    def step(self, tokens: Tensor, memory: Memory, cache: Cache) -> Tensor:
        """Logits of the next token, [sentences, hypotheses, vocabulary], after each hypothesis's last token, int64
        [sentences, hypotheses]; those before it are in the cache. With a `RaggedCache`: after each of a sentence's
        last tokens, int64 [sentences, positions]."""
        positions = cache.begin(tokens)
        x = self._embed(tokens, "target", positions)
        rotation = None
        if self.config.positions == "rotary":
            rotation = self.cosine[positions][:, None], self.sine[positions][:, None]
        for number, layer in enumerate(self.decoder):
            x = layer.step(x, number, cache, rotation, (memory.keys[number], memory.values[number], memory.bias))
        return self._project(self.decoder.final_norm(x))


def initialize(model: Translator) -> None:
    """Glorot-uniform matrices, embeddings normal with standard deviation width^-0.5 (fairseq's Transformer)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in EMBEDDINGS:
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, module in model.named_children():
        if name in EMBEDDINGS and isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=model.config.width**-0.5)
        if isinstance(module, TokenEmbedding):
            nn.init.zeros_(module.weight[PAD])
    if model.config.positions == "learned":
        nn.init.normal_(model.source_positions, std=model.config.width**-0.5)
        nn.init.normal_(model.target_positions, std=model.config.width**-0.5)
