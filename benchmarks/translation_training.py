"""Translation training on real lengths: this project beside fairseq-train, fairseq's model in our loop, and Marian.

Each trains in a process of its own, and they take turns, as in masked_lm_training.py.

    python benchmarks/translation_training.py --shapes 2x128 6x256 --json translation_training.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common import contest, fairseq_train
from common import record as common
from common.contest import FAIRSEQ_MODEL, FAIRSEQ_TRAIN, OURS, program
from common.record import Record
from common.turns import Party

from train_then_compress.config import Config
from train_then_compress.data.fairseq_export import export_fairseq
from train_then_compress.data.pairs import Pairs, prepare_pairs
from train_then_compress.sweep import environment
from train_then_compress.tasks.translation import TranslationTask

SHAPES = ("2x128", "6x256", "6x512")
CONVENTIONS = contest.CONVENTIONS | {
    "tokens": "of source and target, </s> of each included, without padding; fairseq-train counts target tokens, to "
    "which the source tokens of the training split are added in proportion",
    "shape": "layers of the encoder and as many of the decoder",
    "batches": "ours: at most --batch-tokens source and target positions; fairseq-train: --max-tokens of half as many, "
    "which bounds the longer side; transformers: as many pairs as ours on average, grouped by length, in four parts",
    "padding": "share of the positions of our batches, source and target",
}
_SAMPLE = 100


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `Config` checks the values."""
    parser = contest.options(__doc__, SHAPES, dropout=0.1)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="default 4096")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default 8192")
    parser.add_argument("--pairs", help="prefix of aligned files PREFIX.en and PREFIX.it, or a TSV file "
                        "(default: the corpus debian_en_it)")  # fmt: skip
    return contest.parse(parser, argv, {"batch_tokens": 512})


def config_of(arguments: argparse.Namespace, shape: str) -> Config:
    """The run's config that the command line describes."""
    values = contest.values_of(arguments, shape)
    corpus = {"name": "parallel_files", "train": arguments.pairs} if arguments.pairs else {"name": "debian_pairs"}
    return Config.build(values | {
        "model": values["model"] | {"name": "transformer", "positions": "sinusoidal"}, "task": {"name": "translation"},
        "data": corpus | {"vocab_size": arguments.vocab_size}, "optimizer": {"batch_tokens": arguments.batch_tokens},
    })  # fmt: skip


def parties(config: Config, steps: int, data: Path, task: TranslationTask) -> list[Party]:
    """The programs beside each other; each reports after every so many steps. ``data``: the corpus for fairseq."""
    pairs = sum(len(task.batch(step).source) for step in range(_SAMPLE)) // _SAMPLE
    plain = config.changed(
        runtime=dataclasses.replace(config.runtime, compile=False),
        optimizer=dataclasses.replace(config.optimizer, batch_size=max(1, pairs)),
    )
    ours, theirs = (json.dumps(dataclasses.asdict(one)) for one in (config, plain))
    run, threads = environment(config.runtime.threads), {"OMP_NUM_THREADS": str(config.runtime.threads)}
    return [
        Party(OURS, *program("translation", "ours", ours, steps, run)),
        Party(FAIRSEQ_TRAIN, fairseq_command(config, steps, data), _both_sides(task.pairs, steps), threads),
        Party(FAIRSEQ_MODEL, *program("translation", "fairseq_model", theirs, steps, run)),
        Party("transformers Marian", *program("translation", "transformers", theirs, steps, threads)),
    ]


def _both_sides(pairs: Pairs, steps: int) -> Callable[[str], float | None]:
    """Reads fairseq-train's log, and adds the source tokens."""
    read, lengths = fairseq_train.tokens_of(steps), pairs.split("train").lengths
    both_by_target = lengths.sum() / lengths[:, 1].sum()

    def read_both(line: str) -> float | None:
        target = read(line)
        return None if target is None else target * both_by_target

    return read_both


def fairseq_command(config: Config, steps: int, data: Path) -> list[str]:
    """fairseq-train with the same shape, dropout, smoothing, clipping and optimizer settings."""
    model = config.model
    settings = {
        "task": "translation", "source-lang": config.data.source, "target-lang": config.data.target,
        "arch": "transformer", "dropout": model.dropout, "attention-dropout": model.dropout,
        "criterion": "label_smoothed_cross_entropy", "label-smoothing": config.task.label_smoothing,
        "max-tokens": config.optimizer.batch_tokens // 2, "max-source-positions": model.length,
        "max-target-positions": model.length,
    }  # fmt: skip
    flags = ["--share-all-embeddings"]
    for side, layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        settings |= {f"{side}-layers": layers, f"{side}-embed-dim": model.width, f"{side}-attention-heads": model.heads,
                     f"{side}-ffn-embed-dim": 4 * model.width}  # fmt: skip
        flags += [f"--{side}-normalize-before"] * (model.norm == "pre")
    return fairseq_train.without_end(config, data, flags, settings, steps)


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """All shapes, one after the other."""
    configs = {shape: config_of(arguments, shape) for shape in arguments.shapes}
    first = next(iter(configs.values()))
    pairs = prepare_pairs(first.data, Path(arguments.cache))
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        export_fairseq(pairs, data)
        for shape, config in configs.items():
            task = TranslationTask(config, pairs, config.seed)
            measured[shape] = contest.hold(
                task, lambda steps, config=config, task=task: parties(config, steps, data, task), arguments,
                calibration,
            )  # fmt: skip
    return {"corpus": common.corpus_facts(pairs), "padding": padding(task), "shapes": measured}


def padding(task: TranslationTask) -> float:
    """Share of positions that are padding, over some batches."""
    batches = [task.batch(step) for step in range(_SAMPLE)]
    positions = sum(batch.source.size + batch.target.size for batch in batches)
    return 1 - sum(task.counts(batch).tokens for batch in batches) / positions


def table(record: Record) -> str:
    """A row for each shape and party."""
    settings = record["settings"]
    batch = f"batches of at most {settings['batch_tokens']:,} positions of {record['corpus']['corpus']}"
    return f"{contest.table(record)}\n\n{contest.about(record)}; {batch}, {record['padding']:.1%} padding in ours"


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
