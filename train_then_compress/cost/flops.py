"""FLOP counts of the RoBERTa masked LM. A multiplication and an addition are two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from train_then_compress.config import RobertaConfig

EVALUATION_MASK_RATE = 0.15


@dataclass(frozen=True)
class MaskedLMFlops:
    """Forward FLOPs by matrix multiplications, for one shape at one sequence length.

    Counted: linear layers, attention scores and mixing (all pairs of positions, padding included), the head and the
    output projection at predicted positions. Left out: embedding look-up, normalization, activations, softmax, biases.
    """

    config: RobertaConfig
    vocab_size: int
    length: int

    @property
    def per_token(self) -> float:
        """What each position costs in the encoder."""
        return self.config.depth * 2 * 12 * self.config.width**2 + self._attention

    @property
    def per_prediction(self) -> float:
        """What each predicted position costs in the head and the output projection."""
        return 2 * self.config.width**2 + 2 * self.config.width * self.vocab_size

    @property
    def _attention(self) -> float:
        return self.config.depth * 2 * 2 * self.length * self.config.width

    def training(self, tokens: int, predictions: int) -> float:
        """Forward and backward: three times the forward pass (the backward multiplies twice for each product)."""
        return 3 * (self.per_token * tokens + self.per_prediction * predictions)

    def dense_per_token(self) -> float:
        """Forward FLOPs per token where 15 % of the tokens are predicted, as in evaluation."""
        return self.per_token + EVALUATION_MASK_RATE * self.per_prediction

    def nonzero_per_token(self, nonzero: Mapping[str, int]) -> float:
        """The same, counting only products with a non-zero weight (``nonzero``: their number by parameter name).

        What an ideal sparse engine would compute. No engine here does: never a speed-up.
        """
        layers = sum(n for name, n in nonzero.items() if ".layers." in name and name.endswith(MATRICES))
        predicting = nonzero["head.weight"] + nonzero["encoder.embedding.weight"]
        return 2 * layers + self._attention + EVALUATION_MASK_RATE * 2 * predicting


MATRICES = ("query_key_value.weight", "attention.output.weight", "inner.weight", "outer.weight")
