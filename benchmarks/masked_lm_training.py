"""Masked-LM training: this project beside fairseq-train, fairseq's model in this project's loop, and transformers.

Each trains in a process of its own, and they take turns: all but one are stopped, so that a machine that slows down
slows all.

    python benchmarks/masked_lm_training.py --shapes 2x128 12x256 --json masked_lm_training.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import fairseq_train
from common import record as common
from common.record import Record
from common.turns import Party, take_turns

from train_then_compress.config import Config
from train_then_compress.cost import machine
from train_then_compress.data.prepare import Prepared, prepare
from train_then_compress.sweep import environment
from train_then_compress.tasks.masked_lm import MaskedLMTask

SHAPES = ("1x64", "2x64", "2x128", "6x256", "12x256", "6x512", "24x256")
OURS, FAIRSEQ_TRAIN, FAIRSEQ_MODEL, TRANSFORMERS = (
    "train_then_compress", "fairseq-train", "fairseq's model in our loop", "transformers Trainer",
)  # fmt: skip
CONVENTIONS = {
    "tokens": "without padding",
    "seconds": "by the clock of the process that hands out turns, over intervals of whole training steps: batches, "
    "logging of each interval and all else a training does between two evaluations or checkpoints included; start-up, "
    "the first intervals, and the first interval of each turn left out",
    "flops": "train_then_compress/cost/flops.py: matrix multiplications only, a multiply-add is 2, backward = 2 "
    "forward, output projection at masked positions only; each party is credited with what this project's model "
    "needs for the same tokens, whatever it computes",
    "peak": "the faster of two 1024^3 matrix multiplications in that dtype, before and after everything",
    "ratio": "of tokens per second, ours / theirs, in one round; median (quartiles) of the rounds",
    "memory": "peak resident memory of the party's main process",
    "spread": "quartiles (25 %, 75 %) over intervals",
}
_INTERVAL_SECONDS, _LIKELY_SHARE, _SAMPLE = 0.5, 0.25, 16


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `Config` checks the values."""
    parser = common.options(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="DEPTHxWIDTH",
                        help=f"default {' '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--positions", choices=("learned", "sinusoidal", "rotary"), default="learned",
                        help="ours (default learned); fairseq takes learned ones for rotary ones")  # fmt: skip
    parser.add_argument("--norm", choices=("pre", "post"), default="pre", help="transformers has post-norm only")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16" if machine.cpu_has_bf16() else "fp32",
                        help="bf16: autocast, weights in fp32 (fairseq-train has fp32 only on a CPU)")  # fmt: skip
    for name, value, unit in (("rounds", 5, "turns of each"), ("batch-size", 16, "sequences"),
                              ("length", 128, "tokens a sequence"), ("vocab-size", 4096, "tokens"),
                              ("head-size", 64, "units"), ("seed", 0, "of everything")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{unit}; default {value}")
    parser.add_argument("--turn-seconds", type=float, default=4.0, help="length of a turn; default 4")
    parser.add_argument("--mask-rate", type=float, default=0.15)
    parser.add_argument("--text", help="file, folder or glob of text to train on (default: the corpus sotu_wiki)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    quick = {"shapes": ["1x32"], "head_size": 16, "rounds": 1, "turn_seconds": 0.1, "batch_size": 2, "length": 16}
    arguments = common.parse(parser, argv, quick, needs=("fairseq", "transformers", "accelerate"))
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for shape in arguments.shapes:
        if len(parts := shape.split("x")) != 2 or not all(part.isdigit() for part in parts):
            parser.error(f"--shapes {shape}: DEPTHxWIDTH, e.g. 6x256")
    return arguments


def config_of(arguments: argparse.Namespace, shape: str) -> Config:
    """The run's config that the command line describes."""
    corpus = {"name": "text_files", "train": arguments.text} if arguments.text else {"name": "sotu_wiki"}
    depth, width = map(int, shape.split("x"))
    model = {name: getattr(arguments, name) for name in ("head_size", "positions", "norm", "dropout")}
    return Config.build({
        "seed": arguments.seed, "model": model | {"depth": depth, "width": width},
        "data": corpus | {"vocab_size": arguments.vocab_size, "sequence_length": arguments.length},
        "task": {"name": "mlm", "mask_rate": arguments.mask_rate}, "optimizer": {"batch_size": arguments.batch_size},
        "runtime": {"device": arguments.device, "dtype": arguments.dtype, "threads": arguments.threads,
                    "compile": arguments.compile},
        # Never reached; the rate is constant.
        "budget": {"kind": "steps", "value": 1_000_000_000}, "paths": {"cache": arguments.cache},
    })  # fmt: skip


def parties(config: Config, steps: int, data: Path) -> list[Party]:
    """The programs beside each other; each reports after every so many steps. ``data``: the corpus for fairseq."""
    threads = {"OMP_NUM_THREADS": str(config.runtime.threads)}
    plain = config.changed(runtime=dataclasses.replace(config.runtime, compile=False))
    return [
        Party(OURS, _program("ours", config, steps), _tokens, environment(config.runtime.threads)),
        Party(FAIRSEQ_TRAIN, fairseq_command(config, steps, data), fairseq_train.tokens_of(steps), threads),
        Party(FAIRSEQ_MODEL, _program("fairseq_model", plain, steps), _tokens, environment(config.runtime.threads)),
        Party(TRANSFORMERS, _program("transformers", plain, steps), _tokens, threads),
    ]


def _program(party: str, config: Config, steps: int) -> list[str]:
    script = Path(__file__).parent / "parties" / "masked_lm.py"
    return [sys.executable, str(script), party, json.dumps(dataclasses.asdict(config)), str(steps)]


def _tokens(line: str) -> float | None:
    return float(json.loads(line)["tokens"]) if line.startswith('{"tokens"') else None


def fairseq_command(config: Config, steps: int, data: Path) -> list[str]:
    """The command of fairseq's user: same shape, batch, dropout, clipping and optimizer settings."""
    model, optimizer = config.model, config.optimizer
    settings: dict[str, Any] = {
        "task": "masked_lm", "criterion": "masked_lm", "arch": "roberta_base", "encoder-layers": model.depth,
        "encoder-embed-dim": model.width, "encoder-ffn-embed-dim": 4 * model.width,
        "encoder-attention-heads": model.heads, "max-positions": config.data.sequence_length,
        "dropout": model.dropout, "attention-dropout": model.dropout,
        "tokens-per-sample": config.data.sequence_length, "sample-break-mode": "complete",
        "mask-prob": config.task.mask_rate, "batch-size": optimizer.batch_size, "optimizer": "adam",
        "adam-betas": (optimizer.beta1, optimizer.beta2), "adam-eps": optimizer.eps,
        "weight-decay": optimizer.weight_decay, "clip-norm": optimizer.clip, "lr-scheduler": "fixed", "lr": 1e-4,
        "seed": config.seed, "max-update": int(config.budget.value), "log-interval": steps,
    }  # fmt: skip
    flags = ["--no-save", "--disable-validation"]
    flags += ["--cpu"] if config.runtime.device == "cpu" else ["--bf16"] * (config.runtime.dtype == "bf16")
    flags += ["--encoder-normalize-before"] * (model.norm == "pre")
    return fairseq_train.command(data, flags, settings)


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """All shapes, one after the other."""
    configs = {shape: config_of(arguments, shape) for shape in arguments.shapes}
    prepared = prepare(next(iter(configs.values())).data, Path(arguments.cache))
    with tempfile.TemporaryDirectory() as data:
        fairseq_train.binarize(prepared, Path(data))
        measured = {shape: _measure(config, prepared, Path(data), arguments, calibration[arguments.dtype])
                    for shape, config in configs.items()}  # fmt: skip
    corpus = {name: prepared.record[name] for name in ("corpus", "id", "vocab_size", "sources", "licence")}
    return {"corpus": corpus, "shapes": measured}


def _measure(
    config: Config, prepared: Prepared, data: Path, arguments: argparse.Namespace, peak: float
) -> dict[str, Any]:
    task = MaskedLMTask(config, prepared, config.seed)
    counts = [task.counts(task.batch(step)) for step in range(_SAMPLE)]
    flops = sum(count.flops for count in counts)
    likely_seconds = flops / _SAMPLE / (peak * _LIKELY_SHARE)
    interval = min(_INTERVAL_SECONDS, arguments.turn_seconds / 4)
    beside = parties(config, max(1, round(interval / likely_seconds)), data)
    take_turns(beside, arguments.rounds, arguments.turn_seconds)
    ours = beside[0].speeds()
    ratios = {party.name: [a / b for a, b in zip(ours, party.speeds(), strict=True)] for party in beside[1:]}
    return {
        "flops_per_token": flops / sum(count.tokens for count in counts),
        "parties": {party.name: party.facts() for party in beside},
        "ratio": {name: {"by_round": values, **common.quartiles(values)} for name, values in ratios.items()},
    }


def table(record: Record) -> str:
    """A row for each shape and party."""
    rows = []
    for shape, measured in record["shapes"].items():
        for name, facts in measured["parties"].items():
            speed = facts["tokens_per_second"]
            flops = speed["median"] * measured["flops_per_token"]
            shares = [f"{flops / common.peak(record, dtype):.1%}" for dtype in ("bf16", "fp32")]
            ratio = common.spread(measured["ratio"][name], ".2f") if name in measured["ratio"] else ""
            memory = f"{facts['peak_memory'] / 1e6:,.0f}" if facts["peak_memory"] else "unknown"
            rows.append([shape, name, common.spread(speed), *shares, ratio, memory])
    heading = ["shape", "party", "tokens/s, median (quartiles)", "of the bf16 peak", "of the fp32 peak",
               "ours / it, rounds", "peak memory (MB)"]  # fmt: skip
    settings = record["settings"]
    about = (f"{settings['norm']}-norm (transformers: post), {settings['positions']} positions, dropout "
             f"{settings['dropout']:g}, vocabulary {record['corpus']['vocab_size']:,}, batches of "
             f"{settings['batch_size']} x {settings['length']} tokens of {record['corpus']['corpus']}; "
             f"{settings['dtype']} (fairseq-train: fp32 on a CPU), {settings['rounds']} rounds")  # fmt: skip
    return f"{common.markdown(heading, rows)}\n\n{about}"


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
