"""fairseq-train: its command, and what its log says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_then_compress.config import Config

RATE = 1e-4


def command(data: Path, flags: list[str], settings: dict[str, Any]) -> list[str]:
    """The command of fairseq's user; it logs JSON."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fairseq_cli.train", str(data), *flags, *words, "--log-format", "json"]


def masked_lm(config: Config) -> dict[str, Any]:
    """RoBERTa of the config's shape, on the same blocks of text and in batches as large as ours."""
    model, length = config.model, config.data.sequence_length
    return {
        "task": "masked_lm", "criterion": "masked_lm", "arch": "roberta_base", "encoder-layers": model.depth,
        "encoder-embed-dim": model.width, "encoder-ffn-embed-dim": 4 * model.width,
        "encoder-attention-heads": model.heads, "max-positions": length, "tokens-per-sample": length,
        "sample-break-mode": "complete", "batch-size": config.optimizer.batch_size,
    }  # fmt: skip


def without_end(config: Config, data: Path, flags: list[str], settings: dict[str, Any], interval: int) -> list[str]:
    """The command of a training like ours, for its speed: nothing is validated or saved."""
    optimizer, is_cpu = config.optimizer, config.runtime.device == "cpu"
    flags = [*flags, "--no-save", "--disable-validation"]
    flags += ["--cpu"] if is_cpu else ["--bf16"] * (config.runtime.dtype == "bf16")
    return command(data, flags, settings | {
        "optimizer": "adam", "adam-betas": (optimizer.beta1, optimizer.beta2), "adam-eps": optimizer.eps,
        "weight-decay": optimizer.weight_decay, "clip-norm": optimizer.clip, "lr-scheduler": "fixed", "lr": RATE,
        "seed": config.seed, "max-update": int(config.budget.value), "log-interval": interval,
    })  # fmt: skip


def tokens_of(interval: int) -> Callable[[str], float | None]:
    """Reads the log: the tokens of so many updates, which are ``--log-interval``, or None for another line.

    Those of a translation are the target's.
    """

    def read(line: str) -> float | None:
        _, found, stats = line.partition("| train_inner | ")
        return float(json.loads(stats)["wpb"]) * interval if found else None

    return read
