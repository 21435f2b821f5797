"""FULL-SENTENCES packing against fairseq's, and what it promises of any token stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.data.packing import full_sentences, packed
from train_then_compress.data.prepare import BOS, EOS, PAD, Prepared

WORD = 9
#: Lengths of sentences, their ``</s>`` included; a sentence of length 1 is the ``</s>`` that ends a document.
STREAMS = st.lists(st.integers(1, 14), max_size=40)


def stream(lengths: list[int]) -> np.ndarray:
    return np.array([token for length in lengths for token in (*[WORD] * (length - 1), EOS)], dtype=np.uint16)


def fairseq_blocks(lengths: list[int], size: int) -> list[tuple[int, int]]:
    """Start and end of each block that fairseq's RoBERTa would be trained on."""
    from fairseq.data.token_block_dataset import TokenBlockDataset

    sentences = list(torch.from_numpy(stream(lengths).astype(np.int64)).split(lengths))
    dataset = TokenBlockDataset(sentences, lengths, size, pad=PAD, eos=EOS, break_mode="complete")
    ends = np.cumsum([len(block) for block in dataset]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@given(st.lists(st.integers(2, 14), min_size=1, max_size=60), st.integers(15, 40))
def test_blocks_are_fairseqs_where_sentences_fit(lengths: list[int], length: int) -> None:
    assert [tuple(block) for block in full_sentences(stream(lengths), length)] == fairseq_blocks(lengths, length - 1)


@given(st.lists(st.integers(1, 14), min_size=1, max_size=40), st.integers(15, 40))
def test_with_document_ends_each_block_is_fairseqs_first_of_what_is_left(lengths: list[int], length: int) -> None:
    """fairseq lets a document's separator begin a block, which is no text; that is the only difference."""
    starts = np.cumsum([0, *lengths]).tolist()
    place = 0
    for start, end in full_sentences(stream(lengths), length).tolist():
        while lengths[place] == 1:
            place += 1
        assert start == starts[place]
        first, last = fairseq_blocks(lengths[place:], length - 1)[0]
        assert end - start == last - first
        place = starts.index(end)
    assert all(length == 1 for length in lengths[place:])


@given(STREAMS, st.integers(2, 20), st.integers(0, 5))
def test_blocks_of_any_stream(lengths: list[int], length: int, unfinished: int) -> None:
    tokens = np.concatenate([stream(lengths), np.full(unfinished, WORD, dtype=np.uint16)])
    blocks = full_sentences(tokens, length)
    assert blocks.dtype == np.int64 and blocks.shape == (len(blocks), 2)
    covered = np.zeros(len(tokens), dtype=int)
    for start, end in blocks:
        assert 0 < end - start <= length - 1
        covered[start:end] += 1
        assert tokens[start] != EOS  # no block begins with a separator
        whole = tokens[end - 1] == EOS or end == len(tokens)
        assert whole or (end - start == length - 1 and EOS not in tokens[start:end])  # only a long sentence is cut
        if whole and end < len(tokens):  # nothing more would have fitted
            following = tokens[end:].tolist()
            next_length = following.index(EOS) + 1 if EOS in following else len(following)
            assert (end - start) + next_length > length - 1 or EOS not in following
    assert (tokens[covered == 0] == EOS).all() and covered.max(initial=0) <= 1
    assert (np.diff(blocks, axis=0) >= 0).all()


def test_an_empty_stream_has_no_blocks() -> None:
    assert full_sentences(np.array([], dtype=np.uint16), 8).shape == (0, 2)
    assert full_sentences(np.array([EOS, EOS], dtype=np.uint16), 8).shape == (0, 2)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("length", [8, 32, 300])
def test_the_blocks_of_a_split_are_kept_beside_it(prepared: Prepared, split: str, length: int) -> None:
    blocks = packed(prepared, split, length)
    assert np.array_equal(blocks, full_sentences(prepared.tokens(split), length))
    path = prepared.directory / f"blocks-{split}-{length}.npy"
    written = path.stat().st_mtime_ns
    assert np.array_equal(packed(prepared, split, length), blocks) and path.stat().st_mtime_ns == written
    assert not list(prepared.directory.glob(".blocks*")) and BOS not in prepared.tokens(split)
