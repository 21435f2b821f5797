"""The programs of masked_lm_training.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from parties import loops
from train_then_compress.config import Config
from train_then_compress.data.masked import Sequences
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, prepare
from train_then_compress.models.fairseq.modules import RobertaAtPlaces
from train_then_compress.tasks.masked_lm import MaskedLMTask


class FairseqMaskedLM(RobertaAtPlaces):
    """fairseq's RobertaModel called as `MaskedLM` is; it looks for padding itself, whatever ``padded`` says."""

    def forward(self, tokens: Tensor, where: Tensor, padded: bool = True) -> Tensor:
        """``tokens`` int64 [batch, length], ``where`` int64 [n] -> logits [n, vocabulary]."""
        return super().forward(tokens, where)


class Rows(Dataset[dict[str, list[int]]]):
    """Sequences, not padded, as a Hugging Face tokenizer gives them."""

    def __init__(self, sequences: Sequences):
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row = self.sequences.rows(np.array([number]))[0]
        row = row[row != PAD]
        return {"input_ids": row.tolist(), "special_tokens_mask": (row <= MASK).astype(int).tolist()}


def task_of(config: Config) -> MaskedLMTask:
    """What is trained in this project's loop."""
    return MaskedLMTask(config, prepare(config.data, Path(config.paths.cache)), config.seed)


def new_fairseq_model(task: MaskedLMTask) -> nn.Module:
    """fairseq's model for the task."""
    torch.manual_seed(task.config.seed)
    return FairseqMaskedLM(task.config.model, task.vocab_size, task.length).to(task.device)


def transformers(config: Config, steps: int) -> None:
    """RobertaForMaskedLM under its library's Trainer, as run_mlm.py among its examples uses them."""
    library, prepared = loops.transformers(), prepare(config.data, Path(config.paths.cache))
    shape, length = config.model, config.data.sequence_length
    torch.manual_seed(config.seed)
    model = library.RobertaForMaskedLM(library.RobertaConfig(
        vocab_size=prepared.vocab_size, hidden_size=shape.width, num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.width, hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout, max_position_embeddings=length + PAD + 1, type_vocab_size=1,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS,
    ))  # fmt: skip
    tokenizer = loops.tokenizer_of(prepared.tokenizer)
    collate = library.DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.task.mask_rate)
    rows = Rows(Sequences(prepared, "train", length))
    loops.train_transformers(model, collate, lambda batch: int(batch["attention_mask"].sum()), rows, config, steps)


PARTIES = loops.in_our_loop(task_of, new_fairseq_model) | {"transformers": transformers}

if __name__ == "__main__":
    loops.main(PARTIES)
