"""The program of step_profile.py: trains by turns with and without torch's profiler, and tells what it saw as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict

from torch.profiler import ProfilerActivity, profile

from parties import loops, masked_lm, translation
from train_then_compress.config import Config
from train_then_compress.training.loop import Trainer

PARTS = {"mlm": masked_lm, "translation": translation}


def observe(trainer: Trainer, steps: int, rounds: int) -> dict[str, object]:
    """Seconds a step without the profiler and with it, by round; of each operation its own seconds a step and its
    calls a step."""
    trainer.warm_up()
    _seconds(trainer, steps)
    plain, watched = [], []
    operations: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for _ in range(rounds):
        plain.append(_seconds(trainer, steps))
        with profile(activities=[ProfilerActivity.CPU]) as found:
            watched.append(_seconds(trainer, steps))
        for event in found.key_averages():
            own = operations[event.key]
            own[0] += event.self_cpu_time_total / 1e6 / steps / rounds
            own[1] += event.count / steps / rounds
    return {"seconds": plain, "profiled_seconds": watched, "operations": operations}


def _seconds(trainer: Trainer, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    return (time.perf_counter() - start) / steps


def ours(config: Config, steps: int, rounds: int) -> None:
    """This project's model."""
    task = PARTS[config.task.name].task_of(config)
    print(json.dumps(observe(loops.trainer_of(task.new_model(), task, config), steps, rounds)))


def fairseq_model(config: Config, steps: int, rounds: int) -> None:
    """fairseq's model in this project's loop, not compiled."""
    part = PARTS[config.task.name]
    task = part.task_of(config)
    plain = config.changed(runtime=dataclasses.replace(config.runtime, compile=False))
    print(json.dumps(observe(loops.trainer_of(part.new_fairseq_model(task), task, plain), steps, rounds)))


if __name__ == "__main__":
    loops.main({"ours": ours, "fairseq_model": fairseq_model})
