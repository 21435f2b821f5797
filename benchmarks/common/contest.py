"""A contest of training programs over several shapes: its options, its turns, its table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import record as common
from common.record import Record
from common.turns import Party, take_turns
from train_then_compress.cost import machine
from train_then_compress.training.task import Task

OURS, FAIRSEQ_TRAIN, FAIRSEQ_MODEL = "train_then_compress", "fairseq-train", "fairseq's model in our loop"
CONVENTIONS = {
    "tokens": "without padding",
    "seconds": "by the clock of the process that hands out turns, over intervals of whole training steps: batches, "
    "logging of each interval and all else a training does between two evaluations or checkpoints included; start-up, "
    "the first intervals, and the first interval of each turn left out",
    "flops": "train_then_compress/cost/flops.py: matrix multiplications only, a multiply-add is 2, backward = 2 "
    "forward, padding included, predictions only where there is a target; each party is credited with what this "
    "project's model nominally needs for the same tokens, whatever it computes (of a masked LM's last layer, ours "
    "computes in training what predictions need)",
    "peak": "1024^3 matrix multiplications in that dtype, timed at the start of each round; bf16 only where the "
    "hardware multiplies it. A share is of a round's tokens per second; median of the rounds",
    "ratio": "of tokens per second, ours / theirs, in one round; median (quartiles) of the rounds",
    "memory": "peak resident memory of the party's main process",
    "spread": "quartiles (25 %, 75 %) over intervals",
}
_INTERVAL_SECONDS, _LIKELY_SHARE, _SAMPLE, _PEAK_SECONDS = 0.5, 0.25, 100, 1.0


def options(description: str, shapes: Sequence[str], dropout: float | None) -> argparse.ArgumentParser:
    """The options of every contest; ``dropout``: its default, None where that depends on the task."""
    parser = common.options(description)
    parser.add_argument("--shapes", nargs="+", default=list(shapes), metavar="DEPTHxWIDTH",
                        help=f"default {' '.join(shapes)}")  # fmt: skip
    parser.add_argument("--norm", choices=("pre", "post"), default="pre", help="transformers has post-norm only")
    known = "that of the task's own benchmark" if dropout is None else dropout
    parser.add_argument("--dropout", type=float, default=dropout, help=f"default {known}")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16" if machine.cpu_has_bf16() else "fp32",
                        help="bf16: autocast, weights in fp32 (fairseq-train has fp32 only on a CPU)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; default %(default)s")
    parser.add_argument("--turn-seconds", type=float, default=4.0, help="length of a turn; default 4")
    parser.add_argument("--head-size", type=int, default=64, help="default 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], quick: Record) -> argparse.Namespace:
    """The arguments, checked."""
    quick = {"shapes": ["1x32"], "head_size": 16, "rounds": 1, "turn_seconds": 0.1} | quick
    arguments: argparse.Namespace = common.parse(parser, argv, quick, ("fairseq", "transformers", "accelerate"))
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    for shape in arguments.shapes:
        if len(parts := shape.split("x")) != 2 or not all(part.isdigit() for part in parts):
            parser.error(f"--shapes {shape}: DEPTHxWIDTH, e.g. 6x256")
    return arguments


def values_of(arguments: argparse.Namespace, shape: str) -> dict[str, Any]:
    """The part of a run's config that does not depend on the task; its budget is never reached."""
    depth, width = map(int, shape.split("x"))
    model = {name: getattr(arguments, name) for name in ("head_size", "norm", "dropout")}
    return {
        "seed": arguments.seed, "model": model | {"depth": depth, "width": width},
        "runtime": {"device": arguments.device, "dtype": arguments.dtype, "threads": arguments.threads,
                    "compile": arguments.compile},
        "budget": {"kind": "steps", "value": 1_000_000_000}, "paths": {"cache": arguments.cache},
    }  # fmt: skip


def program(module: str, party: str, values: str, steps: int, environment: dict[str, str]) -> tuple[Any, ...]:
    """Command, reader and environment of a `Party` from ``parties/``; ``values``: its config as JSON."""
    places = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"parties.{module}", party, values, str(steps)]
    return command, _tokens, environment | {"PYTHONPATH": os.pathsep.join(places)}


def _tokens(line: str) -> float | None:
    return float(json.loads(line)["tokens"]) if line.startswith('{"tokens"') else None


def hold(
    task: Task,
    parties_of: Callable[[int], list[Party]],
    arguments: argparse.Namespace,
    calibration: dict[str, float],
) -> dict[str, Any]:
    """Let the parties, made for intervals of so many steps, take turns; what is measured of a shape. Ours is first."""
    peak = calibration.get(arguments.dtype, calibration["fp32"])
    counts = [task.counts(task.batch(step)) for step in range(_SAMPLE)]
    flops = sum(count.flops for count in counts)
    likely_seconds = flops / _SAMPLE / (peak * _LIKELY_SHARE)
    interval = min(_INTERVAL_SECONDS, arguments.turn_seconds / 4)
    parties = parties_of(max(1, round(interval / likely_seconds)))
    peaks: list[dict[str, float]] = []
    seconds = min(_PEAK_SECONDS, arguments.turn_seconds)
    take_turns(
        parties, arguments.rounds, arguments.turn_seconds,
        lambda: peaks.append(machine.calibrate(arguments.device, seconds)),
    )  # fmt: skip
    ours = parties[0].speeds()
    ratios = {party.name: [a / b for a, b in zip(ours, party.speeds(), strict=True)] for party in parties[1:]}
    per_token = flops / sum(count.tokens for count in counts)
    shares = {
        party.name: {
            dtype: common.quartiles([
                speed * per_token / peak[dtype] for speed, peak in zip(party.speeds(), peaks, strict=True)
            ])
            for dtype in calibration
        }
        for party in parties
    }  # fmt: skip
    return {
        "flops_per_token": per_token,
        "peaks": peaks,
        "parties": {party.name: party.facts() | {"share_of_peak": shares[party.name]} for party in parties},
        "ratio": {name: {"by_round": values, **common.quartiles(values)} for name, values in ratios.items()},
    }


def table(record: Record) -> str:
    """A row for each shape and party."""
    rows, dtypes = [], list(record["calibration"]["before"])
    for shape, measured in record["shapes"].items():
        for name, facts in measured["parties"].items():
            speed = facts["tokens_per_second"]
            shares = [f"{facts['share_of_peak'][dtype]['median']:.0%}" for dtype in dtypes]
            ratio = common.spread(measured["ratio"][name], ".2f") if name in measured["ratio"] else ""
            memory = f"{facts['peak_memory'] / 1e6:,.0f}" if facts["peak_memory"] else "unknown"
            rows.append([shape, name, common.spread(speed), *shares, ratio, memory])
    heading = ["shape", "party", "tokens/s, median (quartiles)", *(f"of the {dtype} peak" for dtype in dtypes),
               "ours / it, rounds", "peak memory (MB)"]  # fmt: skip
    return common.markdown(heading, rows)


def about(record: Record) -> str:
    """What holds for all rows of the table."""
    settings = record["settings"]
    return (f"{settings['norm']}-norm (transformers: post), dropout {settings['dropout']:g}, vocabulary "
            f"{record['corpus']['vocab_size']:,}; {settings['dtype']} (fairseq-train: fp32 on a CPU), "
            f"{settings['rounds']} rounds")  # fmt: skip
