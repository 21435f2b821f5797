"""The tokenizer of a run as a file that other libraries read."""

from __future__ import annotations

import json
from pathlib import Path

from train_then_compress.data.prepare import BOS, EOS, MASK, SPECIAL_TOKENS


def write_tokenizer(source: Path, directory: Path) -> None:
    """Write ``tokenizer.json``: the run's, with RoBERTa's form (Liu et al. 2019, section 3) added.

    A text becomes ``<s> a </s>``, a pair ``<s> a </s></s> b </s>``, as in finetuning here; without special tokens
    (``add_special_tokens=False``) the ids are those of the run's own tokenizer. ``<mask>`` takes the space before
    it, as in training, where it stands for a word with its space.
    """
    described = json.loads(source.read_text())
    described["post_processor"] = {
        "type": "RobertaProcessing", "sep": [SPECIAL_TOKENS[EOS], EOS], "cls": [SPECIAL_TOKENS[BOS], BOS],
        "trim_offsets": True, "add_prefix_space": True,
    }  # fmt: skip
    for token in described["added_tokens"]:
        token["lstrip"] = token["id"] == MASK
    (directory / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False))


def write_bpe(source: Path, directory: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt``, GPT-2's form of a byte-level BPE (fairseq: ``--bpe hf_byte_bpe``)."""
    bpe = json.loads(source.read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (directory / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def has_prefix_space(source: Path) -> bool:
    """Whether the first word of a text is taken as if a space stood before it."""
    return bool(json.loads(source.read_text())["pre_tokenizer"]["add_prefix_space"])


def vocabulary(source: Path) -> list[str]:
    """The tokens in the order of their ids."""
    tokens: dict[str, int] = json.loads(source.read_text())["model"]["vocab"]
    return sorted(tokens, key=tokens.__getitem__)
