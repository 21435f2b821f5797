"""A synthetic study with known numbers, written in the form that runs leave behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train_then_compress.config import Config
from train_then_compress.records import RunDirectory, append_row, digest, rewrite_rows, write_json

UNIGRAM = {"valid": 540.0, "test": 533.0}
RECIPES = ["none", "quant8", "quant4", "quant2", "prune30", "prune60", "prune60+quant4", "oneshot60"]
VOCABULARY = 2048

Writer = Callable[..., RunDirectory]


def parameters(depth: int, width: int) -> tuple[int, int]:
    """All parameters, and those of the blocks alone."""
    return 12 * depth * width**2 + VOCABULARY * width, 12 * depth * width**2


def loss_at(depth: int, width: int, progress: float, seed: int) -> float:
    """Nats per token: larger models leave the plateau later and end lower, so that their curves cross."""
    size = parameters(depth, width)[1] / 1e6
    floor = 2.2 + 0.25 * size**-0.3
    leaves = (0.03 + 0.07 * size**0.5) * (1 + 0.06 * seed)
    return floor + (math.log(560) - floor) / (1 + (progress / leaves) ** 1.9)


def write_run(
    directory: Path, depth: int, width: int, seed: int = 0, recipes: list[str] = RECIPES, progress: float = 1.0,
    points: list[str] | None = None, failure: str | None = None, loss: float | None = None, evaluations: int = 12,
    **other: Any,
) -> RunDirectory:  # fmt: skip
    """One run trained up to ``progress`` (to ``loss``, where given), with ``points`` (of all recipes by default)."""
    config = Config.build({
        "study": directory.name, "seed": seed, "recipes": recipes, "budget": {"kind": "seconds", "value": 600},
        "data": {"name": "sotu_wiki", "vocab_size": VOCABULARY},
        "model": {"depth": depth, "width": width, "head_size": 32}, **other,
    })  # fmt: skip
    identity = digest([depth, width, seed, str(other)])[:8]
    run = RunDirectory(directory / f"mlm-d{depth}-w{width}-s{seed}-{identity}")
    run.write_config(config)
    rows = _metrics(config, f"pretrain-{identity}", progress, loss, evaluations)
    rewrite_rows(run.metrics, rows)
    if failure:
        write_json(run.path / "failure.json", {"reason": failure})
    if progress < 1:
        return run
    last = rows[-1]
    clock = {unit: last[unit] for unit in ("seconds", "flops", "tokens", "steps")}
    write_json(run.path / "stages" / f"pretrain-{identity}" / "record.json", {
        "stage": "pretrain", "id": identity, "clock": clock, "overshoot": 0.0,
        "validation": {name: last[name] for name in ("loss", "perplexity", "accuracy")},
        "corpus": {"unigram_perplexity": UNIGRAM}, "calibration": {"before": {}, "after": {}},
    })  # fmt: skip
    done = recipes if points is None else points
    for recipe in done:
        append_row(run.path / "points.jsonl", point_row(depth, width, recipe, last["loss"], f"{recipe}-{identity}"))
    if done == recipes:
        write_json(run.path / "result.json", {"points": {recipe: f"{recipe}-{identity}" for recipe in recipes}})
    return run


def _metrics(config: Config, stage: str, until: float, loss: float | None, evaluations: int) -> list[dict[str, Any]]:
    depth, width = config.model.depth, config.model.width
    steps = 9000 / (0.3 + parameters(depth, width)[1] / 2e6) * config.budget.value / 600
    rows = []
    for index in range(evaluations):
        progress = 0.02 * 50 ** (index / (evaluations - 1))
        if progress > until + 1e-9:
            break
        nats = loss or loss_at(depth, width, progress, config.seed)
        done = max(1, round(steps * progress))
        common = {
            "stage": stage, "progress": progress, "seconds": config.budget.value * progress, "steps": done,
            "tokens": done * 2048, "flops": done * 2048 * 6.0 * parameters(depth, width)[0],
            "lr": 3e-3 * (1 - progress), "tokens_per_second": 5e4,
        }  # fmt: skip
        quality = {"loss": nats, "perplexity": math.exp(nats), "accuracy": 0.7 - nats / 10}
        rows += [{**common, "split": "train", "loss": nats + 0.02}, {**common, "split": "validation", **quality}]
    return rows


def point_row(depth: int, width: int, recipe: str, loss: float, point: str) -> dict[str, Any]:
    """A point whose loss grows with compression, less for larger models, and whose bytes are counted by hand."""
    total, blocks = parameters(depth, width)
    size = blocks / 1e6
    bits, kept, harm = 16.0, 1.0, 0.0
    for step in recipe.split("+") if recipe != "none" else []:
        strength = int("".join(filter(str.isdigit, step)))
        if step.startswith("quant"):
            bits = strength + 0.25
            harm += {8: 0.002, 4: 0.11, 2: 3.4}[strength] * size**-0.2
        else:
            kept = 1 - strength / 100
            harm += (0.35 if step.startswith("oneshot") else 0.2) * (strength / 100) ** 3 * size**-0.2
    nats = loss + 0.01 + harm
    return {
        "point": point, "recipe": recipe, "stage": f"{recipe.split('+')[-1]}-{digest(point)[:8]}", "test_loss": nats,
        "test_perplexity": math.exp(nats), "test_accuracy": max(0.05, 0.7 - nats / 10), "bytes_bf16": 2 * total + 900,
        "bytes_fp32": 4 * total + 900, "bytes": round(total * (kept * bits + (kept < 1)) / 8) + 900,
        "parameters": total, "parameters_without_embeddings": blocks, "nonzero": round(total * kept),
        "nonzero_without_embeddings": round(blocks * kept), "flops_per_token": 2.0 * total,
        "flops_per_token_nonzero": 2.0 * total * kept, "latency_ms": 1 + total / 1e6, "latency_iqr_ms": 0.1,
        "throughput": 9e4 / (1 + total / 1e6), "engine": "torch", "threads": 2, "weight_error": harm / 10,
        "weight_errors": {"layers.0.fc1": harm / 9, "layers.0.fc2": harm / 11}, "compress_seconds": 20 * (1 - kept),
        "compress_steps": round(200 * (1 - kept)), "compress_flops": 1e12 * (1 - kept),
        "compress_tokens": round(4e5 * (1 - kept)),
    }  # fmt: skip


@pytest.fixture
def write() -> Writer:
    """`write_run`: (directory, depth, width, ...) -> the run's directory."""
    return write_run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six runs: three finished shapes, one stopped by its loss, one in training, one that lacks two recipes; and what
    else may lie about in a study."""
    directory = tmp_path / "runs" / "sizes"
    write_run(directory, 1, 64)
    write_run(directory, 2, 128)
    write_run(directory, 4, 192)
    write_run(directory, 6, 256, progress=0.4, failure="the loss is nan at step 812")
    write_run(directory, 4, 256, progress=0.6)
    write_run(directory, 2, 192, points=RECIPES[:-2])
    (directory / "figures").mkdir()
    (directory / "just-started").mkdir()
    (directory / "just-started" / "lock").touch()
    return directory
