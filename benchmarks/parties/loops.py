"""Training without end, in this project's loop and in that of transformers, telling of every interval."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common.fairseq_train import RATE
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import Dataset

from train_then_compress.config import Config
from train_then_compress.data.prepare import SPECIAL_TOKENS
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.loop import Desk, Trainer, Training
from train_then_compress.training.schedule import constant
from train_then_compress.training.task import Task


def trainer_of(model: nn.Module, task: Task, config: Config) -> Trainer:
    """The loop of `training.fit`, to be stepped by hand; it writes nothing."""
    training = Training(config.budget, config.optimizer, constant(RATE), evaluate_at=[], seed=config.seed)
    quiet = StageProgress("benchmark", console=Console(file=io.StringIO()))
    nowhere = Path(os.devnull)
    desk = Desk("benchmark", config.runtime, Checkpoints(nowhere, float("inf")), MetricsLog(nowhere), quiet)
    return Trainer(model, task, training, desk)


def train(model: nn.Module, task: Task, config: Config, steps: int) -> None:
    """Train in this project's loop."""
    trainer = trainer_of(model, task, config)
    trainer.warm_up()
    while True:
        before = trainer.clock.tokens
        for _ in range(steps):
            trainer.step()
        say(trainer.clock.tokens - before)


def in_our_loop(
    task_of: Callable[[Config], Any], new_fairseq_model: Callable[[Any], nn.Module]
) -> dict[str, Callable[[Config, int], None]]:
    """The parties that train in it: this project's model of a task, and fairseq's."""

    def ours(config: Config, steps: int) -> None:
        task = task_of(config)
        train(task.new_model(), task, config, steps)

    def fairseq_model(config: Config, steps: int) -> None:
        task = task_of(config)
        train(new_fairseq_model(task), task, config, steps)

    return {"ours": ours, "fairseq_model": fairseq_model}


def say(tokens: int) -> None:
    """Tell of an interval."""
    print(json.dumps({"tokens": tokens}), flush=True)


def transformers() -> ModuleType:
    """The library. It imports any torchaudio, which fairseq wants, and falls over one that is for another torch."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
    import transformers

    return transformers


def tokenizer_of(path: Path) -> Any:
    """A prepared corpus's tokenizer as transformers has it."""
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    return transformers().PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)), **names)


def train_transformers(
    model: nn.Module,
    collate: Callable[[list[Any]], dict[str, Any]],
    tokens_of: Callable[[dict[str, Any]], int],
    examples: Dataset[Any],
    config: Config,
    steps: int,
    **settings: Any,
) -> None:
    """Train in transformers' Trainer; ``settings`` go to its TrainingArguments."""
    library, seen = transformers(), [0]

    def counted(features: list[Any]) -> dict[str, Any]:
        batch = collate(features)
        seen[0] += tokens_of(batch)
        return batch

    class Teller(library.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % steps == 0:
                say(seen[0])
                seen[0] = 0

    optimizer, runtime = config.optimizer, config.runtime
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = library.TrainingArguments(
            nowhere, max_steps=int(config.budget.value), per_device_train_batch_size=optimizer.batch_size,
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2, adam_epsilon=optimizer.eps,
            max_grad_norm=optimizer.clip, bf16=runtime.dtype == "bf16", use_cpu=runtime.device == "cpu",
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, seed=config.seed, **settings,
        )  # fmt: skip
        library.Trainer(model, arguments, counted, examples, callbacks=[Teller()]).train()


def main(parties: dict[str, Callable[..., None]]) -> None:
    """Be the party that the first argument names, with the config and the numbers that follow."""
    party, values, *numbers = sys.argv[1:]
    config = Config.build(json.loads(values))
    torch.set_num_threads(config.runtime.threads)
    parties[party](config, *map(int, numbers))
