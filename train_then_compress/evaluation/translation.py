"""Lines of text to lines of text: tokenize, decode in batches of like length, detokenize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor

from train_then_compress.data.pairs import normalized
from train_then_compress.data.prepare import EOS, PAD, encode_texts
from train_then_compress.evaluation.decoding import Decoding, Hypothesis, beam_search
from train_then_compress.models.transformer import Translator

#: From sources, int64 [sentences, length] padded at the end, to the hypotheses of each, the best first.
Decoder = Callable[[Tensor], list[list[Hypothesis]]]


def translate(
    model: Translator, tokenizer: Tokenizer, sources: list[str], decoding: Decoding, batch_tokens: int
) -> list[str]:
    """The best translation of each source that beam search finds, in their order; see `decode_lines`."""
    found = decode_lines(
        partial(beam_search, model, decoding=decoding), encode(tokenizer, sources, model.length), batch_tokens,
        next(model.parameters()).device,
    )  # fmt: skip
    return [detokenize(tokenizer, hypotheses[0].tokens) if hypotheses else "" for hypotheses in found]


def encode(tokenizer: Tokenizer, lines: list[str], longest: int) -> list[list[int]]:
    """Token ids of each line without ``</s>``; of a line that has more than a model of ``longest`` positions takes
    beside ``</s>``, the first; of a blank line none. Lines are normalized as prepared corpora are; a special token's
    name (``<s>``) is text like any other.
    """
    texts = [normalized(line) for line in lines]
    return [ids[: longest - 1] if text else [] for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True)]


def detokenize(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """One line of text: the tokenizer's space before the first word, and line ends, go."""
    return " ".join(tokenizer.decode(tokens).split())


def decode_lines(
    decoder: Decoder, sources: list[list[int]], batch_tokens: int, device: torch.device
) -> list[list[Hypothesis]]:
    """The hypotheses of each source, in their order; none of a source without tokens.

    A batch has sources of like length, the longest first, at most ``batch_tokens`` positions with padding (fairseq's
    ``--max-tokens``), at least one source.
    """
    found: list[list[Hypothesis]] = [[] for _ in sources]
    for numbers in _batches(sources, batch_tokens):
        batch = torch.full((len(numbers), len(sources[numbers[0]]) + 1), PAD)
        for row, number in enumerate(numbers):
            batch[row, : len(sources[number]) + 1] = torch.tensor([*sources[number], EOS])
        for number, hypotheses in zip(numbers, decoder(batch.to(device)), strict=True):
            found[number] = hypotheses
    return found


def _batches(sources: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    order = sorted((n for n, source in enumerate(sources) if source), key=lambda number: -len(sources[number]))
    start = 0
    while start < len(order):
        end = start + max(1, batch_tokens // (len(sources[order[start]]) + 1))
        yield order[start:end]
        start = end
