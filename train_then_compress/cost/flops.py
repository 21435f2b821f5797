"""FLOP counts of RoBERTa and of the Transformer for translation. A multiplication and an addition are two.

Counted: linear layers, attention scores and mixing (all pairs of positions, padding included; in the decoder also those
of later positions, which are computed and then masked), and what predicts. Left out: embedding look-up, normalization,
activations, softmax, biases. Every layer counts at every position, though the masked LM spares itself most of the last
one in training (`Encoder.at`): so counts compare with others', and speeds in FLOP/s are nominal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from train_then_compress.config.parts import in_embedding, in_layers, reads_target

EVALUATION_MASK_RATE = 0.15


@dataclass(frozen=True)
class ForwardFlops:
    """What a forward pass costs: each position in the layers, without and with all-pairs attention for each position
    of context, and each prediction.

    A translation's ``per_token`` is about its source (the decoder's keys and values of it among them); each position of
    the target costs the decoder's layers, attention for each position of the target, and for each of the source.
    """

    per_token_in_matrices: float
    per_token_and_position: float
    per_prediction: float
    per_target_in_matrices: float = 0.0
    per_target_and_position: float = 0.0
    per_target_and_source: float = 0.0

    def per_token(self, length: int) -> float:
        """What each position of a sequence of ``length`` costs in the layers."""
        return self.per_token_in_matrices + self.per_token_and_position * length

    def per_target(self, length: int, source_length: int) -> float:
        """What each position of a target of ``length`` costs in the decoder's layers."""
        in_attention = self.per_target_and_position * length + self.per_target_and_source * source_length
        return self.per_target_in_matrices + in_attention

    def training(self, tokens: int, length: int, predictions: int) -> float:
        """Forward and backward: three times the forward pass (the backward multiplies twice for each product)."""
        return 3 * (self.per_token(length) * tokens + self.per_prediction * predictions)

    def translating(self, source: tuple[int, ...], target: tuple[int, ...], predictions: int) -> float:
        """A forward pass over sources and targets of these shapes, both [sentences, length]."""
        (sources, length), (targets, target_length) = source, target
        encoded = self.per_token(length) * sources * length
        decoded = self.per_target(target_length, length) * targets * target_length
        return encoded + decoded + self.per_prediction * predictions

    def training_to_translate(self, source: tuple[int, ...], target: tuple[int, ...], predictions: int) -> float:
        """Forward and backward, as in `training`."""
        return 3 * self.translating(source, target, predictions)


def forward_flops(model: nn.Module, nonzero: bool = False) -> ForwardFlops:
    """Counted from the shapes that a model really has; what is neither a layer nor an embedding predicts.

    The masked LM predicts with its head and its embedding, a classifier with its head, a translator with its embedding:
    that of the output, or the one that is tied to it; a factored embedding that is looked up also multiplies for each
    position. ``nonzero`` counts only products with a non-zero weight: what an ideal sparse engine would compute. No
    engine here does: never a speed-up.
    """

    def weights(matrix: Tensor) -> int:
        return int(matrix.count_nonzero()) if nonzero else matrix.numel()

    looked_up = {"embedding": ["token", "target"], "target_embedding": ["target"], "output_embedding": []}
    if hasattr(model, "target_embedding"):
        looked_up["embedding"] = ["token"]
    output = "output_embedding" if hasattr(model, "output_embedding") else "embedding"
    predicts = {None} if hasattr(model, "projection") else {None, output}
    predicting = 0
    matrices, attention = {"token": 0, "target": 0}, {"token": 0, "target": 0, "source": 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            count, embedding = weights(module.weight), next(filter(in_embedding, name.split(".")), None)
            if in_layers(name):
                matrices["target" if reads_target(name) else "token"] += count
            elif embedding in predicts:
                predicting += count
            if embedding is not None and isinstance(module, nn.Linear):
                for place in looked_up[embedding]:
                    matrices[place] += count
        elif hasattr(module, "heads"):
            place = ("source" if name.endswith("cross_attention") else "target") if reads_target(name) else "token"
            attention[place] += module.heads * module.head_size
    return ForwardFlops(
        2.0 * matrices["token"], 4.0 * attention["token"], 2.0 * predicting,
        2.0 * matrices["target"], 4.0 * attention["target"], 4.0 * attention["source"],
    )  # fmt: skip
