"""FLOP counts of RoBERTa and of the translator. A multiplication and an addition are two.

Counted: linear layers, attention scores and mixing (all pairs of positions, padding included), and what predicts. Left
out: embedding look-up, normalization, activations, softmax, biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

EVALUATION_MASK_RATE = 0.15


@dataclass(frozen=True)
class ForwardFlops:
    """What a forward pass costs: each position in the layers, without and with all-pairs attention for each position
    of context, and each prediction."""

    per_token_in_matrices: float
    per_token_and_position: float
    per_prediction: float

    def per_token(self, length: int) -> float:
        """What each position of a sequence of ``length`` costs in the layers."""
        return self.per_token_in_matrices + self.per_token_and_position * length

    def training(self, tokens: int, length: int, predictions: int) -> float:
        """Forward and backward: three times the forward pass (the backward multiplies twice for each product)."""
        return 3 * (self.per_token(length) * tokens + self.per_prediction * predictions)


def forward_flops(model: nn.Module, nonzero: bool = False) -> ForwardFlops:
    """Counted from the shapes that a model really has; what is outside ``encoder.layers`` is spent on predictions.

    The masked LM predicts with its head and its tied embedding, a classifier with its head; a factored embedding also
    multiplies for each position. ``nonzero`` counts only products with a non-zero weight: what an ideal sparse engine
    would compute. No engine here does: never a speed-up.
    """

    def weights(matrix: Tensor) -> int:
        return int(matrix.count_nonzero()) if nonzero else matrix.numel()

    tied = not hasattr(model, "projection")
    layers = predicting = attention = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            embedding, count = name.startswith("encoder.embedding"), weights(module.weight)
            if name.startswith("encoder.layers.") or (embedding and isinstance(module, nn.Linear)):
                layers += count
            if (embedding and tied) or not name.startswith("encoder."):
                predicting += count
        elif hasattr(module, "heads"):
            attention += module.heads * module.head_size
    return ForwardFlops(2.0 * layers, 4.0 * attention, 2.0 * predicting)


@dataclass(frozen=True)
class TranslatorFlops:
    """What a forward pass of a translator costs: each source and target position in the layers, each pair of positions
    that attention compares (source, target, target with source), and each prediction."""

    per_source: float
    per_target: float
    per_source_pair: float
    per_target_pair: float
    per_cross_pair: float
    per_prediction: float

    def forward(self, sources: float, targets: float, source: float, target: float, predictions: float) -> float:
        """Of ``sources`` and ``targets`` positions in sentences of the lengths ``source`` and ``target``."""
        encoder = sources * (self.per_source + self.per_source_pair * source)
        decoder = targets * (self.per_target + self.per_target_pair * target + self.per_cross_pair * source)
        return encoder + decoder + predictions * self.per_prediction


def translator_flops(model: nn.Module, nonzero: bool = False) -> TranslatorFlops:
    """As `forward_flops`. Keys and values of the source for the decoder are the source's; future positions count."""
    weights = dict.fromkeys(("source", "target", "prediction"), 0)
    pairs = dict.fromkeys(("encoder", "decoder", "cross"), 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            reads_source = name.startswith("encoder.") or ".cross_attention.key_value" in name
            kind = "prediction" if name.startswith("embedding") else "source" if reads_source else "target"
            weights[kind] += int(module.weight.count_nonzero()) if nonzero else module.weight.numel()
        elif hasattr(module, "heads"):
            kind = "cross" if name.endswith("cross_attention") else name.split(".")[0]
            pairs[kind] += module.heads * module.head_size
    per_weight = [2.0 * count for count in weights.values()]
    per_pair = [4.0 * count for count in pairs.values()]
    return TranslatorFlops(*per_weight[:2], *per_pair, per_weight[2])
