"""The translation Transformer: step by step against all at once. `test_fairseq_parity` holds it against fairseq's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train_then_compress.config.model import TransformerConfig
from train_then_compress.data.prepare import EOS, MASK, PAD
from train_then_compress.models.transformer import Translator

VOCABULARY, LENGTH = 60, 24


def shape(**changes: object) -> TransformerConfig:
    return TransformerConfig(
        **{"depth": 2, "decoder_depth": 3, "width": 48, "head_size": 16, "dropout": 0.0, **changes}
    )  # type: ignore[arg-type]


@cache
def translator(config: TransformerConfig) -> Translator:
    """A model far from its initialization, so that every part of it matters."""
    torch.manual_seed(0)
    model = Translator(config, VOCABULARY, LENGTH).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded(lengths: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MASK + 1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    for row, end in zip(tokens, lengths, strict=True):
        row[end - 1 :] = PAD
        row[end - 1] = EOS
    return tokens


def targets(lengths: list[int]) -> Tensor:
    """What the decoder is fed: `</s>` first, as fairseq has it."""
    tokens = padded(lengths, 2).roll(1, dims=1)
    tokens[:, 0] = EOS
    for row, end in zip(tokens, lengths, strict=True):
        row[end:] = PAD
    return tokens


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("norm, tied", [("pre", True), ("post", True), ("pre", False)])
@settings(max_examples=10)
@given(st.lists(st.integers(2, 14), min_size=1, max_size=4), st.integers(1, 18), st.integers(0, 99))
def test_steps_give_what_the_whole_gives_also_when_rows_are_reordered(
    positions: str, norm: str, tied: bool, lengths: list[int], steps: int, seed: int
) -> None:
    """Two hypotheses a sentence, shuffled after every step as in a beam search; the cache grows past its first room."""
    model = translator(shape(positions=positions, norm=norm, tied=tied))
    generator = torch.Generator().manual_seed(seed)
    source = padded(lengths, 1)
    with torch.inference_mode():
        memory, cache = model.remember(source), model.new_cache(2 * len(lengths))
        tokens = torch.full((len(lengths), 2, 1), EOS)
        for _ in range(steps):
            logits = model.step(tokens[:, :, -1], memory, cache)
            parents = torch.randint(0, 2, (len(lengths), 2), generator=generator)
            rows = (torch.arange(len(lengths))[:, None] * 2 + parents).flatten()
            expected = model(source.repeat_interleave(2, 0), tokens.flatten(0, 1),
                             torch.arange(2 * len(lengths)) * tokens.shape[2] + tokens.shape[2] - 1)  # fmt: skip
            assert torch.allclose(logits.flatten(0, 1), expected, atol=1e-4)
            cache.select(rows)
            new = torch.randint(MASK + 1, VOCABULARY, (len(lengths), 2, 1), generator=generator)
            tokens = torch.cat([tokens.flatten(0, 1)[rows].view(len(lengths), 2, -1), new], dim=2)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@settings(max_examples=10)
@given(
    st.lists(st.integers(2, 14), min_size=1, max_size=4), st.lists(st.integers(1, 5), max_size=6), st.integers(0, 99)
)
def test_several_positions_at_once_give_what_the_whole_gives_also_after_some_are_taken_back(
    positions: str, lengths: list[int], counts: list[int], seed: int
) -> None:
    """Rows of different lengths; after each step some of what was read is forgotten, and now and then a row leaves."""
    model = translator(shape(positions=positions))
    generator = torch.Generator().manual_seed(seed)
    source = padded(lengths, 1)
    tokens = torch.randint(MASK + 1, VOCABULARY, (len(lengths), LENGTH), generator=generator)
    with torch.inference_mode():
        memory, cache = model.remember(source), model.new_ragged_cache(len(lengths))
        for count in counts:
            where = cache.lengths[:, None] + torch.arange(count)
            if int(where.max()) >= LENGTH:
                break
            tokens.scatter_(1, where, torch.randint(MASK + 1, VOCABULARY, where.shape, generator=generator))
            logits = model.step(tokens.gather(1, where), memory, cache)
            flat = (torch.arange(len(source))[:, None] * LENGTH + where).flatten()
            assert torch.allclose(logits.flatten(0, 1), model(source, tokens, flat), atol=1e-4)
            cache.lengths = cache.lengths + torch.randint(0, count + 1, (len(source),), generator=generator)
            if len(source) > 1 and int(torch.randint(0, 3, (1,), generator=generator)) == 0:
                left = torch.arange(1, len(source))
                cache.select(left)
                memory, source, tokens = memory.select(left), source[left], tokens[left]


def test_the_future_and_padding_are_not_seen() -> None:
    model = translator(shape())
    source, target = padded([9, 5], 1), targets([8, 8])
    where = torch.arange(3)  # the first three positions of the first sentence
    with torch.inference_mode():
        logits = model(source, target, where)
        later = target.clone()
        later[0, 3:] = MASK + 1
        longer = torch.cat([source, torch.full((2, 4), PAD)], dim=1)
        assert torch.allclose(model(source, later, where), logits, atol=1e-5)
        assert torch.allclose(model(longer, target, where), logits, atol=1e-5)
        changed = source.clone()
        changed[0, 2] = MASK + 2 if int(source[0, 2]) != MASK + 2 else MASK + 3
        assert not torch.allclose(model(changed, target, where), logits, atol=1e-2)


def test_depths_may_be_set_apart() -> None:
    model = Translator(shape(depth=4, decoder_depth=1), VOCABULARY, LENGTH)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (4, 1)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    assert weights == model.config.matrix_weights(VOCABULARY)
