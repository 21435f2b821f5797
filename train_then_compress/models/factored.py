"""Linear layers and token embeddings of low rank: two small matrices in place of a large one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.data.prepare import PAD


class Factored(nn.Module):
    """A linear layer of low rank: ``first`` gives ``rank`` numbers, ``second`` makes the outputs of them."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.first = nn.Linear(inputs, rank, bias=False)
        self.second = nn.Linear(rank, outputs)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, [outputs, inputs]."""
        return self.second.weight @ self.first.weight

    @property
    def bias(self) -> nn.Parameter:
        """[outputs]."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.second(self.first(x))


class FactoredEmbedding(nn.Module):
    """A token embedding of low rank (Lan et al. 2020, section 3.1), and a tied output."""

    def __init__(self, vocab_size: int, width: int, rank: int):
        super().__init__()
        self.first = nn.Embedding(vocab_size, rank, padding_idx=PAD)
        self.second = nn.Linear(rank, width, bias=False)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, [vocabulary, width]."""
        return self.first.weight @ self.second.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        return self.second(self.first(tokens))

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[.., width] -> a score for each token, [.., vocabulary], in two multiplications."""
        return F.linear(x @ self.second.weight, self.first.weight, bias)
