"""The programs beside each other in masked_lm_training.py, but for fairseq-train.

    python benchmarks/parties/masked_lm.py ours|fairseq_model|transformers CONFIG_JSON STEPS

Each trains on without end, and after every STEPS steps prints ``{"tokens": ..}``: those of the interval.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from train_then_compress.config import Config, RobertaConfig
from train_then_compress.data.masked import Sequences
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, SPECIAL_TOKENS, Prepared, prepare
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.loop import Desk, Trainer, Training
from train_then_compress.training.schedule import constant
from train_then_compress.training.task import Task

RATE = 1e-4


class FairseqMaskedLM(nn.Module):
    """fairseq's RobertaModel called as `MaskedLM` is."""

    def __init__(self, config: RobertaConfig, vocab_size: int, length: int):
        super().__init__()
        self.roberta: Any = fairseq_roberta(config, vocab_size, length)

    def forward(self, tokens: Tensor, where: Tensor, padded: bool = True) -> Tensor:
        """``tokens`` int64 [batch, length], ``where`` int64 [n] -> logits [n, vocabulary].

        fairseq looks for padding itself, whatever ``padded`` says. Its own way to the masked positions is a bool mask;
        here both models compute the same rows, those that only fill up a batch included.
        """
        features: Tensor = self.roberta(tokens, features_only=True)[0]
        logits: Tensor = self.roberta.encoder.lm_head(features.flatten(0, 1).index_select(0, where))
        return logits


def fairseq_roberta(config: RobertaConfig, vocab_size: int, length: int) -> nn.Module:
    """fairseq's RobertaModel of the same shape; learned positions where the config's are rotary, which it has not.

    Embeddings are normalized before the first layer for pre-norm too, as here and as RoBERTa has it
    (``--layernorm-embedding``; fairseq's architecture name ``roberta_prenorm`` leaves that out).
    """
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    from fairseq.data import Dictionary
    from fairseq.models.roberta import RobertaModel

    dictionary = Dictionary()  # begins with <s>, <pad>, </s>, <unk>, as SPECIAL_TOKENS does
    for number in range(len(dictionary), vocab_size):
        dictionary.add_symbol(SPECIAL_TOKENS[number] if number < len(SPECIAL_TOKENS) else f"token{number}")
    arguments = argparse.Namespace(
        encoder_layers=config.depth, encoder_embed_dim=config.width, encoder_ffn_embed_dim=4 * config.width,
        encoder_attention_heads=config.heads, encoder_normalize_before=config.norm == "pre", layernorm_embedding=True,
        encoder_learned_pos=config.positions != "sinusoidal", max_positions=length,
        dropout=config.dropout, attention_dropout=config.dropout, activation_dropout=0.0,
    )  # fmt: skip
    model: nn.Module = RobertaModel.build_model(arguments, SimpleNamespace(source_dictionary=dictionary))
    return model


def trainer_of(model: nn.Module, task: Task, config: Config) -> Trainer:
    """The loop of `training.fit`, to be stepped by hand; it writes nothing."""
    training = Training(config.budget, config.optimizer, constant(RATE), evaluate_at=[], seed=config.seed)
    quiet = StageProgress("benchmark", console=Console(file=io.StringIO()))
    nowhere = Path(os.devnull)
    desk = Desk("benchmark", config.runtime, Checkpoints(nowhere, float("inf")), MetricsLog(nowhere), quiet)
    return Trainer(model, task, training, desk)


def train(model: nn.Module, task: Task, config: Config, steps: int) -> None:
    """Train without end, reporting each interval."""
    trainer = trainer_of(model, task, config)
    trainer.warm_up()
    while True:
        before = trainer.clock.tokens
        for _ in range(steps):
            trainer.step()
        say(trainer.clock.tokens - before)


def say(tokens: int) -> None:
    """Report an interval."""
    print(json.dumps({"tokens": tokens}), flush=True)


class Rows(Dataset[dict[str, list[int]]]):
    """The sequences of the training split, not padded, as a Hugging Face tokenizer gives them."""

    def __init__(self, sequences: Sequences):
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row = self.sequences.rows(np.array([number]))[0]
        row = row[row != PAD]
        return {"input_ids": row.tolist(), "special_tokens_mask": (row <= MASK).astype(int).tolist()}


def train_transformers(config: Config, prepared: Prepared, steps: int) -> None:
    """RobertaForMaskedLM under its library's Trainer, as run_mlm.py among its examples uses them."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):  # fairseq wants one; transformers imports it, and falls over one for another torch
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
    import transformers

    class Counting(transformers.DataCollatorForLanguageModeling):
        tokens = 0

        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            self.tokens += sum(len(feature["input_ids"]) for feature in features)
            return super().__call__(features, return_tensors)

    class Saying(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % steps == 0:
                say(collator.tokens)
                collator.tokens = 0

    model, shape = config.model, config.data.sequence_length
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(prepared.tokenizer), **names)
    collator = Counting(tokenizer, mlm_probability=config.task.mask_rate)
    torch.manual_seed(config.seed)
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=prepared.vocab_size, hidden_size=model.width, num_hidden_layers=model.depth,
        num_attention_heads=model.heads, intermediate_size=4 * model.width, hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout, max_position_embeddings=shape + PAD + 1, type_vocab_size=1,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS,
    ))  # fmt: skip
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = transformers.TrainingArguments(
            nowhere, max_steps=int(config.budget.value), per_device_train_batch_size=config.optimizer.batch_size,
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.clip, bf16=config.runtime.dtype == "bf16",
            use_cpu=config.runtime.device == "cpu", save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True, seed=config.seed,
        )  # fmt: skip
        rows = Rows(Sequences(prepared, "train", shape))
        transformers.Trainer(roberta, arguments, collator, rows, callbacks=[Saying()]).train()


def main(party: str, values: str, steps: str) -> None:
    """Train as one of the parties."""
    config = Config.build(json.loads(values))
    torch.set_num_threads(config.runtime.threads)
    prepared = prepare(config.data, Path(config.paths.cache))
    if party == "transformers":
        train_transformers(config, prepared, int(steps))
        return
    task = MaskedLMTask(config, prepared, config.seed)
    model: nn.Module = task.new_model()
    if party == "fairseq_model":
        torch.manual_seed(config.seed)
        model = FairseqMaskedLM(config.model, task.vocab_size, config.data.sequence_length).to(task.device)
    train(model, task, config, int(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
