"""RoBERTa (Liu et al. 2019): encoder; as a masked language model; as a classifier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config import RobertaConfig
from train_then_compress.data.prepare import PAD
from train_then_compress.models.dropout import Dropout
from train_then_compress.models.factored import FactoredEmbedding
from train_then_compress.models.layers import EncoderLayer, Rotation, TokenEmbedding
from train_then_compress.models.positions import FIRST_POSITION, rotary_angles, sinusoidal


class Encoder(nn.Module):
    """Token ids to hidden states.

    As in fairseq, the embeddings are normalized before the first layer, and pre-norm adds a last normalization.
    """

    positions: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(self, config: RobertaConfig, vocab_size: int, length: int):
        super().__init__()
        self.config, self.length = config, length
        self.embedding: TokenEmbedding | FactoredEmbedding = TokenEmbedding(vocab_size, config.width, PAD)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(length, config.width))
        elif config.positions == "sinusoidal":
            self.register_buffer("positions", sinusoidal(length, config.width, FIRST_POSITION), persistent=False)
        else:
            cosine, sine = rotary_angles(length, config.width // config.heads)
            self.register_buffer("cosine", cosine, persistent=False)
            self.register_buffer("sine", sine, persistent=False)
        self.embedding_norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def embed(self, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Tensor | None, Rotation | None]:
        """What every layer is given: states [batch, length, width] for the first, attention bias, rotation."""
        length = tokens.shape[1]
        x = self.embedding(tokens)
        rotation = None
        if self.config.positions == "rotary":
            rotation = self.cosine[:length], self.sine[:length]
        else:
            x = x + self.positions[:length]
        x = self.dropout(self.embedding_norm(x))
        bias = None
        if padded:
            bias = torch.zeros_like(tokens, dtype=x.dtype).masked_fill(tokens == PAD, -math.inf)[:, None, None, :]
        return x, bias, rotation

    def forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """int64 [batch, length <= self.length] -> [batch, length, width].

        ``padded=False`` promises that no padding is among the tokens, and spares the attention mask.
        """
        x, bias, rotation = self.embed(tokens, padded)
        for layer in self.layers:
            x = layer(x, bias, rotation)
        normalized: Tensor = self.final_norm(x)
        return normalized

    def at(self, tokens: Tensor, where: Tensor, padded: bool = True) -> Tensor:
        """What `forward` gives at some positions, int64 [n] into the flattened batch -> [n, width].

        In training the last layer is computed there only, unless something watches it.
        """
        *inner, last = self.layers
        if not self.training or last._forward_hooks:
            return self(tokens, padded).flatten(0, 1).index_select(0, where)
        assert isinstance(last, EncoderLayer)
        x, bias, rotation = self.embed(tokens, padded)
        for layer in inner:
            x = layer(x, bias, rotation)
        normalized: Tensor = self.final_norm(last.at(x, bias, rotation, where))
        return normalized


class MaskedLM(nn.Module):
    """The encoder with RoBERTa's head; logits are computed at the asked-for positions only, by the token embedding or,
    untied, by an output embedding."""

    def __init__(self, config: RobertaConfig, vocab_size: int, length: int):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, vocab_size, length)
        self.head = nn.Linear(config.width, config.width)
        self.head_norm = nn.LayerNorm(config.width)
        if config.tied:
            self.bias = nn.Parameter(torch.zeros(vocab_size))
        else:
            self.output_embedding = nn.Linear(config.width, vocab_size)
        initialize(self, self.encoder)

    def forward(self, tokens: Tensor, where: Tensor, padded: bool = True) -> Tensor:
        """``tokens`` int64 [batch, length], ``where`` int64 [n] into the flattened batch -> logits [n, vocabulary]."""
        hidden = self.head_norm(F.gelu(self.head(self.encoder.at(tokens, where, padded))))
        if self.config.tied:
            return self.encoder.embedding.project(hidden, self.bias)
        logits: Tensor = self.output_embedding(hidden)
        return logits


class Classifier(nn.Module):
    """The encoder with RoBERTa's classification head on ``<s>``: dense, tanh, projection, dropout before both."""

    def __init__(self, config: RobertaConfig, vocab_size: int, length: int, labels: int):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, vocab_size, length)
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.width)
        self.projection = nn.Linear(config.width, labels)
        initialize(self, self.encoder)

    def forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """``tokens`` int64 [batch, length] -> logits [batch, labels]."""
        return self.predict(self.encoder(tokens, padded)[:, 0])

    def predict(self, first: Tensor) -> Tensor:
        """The states of ``<s>`` after the encoder [batch, width] -> logits [batch, labels]."""
        return self.projection(self.dropout(torch.tanh(self.head(self.dropout(first)))))


def initialize(model: nn.Module, encoder: Encoder) -> None:
    """Normal weights of standard deviation 1/sqrt(inputs), at most 0.05; residual outputs scaled by depth.

    The 1/sqrt(2 * depth) keeps the residual stream's variance independent of depth (Radford et al. 2019, section 2.3).
    """
    config = encoder.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            deviation = min(0.05, 1 / math.sqrt(module.in_features))
            if name.endswith(("attention.output", "feed_forward.outer")):
                deviation /= math.sqrt(2 * config.depth)
            nn.init.normal_(module.weight, std=deviation)
            nn.init.zeros_(module.bias)
    nn.init.normal_(encoder.embedding.weight, std=0.02)
    if config.positions == "learned":
        nn.init.normal_(encoder.positions, std=0.02)
    with torch.no_grad():
        encoder.embedding.weight[PAD].zero_()
