"""A prepared corpus as ``fairseq-preprocess`` would have written it: for fairseq's translation and masked_lm tasks.

fairseq's ids are those of the tokenizer: its special tokens are our first four, and ``<mask>`` is the dictionary's
first symbol, where masked_lm finds it. Text is cut as there: ``</s>`` ends a sentence, and one more a document.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from train_then_compress.data.fairseq_files import write_dictionary, write_sentences
from train_then_compress.data.pairs import Pairs
from train_then_compress.data.prepare import EOS, SPLITS, Prepared


def export_fairseq(data: Prepared | Pairs, directory: Path) -> None:
    """Write dictionaries, the three splits and, to make text of tokens, the tokenizer, whole or not at all.

    Raises `FileExistsError`.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} is there already; delete it, or name another place by --out")
    temporary = directory.with_name(f".{directory.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        names = _write_pairs(data, temporary) if isinstance(data, Pairs) else _write_text(data, temporary)
        tokenizer = Tokenizer.from_file(str(data.tokenizer))
        symbols = [str(tokenizer.id_to_token(number)) for number in range(data.vocab_size)]
        train = data.split("train").tokens if isinstance(data, Pairs) else data.tokens("train")
        for name in names:
            write_dictionary(temporary / name, symbols, np.bincount(train, minlength=data.vocab_size))
        shutil.copyfile(data.tokenizer, temporary / "tokenizer.json")
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_pairs(data: Pairs, folder: Path) -> list[str]:
    for split in SPLITS:
        pairs = data.split(split)
        for side, language in enumerate(data.languages):
            sentences = (np.append(pairs.sides(number)[side], EOS) for number in range(len(pairs)))
            write_sentences(folder / f"{split}.{'-'.join(data.languages)}.{language}", sentences, pairs.tokens.dtype)
    return [f"dict.{language}.txt" for language in data.languages]


def _write_text(data: Prepared, folder: Path) -> list[str]:
    for split in SPLITS:
        tokens = data.tokens(split)
        write_sentences(folder / split, _cut(tokens), tokens.dtype)
    return ["dict.txt"]


def _cut(tokens: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for end in (np.flatnonzero(tokens == EOS) + 1).tolist():
        yield tokens[start:end]
        start = end
