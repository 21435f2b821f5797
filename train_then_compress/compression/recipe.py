"""`compress`: the only entry to compression."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import time

import torch
from torch import nn

from train_then_compress.compression.bench import Bench, Ledger
from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.records import StageKey, atomic_write, write_json
from train_then_compress.training import parallel
from train_then_compress.training.checkpoint import Checkpoints


def compress(model: nn.Module, recipe: list[StageKey], bench: Bench) -> Compressed:
    """Take a copy of the dense ``model`` through a recipe's stages; each is recorded, and done only once.

    A method named ``quant`` is the module ``quant`` beside this one; its function ``apply(compressed, step, bench)``
    works in place.
    """
    done = max((i + 1 for i, key in enumerate(recipe) if bench.run.stage_record(key)), default=0)
    compressed = Compressed(copy.deepcopy(model))
    if done:
        compressed = unpack(bench.run.stage(recipe[done - 1]) / "model.safetensors", compressed.model)
        compressed.masks = {name: mask.to(next(model.parameters()).device) for name, mask in compressed.masks.items()}
    for key in recipe[done:]:
        assert key.step is not None
        method = importlib.import_module(f"train_then_compress.compression.{key.step.method}")
        stage = dataclasses.replace(bench, key=key, ledger=Ledger())
        start = time.perf_counter()
        method.apply(compressed, key.step, stage)
        _record(compressed, stage, time.perf_counter() - start)
        if parallel.rank() == 0:
            Checkpoints(bench.run.checkpoints(key), 0).finish()
    return compressed


def _record(compressed: Compressed, bench: Bench, wall: float) -> None:
    """Write the stage's weights (float32, so that a longer chain loses nothing) and its record, in this order.

    ``seconds`` is what the stage cost: training steps (without evaluations, as everywhere) and all else that it did.
    """
    if parallel.rank() == 0:
        key, ledger = bench.key, bench.ledger
        directory = bench.run.stage(key)
        atomic_write(directory / "model.safetensors", pack(compressed, torch.float32, {"stage": key.directory}))
        record = {
            "stage": key.name, "id": key.id,
            "seconds": ledger.clock.seconds + ledger.decoding.seconds + wall - ledger.elsewhere,
            "clock": ledger.clock.facts(), "decoding": ledger.decoding.facts(),
            "calibration_tokens": ledger.calibration_tokens,
            "settings": dataclasses.asdict(key.step.config) if key.step else {},
        }  # fmt: skip
        write_json(directory / "record.json", record)
    parallel.wait_for_all()
