"""Time to quality: seconds of training to one validation loss, fairseq-train with RoBERTa's recipe against ttc run.

Both train the same shape on the same tokens, under one budget after the other; every model ends in the same
evaluation: this project's, on the same masked positions of the validation split.

    python benchmarks/time_to_quality.py --shape 6x256 --seconds 75 150 300 600 --json time_to_quality.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import fairseq_train
from common import record as common
from common.record import Record, Unmeasured
from common.turns import Party

from train_then_compress import sweep
from train_then_compress.config import Config
from train_then_compress.data.fairseq_export import export_fairseq
from train_then_compress.data.prepare import Prepared, prepare
from train_then_compress.models.fairseq.modules import RobertaAtPlaces
from train_then_compress.records import read_json
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.training.loop import validate

OURS, FAIRSEQ = "train_then_compress", "fairseq-train"
CONVENTIONS = {
    "seconds": "of training: ours by the budget clock; fairseq-train from the first to the last update by the clock "
    "on the wall (it neither validates nor saves meanwhile); start-up left out of both",
    "recipes": "ours: ttc run +scale=cpu; fairseq-train: RoBERTa's pretraining (fairseq/examples/roberta) with its "
    "number of updates set to what fits the budget, as measured just before, and 8 % of them warm-up",
    "loss": "nats per masked token over the whole validation split at 15 % fixed masks, both in the same code",
    "time to": "where the line through (logarithm of seconds, loss) of the budgets meets the loss; the loss is the "
    "lowest that fairseq-train has reached, unless --loss names one",
}
_WARM_UP, _LOG_EVERY, _TRIAL_SECONDS = 0.08, 10, 10.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__)
    parser.add_argument("--shape", default="6x256", metavar="DEPTHxWIDTH", help="default 6x256")
    parser.add_argument("--seconds", type=float, nargs="+", default=[75.0, 150.0, 300.0, 600.0],
                        help="budgets of training; default 75 150 300 600")  # fmt: skip
    parser.add_argument("--fairseq-rates", type=float, nargs="+", default=[5e-4, 2e-3],
                        help="peak learning rates to try: RoBERTa's, and a larger one for small models")  # fmt: skip
    parser.add_argument("--loss", type=float, help="the loss to reach (default: fairseq-train's lowest)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", help="file, folder or glob of text to train on (default: the corpus sotu_wiki)")
    quick = {"shape": "1x32", "seconds": [4.0, 8.0], "fairseq_rates": [5e-4]}
    return common.parse(parser, argv, quick, needs=("fairseq",))


def overrides(arguments: argparse.Namespace, seconds: float, runs: str) -> list[str]:
    """What ``ttc run`` is told."""
    depth, width = arguments.shape.split("x")
    text = ["data=text_files", f"data.train={arguments.text}"] if arguments.text else []
    return [
        "study=quality", "+scale=cpu", *text, f"model.depth={depth}", f"model.width={width}", "budget=seconds",
        f"budget.value={seconds}", f"seed={arguments.seed}", "evaluation.points=1", "evaluation.validation_sequences=0",
        f"runtime.threads={arguments.threads}", f"paths.runs={runs}", f"paths.cache={Path(arguments.cache).absolute()}",
    ]  # fmt: skip


def ours(arguments: argparse.Namespace, seconds: float) -> Record:
    """Train under a budget; what was spent and reached."""
    with tempfile.TemporaryDirectory() as runs:
        given = overrides(arguments, seconds, runs)
        # The run holds a machine of its own making: this one is held for the benchmark already.
        command = [sys.executable, "-m", "train_then_compress", "run", *given]
        with _ended(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                     env=os.environ | {"TMPDIR": runs})) as process:  # fmt: skip
            _, said = process.communicate()
        records = [read_json(path) for path in Path(runs).glob("quality/*/stages/pretrain-*/record.json")]
    if process.returncode or len(records) != 1:
        raise Unmeasured(f"ttc run failed:\n{said}")
    clock = records[0]["clock"]
    return {"budget": seconds, "seconds": clock["seconds"], "updates": clock["steps"],
            "loss": records[0]["validation"]["loss"]}  # fmt: skip


def recipe(config: Config, data: Path, rate: float, updates: int) -> list[str]:
    """RoBERTa's pretraining as fairseq documents it, at this shape and batch."""
    settings = fairseq_train.masked_lm(config) | {
        "optimizer": "adam", "adam-betas": "(0.9,0.98)", "adam-eps": 1e-6, "clip-norm": 0.0, "weight-decay": 0.01,
        "dropout": 0.1, "attention-dropout": 0.1, "lr-scheduler": "polynomial_decay", "lr": rate,
        "total-num-update": updates, "warmup-updates": max(1, round(_WARM_UP * updates)), "max-update": updates,
        "seed": config.seed, "log-interval": _LOG_EVERY,
    }  # fmt: skip
    return fairseq_train.command(data, ["--cpu", "--disable-validation"], settings)


def updates_per_second(config: Config, data: Path, seconds: float) -> float:
    """How fast fairseq-train is, as measured for a while after its start."""
    command = [*recipe(config, data, 1e-4, 10**9), "--no-save"]
    party = Party(
        FAIRSEQ, command, fairseq_train.tokens_of(_LOG_EVERY), {"OMP_NUM_THREADS": str(config.runtime.threads)}
    )
    party.start()
    try:
        party.warm_up()
        party.take_turn(seconds)
    finally:
        party.end()
    (turn,) = party.intervals
    return _LOG_EVERY * len(turn) / sum(taken for taken, _ in turn)


def fairseq(config: Config, data: Path, task: MaskedLMTask, rate: float, budget: float, updates: int) -> Record:
    """Train for a number of updates; what was spent, and what its last checkpoint reaches in our evaluation."""
    with tempfile.TemporaryDirectory() as saved:
        command = [*recipe(config, data, rate, updates), "--save-dir", saved, "--no-epoch-checkpoints"]
        seconds = _seconds_between(command, config.runtime.threads)
        # A file that was written a moment ago by our own order: not from outside.
        weights = torch.load(Path(saved) / "checkpoint_last.pt", weights_only=False)["model"]
    model = RobertaAtPlaces(config.model, task.vocab_size, config.data.sequence_length)
    model.model.load_state_dict(weights)
    quality = validate(model, task, config.runtime)
    return {"budget": budget, "seconds": seconds, "updates": updates, "loss": quality.facts["loss"]}


@contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Wait for a program, and end it where this one ends before it: ``ttc run`` hands SIGTERM on to its run."""
    with process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


def _seconds_between(command: list[str], threads: int) -> float:
    """Seconds from fairseq-train's first to its last update."""
    said: deque[str] = deque(maxlen=15)
    begun = ended = None
    with _ended(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 env=os.environ | {"OMP_NUM_THREADS": str(threads)})) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if begun is None and "Start iterating over samples" in line:
                begun = time.perf_counter()
            elif "Stopping training due to" in line:
                ended = time.perf_counter()
    if process.returncode or begun is None or ended is None:
        raise Unmeasured(f"fairseq-train failed:\n{''.join(said)}")
    return ended - begun


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """Every budget with every recipe, from the shortest on."""
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        configs, errors = sweep.compose(overrides(arguments, arguments.seconds[0], directory))
        if errors:
            raise Unmeasured("\n".join(errors))
        config = _theirs(configs[0])
        prepared: Prepared = prepare(config.data, Path(arguments.cache))
        task = MaskedLMTask(config, prepared, config.seed)
        export_fairseq(prepared, data)
        speed = updates_per_second(config, data, min(_TRIAL_SECONDS, arguments.seconds[0]))
        runs: dict[str, list[Record]] = {}
        for seconds in sorted(arguments.seconds):
            runs.setdefault(OURS, []).append(ours(arguments, seconds))
            for rate in arguments.fairseq_rates:
                taken = fairseq(config, data, task, rate, seconds, max(2, round(speed * seconds)))
                runs.setdefault(f"{FAIRSEQ}, rate {rate:g}", []).append(taken)
    loss = arguments.loss or min(run["loss"] for name, taken in runs.items() if name != OURS for run in taken)
    return {"corpus": common.corpus_facts(prepared), "runs": runs, "loss": loss,
            "time_to": {name: time_to(loss, taken) for name, taken in runs.items()}}  # fmt: skip


def _theirs(config: Config) -> Config:
    """The same run with the model of RoBERTa's recipe: post-norm, learned positions, dropout."""
    model = dataclasses.replace(config.model, positions="learned", norm="post", dropout=0.1)
    return config.changed(model=model)


def time_to(loss: float, runs: list[Record]) -> float | None:
    """Seconds to a loss, between the budgets; None where none reaches it, the first budget where that one does."""
    runs = sorted(runs, key=lambda run: run["seconds"])
    reached = next((number for number, run in enumerate(runs) if run["loss"] <= loss), None)
    if reached is None or reached == 0:
        return None if reached is None else float(runs[0]["seconds"])
    before, after = runs[reached - 1], runs[reached]
    share = (before["loss"] - loss) / (before["loss"] - after["loss"])
    return float(before["seconds"] * np.power(after["seconds"] / before["seconds"], share))


def table(record: Record) -> str:
    """A row for each training, and one for each party's time to the loss."""
    rows = [
        [name, f"{run['budget']:g}", f"{run['seconds']:.1f}", f"{run['updates']:,}", f"{run['loss']:.3f}",
         f"{np.exp(run['loss']):.2f}"]
        for name, runs in record["runs"].items() for run in runs
    ]  # fmt: skip
    times = [[name, "not reached" if seconds is None else f"{seconds:,.0f}"]
             for name, seconds in record["time_to"].items()]  # fmt: skip
    settings = record["settings"]
    return "\n\n".join([
        common.markdown(["party", f"seconds to a loss of {record['loss']:.3f}"], times),
        common.markdown(["party", "budget (s)", "training (s)", "updates", "validation loss", "perplexity"], rows),
        f"{settings['shape']}, vocabulary {record['corpus']['vocab_size']:,}, {record['corpus']['corpus']}",
    ])  # fmt: skip


def main(argv: Sequence[str]) -> Record:
    """Measure, print the tables, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
