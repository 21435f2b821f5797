"""A directory with a checkpoint for fairseq, written without it: RobertaModel or TransformerModel.

Its configuration is plain dictionaries: fairseq's own checkpoints hold an ``argparse.Namespace``, which torch does not
load by default. fairseq's ids are ours: its special tokens are our first four, and <mask> is the dictionary's first.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_then_compress.config.parallel import ParallelConfig
from train_then_compress.data.fairseq_files import write_dictionary
from train_then_compress.data.prepare import MASK, SPECIAL_TOKENS
from train_then_compress.export.point import ExportError, Point
from train_then_compress.export.tokenizer import has_prefix_space, vocabulary, write_bpe
from train_then_compress.models.fairseq.modules import roberta_settings, transformer_settings
from train_then_compress.models.fairseq.weights import ROBERTA, TRANSFORMER, Names, state_dict
from train_then_compress.models.roberta import MaskedLM
from train_then_compress.models.transformer import Translator


def write(point: Point, directory: Path) -> None:
    """Write ``model.pt``, and what makes tokens of text.

    A masked LM: ``dict.txt``, which has the numbers of tokens, as RoBERTa's has, ``vocab.json`` and ``merges.txt``; for
    ``RobertaModel.from_pretrained(directory, bpe="hf_byte_bpe", bpe_add_prefix_space=True)`` and ``fairseq-validate``.
    A translator: a dictionary of the tokens for each language and ``tokenizer.json``; for ``fairseq-generate``, on data
    that ``ttc data export`` wrote, and ``fairseq-interactive``. Weights are fp32, compressed ones unpacked. Raises
    `ExportError` for what fairseq's classes cannot be.
    """
    _check(point)
    model, data = point.model, point.config.data
    if isinstance(model, Translator):
        assert isinstance(data, ParallelConfig)
        _write_checkpoint(point, directory, TRANSFORMER, _translation(point, model, data))
        for language in (data.source, data.target):
            _write_dictionary(directory / f"dict.{language}.txt", vocabulary(point.tokenizer))
        (directory / "tokenizer.json").write_bytes(point.tokenizer.read_bytes())
    else:
        assert isinstance(model, MaskedLM)
        _write_checkpoint(point, directory, ROBERTA, _masked_lm(point, model))
        _write_dictionary(directory / "dict.txt", [*SPECIAL_TOKENS, *map(str, range(MASK + 1, point.vocab_size))])
        write_bpe(point.tokenizer, directory)


def _write_dictionary(path: Path, symbols: list[str]) -> None:
    """How often each occurs is not known."""
    write_dictionary(path, symbols, np.ones(len(symbols), dtype=np.int64))


def _write_checkpoint(point: Point, directory: Path, names: Names, settings: dict[str, Any]) -> None:
    common = {"common": {"seed": point.config.seed}, "generation": {"print_alignment": None, "replace_unk": None}}
    torch.save({
        "args": None, "cfg": common | settings, "model": state_dict(point.model.state_dict(), names),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 0}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}, "last_optimizer_state": None,
    }, directory / "model.pt")  # fmt: skip


def _masked_lm(point: Point, model: MaskedLM) -> dict[str, Any]:
    """fairseq's configuration; it overwrites ``data`` and the BPE's files with those of the directory it is given."""
    shape = dataclasses.replace(model.config, depth=len(model.encoder.layers))
    return {
        "model": {"_name": "roberta", **roberta_settings(shape, point.longest)},
        "task": {"_name": "masked_lm", "data": ".", "sample_break_mode": "complete",
                 "tokens_per_sample": point.longest, "seed": point.config.seed},
        "criterion": {"_name": "masked_lm", "tpu": False}, "tokenizer": None,
        "bpe": {"_name": "hf_byte_bpe", "bpe_vocab": ".", "bpe_merges": ".",
                "bpe_add_prefix_space": has_prefix_space(point.tokenizer)},
    }  # fmt: skip


def _translation(point: Point, model: Translator, data: ParallelConfig) -> dict[str, Any]:
    encoder, decoder = len(model.encoder.layers), len(model.decoder.layers)
    shape = dataclasses.replace(model.config, encoder_depth=encoder, decoder_depth=decoder)
    return {
        "model": {"_name": "transformer", **transformer_settings(shape, point.longest)},
        "task": {"_name": "translation", "data": ".", "source_lang": data.source, "target_lang": data.target,
                 "max_source_positions": point.longest, "max_target_positions": point.longest,
                 "train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1},
        "criterion": {"_name": "cross_entropy", "sentence_avg": False}, "tokenizer": None, "bpe": None,
    }  # fmt: skip


def _check(point: Point) -> None:
    instead = "--to safetensors takes it"
    if point.labels:
        raise ExportError(f"{point.name}: a classifier; fairseq takes masked LMs and translators, --to hf takes it")
    if point.config.model.positions == "rotary":
        raise ExportError(f"{point.name}: fairseq has no rotary positions (model.positions=learned or sinusoidal are "
                          f"what it has); {instead}")  # fmt: skip
    point.refuse_changes("fairseq", instead)
