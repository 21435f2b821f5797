"""One run in a process of its own: its stages in order, each skipped where its record stands.

Started by `sweep` as ``python -m train_then_compress.run``, which reads its config (JSON) from standard input when it
has imported torch; for several processes by torchrun, with the config as the argument.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import nn

from train_then_compress import __version__
from train_then_compress.cell import Cell, locate
from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.recipe import compress
from train_then_compress.config import BudgetConfig, Config, ConfigError, parse_milestone
from train_then_compress.config.base import reject
from train_then_compress.cost import machine
from train_then_compress.point import costs
from train_then_compress.records import Busy, Damaged, StageKey, append_row, atomic_write, read_json, write_json
from train_then_compress.tasks import ClassificationTask, TranslationTask, task_of
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.tracking.wandb_tracker import LiveTracker, replay
from train_then_compress.training import interrupt, parallel
from train_then_compress.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Snapshot,
    milestone_path,
    perplexity_milestone,
    read_checkpoint,
    read_weights,
)
from train_then_compress.training.clock import Clock
from train_then_compress.training.distillation import LENT, Distillation
from train_then_compress.training.loop import Desk, Diverged, Fitted, Training, fit, validate
from train_then_compress.training.schedule import evaluation_points, schedule
from train_then_compress.training.task import Task

#: Exit statuses of the process, beside 0 (done) and 1 (an error, with its traceback).
FAILED, INTERRUPTED = 3, 130


class Run:
    """The stages of one run, in the order of `work`."""

    def __init__(self, cell: Cell):
        self.config, self.data, self.plan, self.directory = cell.config, cell.data, cell.plan, cell.directory
        self.origin, self.teacher = cell.origin, cell.teacher
        self.metrics = MetricsLog(self.directory.metrics)
        self.task = task_of(cell.config, cell.data)

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
        model = self.dense_model()
        done = self.directory.points()
        for recipe, chain in self.plan.recipes.items():
            row = done.get(self.plan.points[recipe])
            if row is None:
                self._stop_if_asked(recipe)
                row = self.make_point(model, recipe, chain)
            if parallel.rank() == 0:  # once more where other settings came in between: a recipe's last row counts
                append_row(self.directory.path / "points.jsonl", row)
        if parallel.rank() == 0:
            write_json(self.directory.path / "result.json", {"points": self.plan.points})

    def _stop_if_asked(self, recipe: str) -> None:
        """Raise `Interrupted` where a signal came while nothing was trained."""
        if parallel.largest_over_ranks([interrupt.requested()], self.task.device)[0]:
            raise interrupt.Interrupted(f"stopped before the recipe {recipe}")

    def dense_model(self) -> nn.Module:
        """The dense model: loaded where its record stands, else trained, finetuned, or taken from a milestone."""
        key = self.plan.dense
        model = self.task.new_model()
        weights = self.directory.stage(key) / "model.safetensors"
        if self.directory.stage_record(key) is not None:
            model.load_state_dict(read_weights(weights))
            self._warn_of_missing_milestones()
            return model
        spent = self._load_origin(model)
        checkpoints = Checkpoints(self.directory.checkpoints(key), self.config.checkpoint.every_seconds)
        before = machine.calibrate(self.config.runtime.device)
        if key.name == "milestone":
            fitted = Fitted(spent, validate(model, self.task, self.config.runtime))
        else:
            fitted = self._train(model, checkpoints)
        if parallel.rank() == 0:
            atomic_write(weights, save(model.state_dict()))
            atomic_write(self.directory.stage(key) / "tokenizer.json", self.data.tokenizer.read_bytes())
            self._store(Compressed(model), key)
            write_json(self.directory.stage(key) / "record.json", {
                "stage": key.name, "id": key.id, "clock": fitted.clock.facts(), "validation": fitted.quality.facts,
                "overshoot": fitted.clock.progress(self.budget) - 1 if key.name != "milestone" else None,
                "corpus": self.data.record | self._copied(), "machine": machine.identity(), "versions": versions(),
                "origin": self._origin_record(), "teacher": self.teacher and self.teacher.id,
                "calibration": {"before": before, "after": machine.calibrate(self.config.runtime.device)},
            })  # fmt: skip
            checkpoints.finish()
        parallel.wait_for_all()
        return model

    def _copied(self) -> dict[str, Any]:
        """What copying the source scores, where that is what a model is held against."""
        return self.task.copied() if isinstance(self.task, TranslationTask) else {}

    @property
    def budget(self) -> BudgetConfig:
        """The budget; epochs of labelled text are counted in steps."""
        budget = self.config.budget
        if budget.kind != "epochs":
            return budget
        assert isinstance(self.task, ClassificationTask)
        return BudgetConfig(kind="steps", value=max(1, round(budget.value * self.task.steps_per_epoch)))

    def _train(self, model: nn.Module, checkpoints: Checkpoints) -> Fitted:
        config, key, start = self.config, self.plan.dense, self._branch()
        training = Training(
            budget=self.budget, optimizer=config.optimizer, rate=schedule(config.optimizer),
            evaluate_at=evaluation_points(config.evaluation), seed=config.seed, keep_at=config.checkpoint.keep_at,
            keep_at_perplexity=config.checkpoint.keep_at_perplexity, start=start,
        )  # fmt: skip
        with self._teaching(model) as task, StageProgress(key.name, self.directory.path.name) as display:
            if start is not None and start.model.keys() != model.state_dict().keys():
                raise reject("branch_from", config.branch_from, "was taught by other hints (distill.hints)")
            desk = Desk(key.directory, config.runtime, checkpoints, self.metrics, display)
            return fit(model, task, training, desk)

    @contextmanager
    def _teaching(self, model: nn.Module) -> Iterator[Task]:
        """What the dense model is trained on: the task, or its distillation where ``distill`` names a teacher."""
        teaching = self.config.distill
        if teaching is None or self.teacher is None:
            yield self.task
            return
        teacher = self.task.model_of(self.teacher.config)
        teacher.load_state_dict(read_weights(self.teacher.weights))
        distillation = Distillation(self.task, teacher.to(self.task.device), model, teaching, self.config.seed)
        with distillation.lending(model):
            yield distillation

    def _load_origin(self, model: nn.Module) -> Clock:
        """Put in the weights that the run begins with, if they are another run's; what was spent on them."""
        if self.origin is None:
            return Clock()
        if self.origin.milestone is None:
            self.task.load_origin(model, read_weights(self.origin.weights))
            return Clock(**(self.origin.directory.stage_record(self.origin.stage) or {})["clock"])
        checkpoints = self.origin.directory.checkpoints(self.origin.stage)
        snapshot = read_checkpoint(milestone_path(checkpoints, self.origin.milestone))
        own = {name: value for name, value in snapshot.model.items() if not name.startswith(LENT)}
        self.task.load_origin(model, own)
        return snapshot.clock

    def _origin_record(self) -> dict[str, Any] | None:
        """What the pretraining of the finetuned model spent, and how good it was; a milestone says so."""
        if self.origin is None:
            return None
        record = self.origin.directory.stage_record(self.origin.stage) or {}
        kept = {key: record.get(key) for key in ("clock", "validation")}
        return {"run": self.origin.directory.path.name, "id": self.origin.id, "milestone": self.origin.milestone} | kept

    def _warn_of_missing_milestones(self) -> None:
        config = self.config.checkpoint
        wanted = [*config.keep_at, *map(perplexity_milestone, config.keep_at_perplexity)]
        for milestone in wanted if self.plan.dense.name == "pretrain" else ():
            try:
                milestone_path(self.directory.checkpoints(self.plan.dense), milestone)
            except CheckpointError as error:
                logging.warning("%s; this run was trained without it: delete its directory to train it again", error)

    def _branch(self) -> Snapshot | None:
        """The milestone that this run starts from; raises `ConfigError` where its clock is past the constant phase."""
        branch, budget = self.config.branch_from, self.config.budget
        if branch is None:
            return None
        directory, progress = parse_milestone("branch_from", branch)
        stages = sorted(Path(directory).glob("checkpoint/pretrain-*"))
        if not stages:
            raise reject("branch_from", branch, "no milestones there; train that run with checkpoint.keep_at")
        snapshot = read_checkpoint(milestone_path(stages[0], progress))
        spent = snapshot.clock.progress(budget)
        if spent > 1 - self.config.optimizer.cooldown:
            raise reject("budget.value", budget.value, f"already spent to {spent:.0%} at branch_from={branch}; "
                         f"the cooldown needs the last {self.config.optimizer.cooldown:.0%}")  # fmt: skip
        return snapshot

    def make_point(self, model: nn.Module, recipe: str, chain: list[StageKey]) -> dict[str, Any]:
        """Compress, store in packed form, and evaluate what the stored file gives back: the point's result row."""
        dense_stage = self.directory.stage(self.plan.dense)
        dense = read_json(dense_stage / "record.json")["validation"][self.task.measure]
        bench = Bench(self.task, self.config, self.directory, self.metrics, dense, model, self.plan.dense)
        compressed = compress(model, chain, bench)
        last = (chain or [self.plan.dense])[-1]
        if parallel.rank() == 0:
            self._store(compressed, last)
        parallel.wait_for_all()
        path = self.directory.stage(last) / "packed.safetensors"
        stored = unpack(path, self.task.new_model()).model
        quality = self.task.evaluate(stored, "test")
        row: dict[str, Any] = {"point": self.plan.points[recipe], "recipe": recipe, "stage": last.directory}
        if parallel.rank() == 0:
            row |= {f"test_{name}": value for name, value in quality.facts.items()} | quality.signatures
            row |= costs(model, stored, self.task, path, dense_stage) | self._spent(chain)
            facts = ", ".join(f"{name} {value:.4g}" for name, value in quality.facts.items())
            print(f"  {recipe}: test {facts}; {row['bytes']:,} bytes", flush=True)
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
        clocks["compress_flops"] += sum(r.get("decoding", {}).get("flops", 0) for r in records)
        calibration = sum(r.get("calibration_tokens", 0) for r in records)
        seconds = sum(r["seconds"] for r in records)
        return {"compress_seconds": seconds, **clocks, "compress_calibration_tokens": calibration}


def work(cell: Cell) -> None:
    """Hold directory and machine and do a run; before it the one that makes the model it finetunes."""
    if cell.below is not None and not cell.below.done:
        work(cell.below)
    with ExitStack() as stack:
        if parallel.rank() == 0:
            stack.enter_context(cell.directory.locked())
            exclusive = cell.config.budget.kind == "seconds"
            stack.enter_context(machine.held(cell.config.runtime.device, exclusive))
            cell.directory.write_config(cell.config)
            cell.directory.failure.unlink(missing_ok=True)
        parallel.wait_for_all()
        try:
            Run(cell).work_tracked()
        except Diverged as error:
            if parallel.rank() == 0:
                write_json(cell.directory.failure, {"reason": str(error)})
            raise


def main() -> int:
    """Read the config, hold directory and machine, work; the exit status says how it went."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    told = sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read()
    if not told:  # the sweep ended before its first run
        return 0
    config = Config.build(json.loads(told))
    cell = locate(config)
    try:
        _set_up_process(config)
        work(cell)
    except interrupt.Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except (Busy, ConfigError, CheckpointError, Damaged, Diverged) as error:
        if parallel.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
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
