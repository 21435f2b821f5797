"""One run in a process of its own: its stages in order, each skipped where its record stands.

Started by `sweep` as ``python -m train_then_compress.run CONFIG_JSON``, or by torchrun for several processes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from train_then_compress import __version__
from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.recipe import compress
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.base import reject
from train_then_compress.cost import machine
from train_then_compress.data.prepare import Prepared, prepare
from train_then_compress.models.roberta import MaskedLM
from train_then_compress.point import costs
from train_then_compress.records import (
    Busy,
    Plan,
    RunDirectory,
    StageKey,
    append_row,
    atomic_write,
    plan,
    read_json,
    write_json,
)
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.tracking.wandb_tracker import LiveTracker, replay
from train_then_compress.training import interrupt, parallel
from train_then_compress.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Snapshot,
    milestone_path,
    read_checkpoint,
)
from train_then_compress.training.loop import Desk, Diverged, Training, fit
from train_then_compress.training.schedule import evaluation_points, schedule

#: Exit statuses of the process, beside 0 (done) and 1 (an error, with its traceback).
FAILED, INTERRUPTED = 3, 130


class Run:
    """The stages of one run, in the order of `work`."""

    def __init__(self, config: Config, prepared: Prepared, planned: Plan, directory: RunDirectory):
        self.config, self.prepared, self.plan, self.directory = config, prepared, planned, directory
        self.metrics = MetricsLog(directory.metrics)
        self.task = MaskedLMTask(config, prepared, config.seed)

    def work_tracked(self) -> None:
        """`work` with the tracker: rows as they come when online; when offline the whole history at the end."""
        study, tracker = self.config.study, self.config.tracker
        if parallel.rank() != 0:
            self.work()
            return
        with LiveTracker(self.directory.path, study, tracker, self.directory.path.parent) as live:
            self.metrics.listeners.append(live)
            self.work()
        replay(self.directory.path, study, tracker, self.directory.path.parent)

    def work(self) -> None:
        """Train, compress, evaluate, and say that it is done."""
        model = self.pretrain()
        done = self.directory.points()
        for recipe, chain in self.plan.recipes.items():
            row = done.get(self.plan.points[recipe]) or self.make_point(model, recipe, chain)
            if parallel.rank() == 0:  # once more where other settings came in between: a recipe's last row counts
                append_row(self.directory.path / "points.jsonl", row)
        if parallel.rank() == 0:
            write_json(self.directory.path / "result.json", {"points": self.plan.points})
            (self.directory.path / "failure.json").unlink(missing_ok=True)

    def pretrain(self) -> MaskedLM:
        """The dense model, trained or loaded."""
        key, config = self.plan.pretrain, self.config
        model = self.task.new_model()
        weights = self.directory.stage(key) / "model.safetensors"
        if self.directory.stage_record(key) is not None:
            model.load_state_dict(load_file(weights))
            self._warn_of_missing_milestones()
            return model
        training = Training(
            budget=config.budget, optimizer=config.optimizer, rate=schedule(config.optimizer),
            evaluate_at=evaluation_points(config.evaluation), seed=config.seed, keep_at=config.checkpoint.keep_at,
            start=self._branch(),
        )  # fmt: skip
        checkpoints = Checkpoints(self.directory.checkpoints(key), config.checkpoint.every_seconds)
        before = machine.calibrate(config.runtime.device)
        with StageProgress(key.name, self.directory.path.name) as display:
            fitted = fit(
                model, self.task, training, Desk(key.directory, config.runtime, checkpoints, self.metrics, display)
            )
        if parallel.rank() == 0:
            atomic_write(weights, save(model.state_dict()))
            self._store(Compressed(model), key)
            write_json(self.directory.stage(key) / "record.json", {
                "stage": key.name, "id": key.id, "clock": fitted.clock.facts(),
                "overshoot": fitted.clock.progress(config.budget) - 1, "validation": fitted.quality.facts,
                "corpus": self.prepared.record, "machine": machine.identity(), "versions": versions(),
                "calibration": {"before": before, "after": machine.calibrate(config.runtime.device)},
            })  # fmt: skip
            checkpoints.finish()
        parallel.wait_for_all()
        return model

    def _warn_of_missing_milestones(self) -> None:
        for progress in self.config.checkpoint.keep_at:
            try:
                milestone_path(self.directory.checkpoints(self.plan.pretrain), progress)
            except CheckpointError as error:
                logging.warning("%s; this run was trained without it: delete its directory to train it again", error)

    def _branch(self) -> Snapshot | None:
        """The milestone that this run starts from; raises `ConfigError` where its clock is past the constant phase."""
        branch, budget = self.config.branch_from, self.config.budget
        if branch is None:
            return None
        directory, _, progress = branch.rpartition("@")
        stages = sorted(Path(directory).glob("checkpoint/pretrain-*"))
        if not stages:
            raise reject("branch_from", branch, "no milestones there; train that run with checkpoint.keep_at")
        snapshot = read_checkpoint(milestone_path(stages[0], float(progress)))
        spent = snapshot.clock.progress(budget)
        if spent > 1 - self.config.optimizer.cooldown:
            raise reject("budget.value", budget.value, f"already spent to {spent:.0%} at branch_from={branch}; "
                         f"the cooldown needs the last {self.config.optimizer.cooldown:.0%}")  # fmt: skip
        return snapshot

    def make_point(self, model: MaskedLM, recipe: str, chain: list[StageKey]) -> dict[str, Any]:
        """Compress, store in packed form, and evaluate what the stored file gives back: the point's result row."""
        pretrained = self.directory.stage(self.plan.pretrain)
        record = read_json(pretrained / "record.json")
        dense = record["validation"]["accuracy"]
        compressed = compress(
            model, chain, Bench(self.task, self.config, self.directory, self.metrics, dense, self.plan.pretrain)
        )
        last = (chain or [self.plan.pretrain])[-1]
        if parallel.rank() == 0:
            self._store(compressed, last)
        parallel.wait_for_all()
        path = self.directory.stage(last) / "packed.safetensors"
        stored = self.task.new_model()
        unpack(path, stored)
        quality = self.task.evaluate(stored, "test")
        row: dict[str, Any] = {"point": self.plan.points[recipe], "recipe": recipe, "stage": last.directory}
        if parallel.rank() == 0:
            row |= {f"test_{name}": value for name, value in quality.facts.items()}
            row |= costs(model, stored, self.task.flops, path, pretrained) | self._spent(chain)
            perplexity = quality.facts["perplexity"]
            print(f"  {recipe}: test perplexity {perplexity:.2f}, {row['bytes']:,} bytes", flush=True)
        parallel.wait_for_all()
        return row

    def _store(self, compressed: Compressed, key: StageKey) -> None:
        """Write a stage's result in packed form; the same bytes whichever recipe ends there."""
        content = pack(compressed, torch.bfloat16, {"stage": key.directory})
        atomic_write(self.directory.stage(key) / "packed.safetensors", content)

    def _spent(self, chain: list[StageKey]) -> dict[str, float]:
        """What the recipe's stages cost together."""
        records = [record for key in chain if (record := self.directory.stage_record(key))]
        clocks = {f"compress_{name}": sum(r["clock"][name] for r in records) for name in ("steps", "flops", "tokens")}
        return {"compress_seconds": sum(r["seconds"] for r in records), **clocks}


def main() -> int:
    """Read the config from the first argument, hold directory and machine, work; the exit status says how it went."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    config = Config.build(json.loads(sys.argv[1]))
    _set_up_process(config)
    prepared = prepare(config.data, Path(config.paths.cache))
    planned = plan(config, prepared.id, machine.identity())
    directory = RunDirectory(Path(config.paths.runs) / config.study / planned.run_name)
    try:
        with ExitStack() as stack:
            if parallel.rank() == 0:
                stack.enter_context(directory.locked())
                stack.enter_context(machine.held(config.runtime.device, exclusive=config.budget.kind == "seconds"))
                directory.write_config(config)
            Run(config, prepared, planned, directory).work_tracked()
    except interrupt.Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except (Busy, ConfigError, CheckpointError, Diverged) as error:
        if parallel.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
            if isinstance(error, Diverged):
                write_json(directory.path / "failure.json", {"reason": str(error)})
        return FAILED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _set_up_process(config: Config) -> None:
    """Signals, threads, and the process group where torchrun started several."""
    interrupt.listen()
    torch.set_num_threads(config.runtime.threads)
    if config.runtime.device == "cuda":
        if not torch.cuda.is_available():
            raise reject("runtime.device", "cuda", "no GPU is usable here; runtime=cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_float32_matmul_precision("high")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if config.runtime.device == "cuda" else "gloo")


def versions() -> dict[str, str]:
    """What computed a result."""
    return {"python": platform.python_version(), "torch": torch.__version__, "train_then_compress": __version__}


if __name__ == "__main__":
    sys.exit(main())
