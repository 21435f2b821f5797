"""Sequence-level distillation: training on what the dense model's beam search says (Kim & Rush 2016, section 3.2).

The best translation stands for all that the teacher finds likely: training sources keep their place, their targets are
replaced. The dense model translates a source once for a run and a beam: pieces of what it said lie in the directory of
its stage, where an interrupted decoding goes on and other recipes find them. Each stage counts what they cost when they
were made.
"""

from __future__ import annotations

import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.config.recipes import Step
from train_then_compress.config.steps import SeqDistill
from train_then_compress.cost.flops import forward_flops
from train_then_compress.data.pairs import PairSplit
from train_then_compress.evaluation.decoding import Decoding, beam_search
from train_then_compress.evaluation.translation import decode_lines
from train_then_compress.records import Damaged, atomic_write
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training import interrupt, parallel
from train_then_compress.training.clock import Clock
from train_then_compress.training.schedule import linear_to_zero

#: Sources translated between two looks at whether to stop, and source positions decoded at once.
_PIECE, _POSITIONS = 500, 4096


def apply(compressed: Compressed, step: Step, bench: Bench) -> None:
    """Have the dense model translate, and train on that; pruned weights stay zero."""
    config, task = step.config, bench.task
    assert isinstance(config, SeqDistill)
    start = time.perf_counter()
    taught = translations(bench, config)
    bench.ledger.elsewhere += time.perf_counter() - start
    rate = linear_to_zero(config.lr_factor * bench.config.optimizer.lr)
    bench.train(
        compressed.model, config.steps, rate, task=task.with_training(taught),  # type: ignore[attr-defined]
        after_step=lambda step: compressed.mask_weights(),
    )  # fmt: skip


def translations(bench: Bench, config: SeqDistill) -> PairSplit:
    """The first ``config.sentences`` training sources (they stand in the order of their hashes) with the dense model's
    translations; what these cost goes to the ledger. The ranks share the work.

    Raises `Interrupted` after a signal (whole pieces are kept), `Damaged` for a piece that cannot be read.
    """
    task: Any = bench.task  # of translation: no other has this step
    training: PairSplit = task.pairs.split("train")
    count = min(config.sentences, len(training))
    dense = bench.key
    while dense.parent is not None:
        dense = dense.parent
    directory = bench.run.stage(dense) / f"beam{config.beam}"
    pieces = {
        directory / f"{start:08}-{min(start + _PIECE, count):08}.npz": range(start, min(start + _PIECE, count))
        for start in range(0, count, _PIECE)
    }
    with StageProgress(f"{bench.key.name}: the dense model translates", bench.run.path.name) as display:
        for path, numbers in list(pieces.items())[parallel.rank() :: parallel.ranks()]:
            if not path.is_file() and not interrupt.requested():
                atomic_write(path, _translated(bench, training, numbers, config.beam))
            display.update(numbers.stop / count)
    (stop,) = parallel.largest_over_ranks([interrupt.requested()], task.device)
    if stop:
        raise interrupt.Interrupted(f"{bench.key.directory} stopped; what the dense model has translated is written")
    found = [_read(path) for path in pieces]
    bench.ledger.decoding = Clock(
        sum(float(piece["seconds"]) for piece in found), sum(float(piece["flops"]) for piece in found),
        sum(len(piece["tokens"]) + len(piece["lengths"]) for piece in found),
    )  # fmt: skip
    ends = np.concatenate([piece["lengths"] for piece in found]).cumsum().reshape(-1, 2)
    return PairSplit(np.concatenate([piece["tokens"] for piece in found]), ends)


def _translated(bench: Bench, training: PairSplit, numbers: range, beam: int) -> bytes:
    """A file of these pairs, ``tokens`` and ``lengths`` of source and translation in turn, and what it cost.

    FLOPs are those of `forward_flops`, every hypothesis as long as the best.
    """
    start = time.perf_counter()
    model: Any = bench.teacher
    sources = [training.sides(number)[0].tolist() for number in numbers]
    device = next(model.parameters()).device
    decoding = Decoding(beam=beam)
    found = decode_lines(lambda batch: beam_search(model, batch, decoding), sources, _POSITIONS, device)
    targets = [hypotheses[0].tokens for hypotheses in found]
    count = forward_flops(model)
    flops = sum(count.translating((1, len(source) + 1), (beam, len(target) + 1), beam * (len(target) + 1))
                for source, target in zip(sources, targets, strict=True))  # fmt: skip
    sides = [side for pair in zip(sources, targets, strict=True) for side in pair]
    file = io.BytesIO()
    np.savez(
        file, tokens=np.array([token for side in sides for token in side], dtype=training.tokens.dtype),
        lengths=np.array([len(side) for side in sides]), flops=flops, seconds=time.perf_counter() - start,
    )  # fmt: skip
    return file.getvalue()


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise Damaged(path, error) from None
