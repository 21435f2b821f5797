"""The programs of translation_training.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from parties import loops
from train_then_compress.config import Config
from train_then_compress.data.pairs import PairSplit, prepare_pairs
from train_then_compress.data.prepare import EOS, PAD
from train_then_compress.models.fairseq.modules import TransformerAtPlaces
from train_then_compress.tasks.translation import TranslationTask

#: Parts of a batch that transformers takes one after the other.
_PARTS = 4


class Examples(Dataset[dict[str, list[int]]]):
    """Pairs as a Hugging Face tokenizer gives them, ``</s>`` after each side."""

    def __init__(self, pairs: PairSplit):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        source, target = ([*side.tolist(), EOS] for side in self.pairs.sides(number))
        return {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}


def task_of(config: Config) -> TranslationTask:
    """What is trained in this project's loop."""
    return TranslationTask(config, prepare_pairs(config.data, Path(config.paths.cache)), config.seed)


def new_fairseq_model(task: TranslationTask) -> nn.Module:
    """fairseq's model for the task."""
    torch.manual_seed(task.config.seed)
    shape = task.config.model
    return TransformerAtPlaces(shape, task.vocab_size, shape.length).to(task.device)


def transformers(config: Config, steps: int) -> None:
    """MarianMTModel under its library's Trainer, as run_translation.py among its examples trains, pairs of like
    length together."""
    library, pairs = loops.transformers(), prepare_pairs(config.data, Path(config.paths.cache))
    shape, sides = config.model, {}
    for side, layers in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers)):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": shape.heads, f"{side}_ffn_dim": 4 * shape.width}
    torch.manual_seed(config.seed)
    model = library.MarianMTModel(library.MarianConfig(
        vocab_size=pairs.vocab_size, d_model=shape.width, dropout=shape.dropout, attention_dropout=shape.dropout,
        activation_function="relu", max_position_embeddings=shape.length, scale_embedding=True, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=EOS, forced_eos_token_id=EOS, **sides,
    ))  # fmt: skip
    collate = library.DataCollatorForSeq2Seq(loops.tokenizer_of(pairs.tokenizer), model=model)

    def tokens_of(batch: dict[str, Any]) -> int:
        return int(batch["attention_mask"].sum()) + int((batch["labels"] >= 0).sum())

    # Whole batches of the longest pairs take many gigabytes.
    config = config.changed(optimizer=dataclasses.replace(
        config.optimizer, batch_size=max(1, config.optimizer.batch_size // _PARTS)))  # fmt: skip
    loops.train_transformers(
        model, collate, tokens_of, Examples(pairs.split("train")), config, steps, gradient_accumulation_steps=_PARTS,
        label_smoothing_factor=config.task.label_smoothing, train_sampling_strategy="group_by_length",
    )  # fmt: skip


PARTIES = loops.in_our_loop(task_of, new_fairseq_model) | {"transformers": transformers}

if __name__ == "__main__":
    loops.main(PARTIES)
