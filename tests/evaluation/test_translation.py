"""Lines in, lines out: their order, batches, and what becomes of blank and of long ones."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from train_then_compress.config.model import TransformerConfig
from train_then_compress.data.prepare import EOS, MASK, PAD, train_tokenizer
from train_then_compress.evaluation.decoding import Decoding, Hypothesis, beam_search
from train_then_compress.evaluation.translation import decode_lines, detokenize, encode, translate
from train_then_compress.models.transformer import Translator

LONGEST = 16
LINES = ["one small line", "", "a line that is rather longer than the first", "two", " \t", "the\u0301 last  line"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((f"{line} number {n}" for n, line in enumerate(LINES * 3)), 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Translator:
    torch.manual_seed(3)
    shape = TransformerConfig(depth=1, width=32, head_size=16, dropout=0.0)
    return Translator(shape, tokenizer.get_vocab_size(), LONGEST).eval()


def echo(batch: Tensor) -> list[list[Hypothesis]]:
    return [[Hypothesis(row[(row != PAD) & (row != EOS)].tolist(), 0.0)] for row in batch]


def test_text_comes_back_in_its_order(tokenizer: Tokenizer) -> None:
    sources = encode(tokenizer, LINES, 100)
    found = decode_lines(echo, sources, 40, torch.device("cpu"))
    assert [detokenize(tokenizer, hypotheses[0].tokens) if hypotheses else "" for hypotheses in found] == [
        "one small line", "", "a line that is rather longer than the first", "two", "", "th\u00e9 last line"
    ]  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [1, 60, 1000])
def test_a_batch_has_the_longest_first_and_no_more_positions_than_allowed(
    tokenizer: Tokenizer, batch_tokens: int
) -> None:
    shapes: list[tuple[int, int]] = []

    def decoder(batch: Tensor) -> list[list[Hypothesis]]:
        shapes.append((batch.shape[0], batch.shape[1]))
        return echo(batch)

    sources = encode(tokenizer, LINES, 100)
    decode_lines(decoder, sources, batch_tokens, torch.device("cpu"))
    assert sum(rows for rows, _ in shapes) == 4, "blank lines are not decoded"
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in shapes)
    assert batch_tokens == 60 or len(shapes) == {1: 4, 1000: 1}[batch_tokens]


def test_a_special_tokens_name_in_a_line_is_text(tokenizer: Tokenizer) -> None:
    (tokens,) = encode(tokenizer, ["a </s> b <pad>"], 100)
    assert min(tokens) > MASK and detokenize(tokenizer, tokens) == "a </s> b <pad>"


def test_each_line_is_translated_as_if_alone(model: Translator, tokenizer: Tokenizer) -> None:
    decoding = Decoding(beam=2, max_ratio=0.5, max_extra=4)
    together = translate(model, tokenizer, LINES, decoding, 60)
    assert together == [translate(model, tokenizer, [line], decoding, 60)[0] for line in LINES]
    assert together[1] == together[4] == "", "of blank lines"
    assert translate(model, tokenizer, [], decoding, 60) == []


def test_of_a_long_line_the_beginning_is_translated(model: Translator, tokenizer: Tokenizer) -> None:
    (tokens,) = encode(tokenizer, ["a line " * 50], LONGEST)
    assert len(tokens) == LONGEST - 1
    (hypotheses,) = beam_search(model, torch.tensor([[*tokens, EOS]]), Decoding(beam=1))
    assert translate(model, tokenizer, ["a line " * 50], Decoding(beam=1), 60) == [
        detokenize(tokenizer, hypotheses[0].tokens)
    ]
