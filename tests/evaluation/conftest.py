"""Small translators to decode with: random ones, and one that has learned something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train_then_compress.config.model import TransformerConfig
from train_then_compress.data.prepare import EOS, MASK, PAD
from train_then_compress.models.transformer import Translator

VOCABULARY, LENGTH = 40, 40


def _sources(lengths: list[int], vocabulary: int = VOCABULARY, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MASK + 1, vocabulary, (len(lengths), max(lengths)), generator=generator)
    for row, end in zip(tokens, lengths, strict=True):
        row[end - 1 :] = PAD
        row[end - 1] = EOS
    return tokens


@pytest.fixture(scope="session")
def sources() -> Callable[..., Tensor]:
    """A function that makes sources of given lengths, ``</s>`` included, int64 [sentences, longest]."""
    return _sources


@pytest.fixture(scope="session")
def translator() -> Callable[..., Translator]:
    """A function that makes a model of random weights; ``</s>`` is likely enough that hypotheses end at many lengths.

    One of the same ``seed`` and another ``noise`` is more or less like it.
    """

    def make(vocabulary: int = VOCABULARY, seed: int = 1, noise: float = 0.0, depth: int = 2) -> Translator:
        torch.manual_seed(seed)
        shape = TransformerConfig(depth=depth, width=32, head_size=16, dropout=0.0)
        model = Translator(shape, vocabulary, LENGTH).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
            model.decoder.final_norm.weight.mul_(0.3)
            model.decoder.final_norm.bias += 0.5 * model.embedding.weight[EOS]
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def trained(sources: Callable[..., Tensor]) -> Translator:
    """A model on its way to learn a made-up translation: the source backwards, every second word said twice."""
    torch.manual_seed(1)
    model = Translator(TransformerConfig(depth=1, width=48, head_size=16, dropout=0.0), VOCABULARY, LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        length = 3 + step % 7
        source = sources([length] * 32, seed=step)
        words = source[:, :-1].flip(1)
        said = torch.cat([words.repeat_interleave(1 + torch.arange(length - 1) % 2, dim=1), source[:, -1:]], dim=1)
        target = said.roll(1, dims=1)
        logits = model(source, target, torch.arange(target.numel()))
        loss = F.cross_entropy(logits, said.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 3.2, "it must have learned something"
    return model.eval()
