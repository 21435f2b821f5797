"""A directory that ``fairseq-preprocess --joined-dictionary`` made.

Its ids are kept: fairseq's special tokens are ours. The tokenizer takes what fairseq's command-line tools take, tokens
between spaces (a word that is not in the dictionary is ``<unk>``), and gives the text that they score: of
``subword_nmt`` and ``sentencepiece`` pieces the words, otherwise as it was before preprocessing, so that BLEU is
comparable with other people's only if that was detokenized text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from train_then_compress.config.base import reject
from train_then_compress.config.parallel import FairseqBin
from train_then_compress.data.fairseq_files import SPECIAL, Sentences, read_dictionary
from train_then_compress.data.fetch import sha256_of
from train_then_compress.data.parallel import TokenizedCorpus
from train_then_compress.data.prepare import SPLITS

_Split = tuple[Sentences, Sentences]
_DECODERS = {
    # A space after each token but those that go on, and then their mark goes.
    "subword_nmt": lambda: decoders.Sequence(
        [decoders.Replace(Regex("(?<!@@)$"), " "), decoders.Replace(Regex("@@$"), "")]
    ),
    "sentencepiece": lambda: decoders.Replace("▁", " "),
    "byte_level": decoders.ByteLevel,
}


def load(config: FairseqBin, cache: Path) -> TokenizedCorpus:
    """The pairs of ``data.path``; nothing is kept in ``cache``.

    Raises `ConfigError` for a file that is missing, damaged or of another format, and for two dictionaries.
    """
    assert config.path is not None
    folder = Path(config.path).expanduser()
    try:
        symbols = _dictionary(folder, config)
        splits = {split: _split(folder, split, config, len(symbols)) for split in SPLITS}
    except (OSError, ValueError) as error:
        raise reject("data.path", config.path, str(error)) from None
    tokenizer = _tokenizer(symbols, config.bpe)

    def texts(split: str) -> list[tuple[str, str]]:
        return [(" ".join(symbols[token] for token in source), _reference(tokenizer, target))
                for source, target in _pairs(splits[split])]  # fmt: skip

    files = sorted(path for split in SPLITS for path in folder.glob(f"{split}.*-*.*"))
    sources = {path.name: sha256_of(path) for path in [folder / f"dict.{config.source}.txt", *files]}
    tokens = {split: partial(_pairs, pair) for split, pair in splits.items()}
    return TokenizedCorpus(tokens, texts, tokenizer, sources, "the user's own text")


def _dictionary(folder: Path, config: FairseqBin) -> list[str]:
    paths = [folder / f"dict.{language}.txt" for language in (config.source, config.target)]
    for path in paths:
        if not path.is_file():
            found = ", ".join(sorted(path.name for path in folder.glob("dict.*.txt"))) or "none"
            raise ValueError(f"there is no {path.name}; of dictionaries there are: {found} (data.source, data.target)")
    if paths[0].read_bytes() != paths[1].read_bytes():
        raise ValueError(f"{paths[0].name} and {paths[1].name} differ; preprocess with --joined-dictionary")
    return read_dictionary(paths[0])


def _split(folder: Path, split: str, config: FairseqBin, vocab_size: int) -> _Split:
    """Both sides of a split; like fairseq, from files of either direction."""
    languages = (config.source, config.target)
    directions = ["-".join(languages), "-".join(reversed(languages))]
    found = [direction for direction in directions if (folder / f"{split}.{direction}.{config.source}.idx").is_file()]
    if not found:
        if any((folder / f"{split}.{direction}.{config.source}").is_file() for direction in directions):
            raise ValueError("made by fairseq-preprocess --dataset-impl raw; mmap, its default, is needed")
        raise ValueError(f"there is no {split}.{directions[0]}.{config.source}.idx")
    names = [f"{split}.{found[0]}.{language}" for language in languages]
    sides = [Sentences.read(folder / name) for name in names]
    for name, side in zip(names, sides, strict=True):
        side.check(name, vocab_size)
    if len(sides[0].ends) != len(sides[1].ends):
        counts = " and ".join(f"{name} {len(side.ends)}" for name, side in zip(names, sides, strict=True))
        raise ValueError(f"the sides must have as many sentences, but {counts}")
    return sides[0], sides[1]


def _pairs(split: _Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    starts = [0, 0]
    for ends in zip(*(side.ends for side in split), strict=True):
        source, target = (side.tokens[start : end - 1] for side, start, end in zip(split, starts, ends, strict=True))
        yield source, target
        starts = list(ends)


def _reference(tokenizer: Tokenizer, target: np.ndarray) -> str:
    """Unknown words are escaped, as fairseq does, so that no hypothesis has them right."""
    text: str = tokenizer.decode(target.tolist())
    return " ".join(text.replace("<unk>", "<<unk>>").split())


def _tokenizer(symbols: list[str], bpe: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, SPECIAL[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL[:-1]))  # they are no text; <unk> stands for a word
    if bpe in _DECODERS:
        tokenizer.decoder = _DECODERS[bpe]()
    return tokenizer
