"""Every shipped experiment, shrunk: two steps of each of its cells, on a small corpus."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from train_then_compress import point, run, sweep
from train_then_compress.config import conf_directory
from train_then_compress.cost import latency, machine
from train_then_compress.records import RunDirectory, read_json

#: Those of paper scale need the internet and a GPU; tests/config composes and validates them.
ON_THIS_MACHINE = sorted(
    path.stem for path in conf_directory().glob("experiment/*.yaml") if not path.stem.startswith("paper_")
)


#: Every method trains for two steps.
QUICK = [
    *(f"steps.{method}.recovery.max_steps=2" for method in ("prune", "oneshot", "wanda", "semi", "structured", "svd")),
    *(f"steps.{method}.training.{setting}" for method in ("gradual", "movement") for setting in ("steps=4", "every=1")),
    "steps.lsq.max_steps=2", "steps.exit.steps=2", "steps.distill.steps=2",
]  # fmt: skip


def once(call: Callable[[], object]) -> tuple[float, float]:
    """In place of `latency.measure`: what would be timed is done."""
    call()
    return 1.0, 0.0


@pytest.fixture
def kept_process() -> Iterator[None]:
    """What `run.main` changes in a process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("experiment", ON_THIS_MACHINE)
def test_every_cell_takes_two_steps(
    experiment: str, text_file: Path, labelled_file: Path, parallel_files: Path, cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, kept_process: None,
) -> None:  # fmt: skip
    text = ["data.vocab_size=400", "data.sequence_length=32", f"data.train={text_file}", "budget.kind=steps",
            "budget.value=2", "optimizer.batch_size=2", "optimizer.warmup=0"]  # fmt: skip
    written = (conf_directory() / "experiment" / f"{experiment}.yaml").read_text()
    is_finetuning = "scale: cpu_finetune" in written
    if is_finetuning:
        small = ["data=csv_files", f"data.train={labelled_file}", "data.sequence_length=32", "budget=steps",
                 "budget.value=2", "optimizer.warmup=0", "data@pretrain.data=text_files",
                 *(f"pretrain.{setting}" for setting in text)]  # fmt: skip
    elif "scale: cpu_translation" in written:
        splits = [f"data.{split}={parallel_files / split}" for split in ("train", "valid", "test")]
        small = ["data=parallel_files", *splits, "data.target=xx", "data.vocab_size=400", "budget.kind=steps",
                 "budget.value=2", "optimizer.batch_tokens=128", "optimizer.warmup=0", "evaluation.points=1",
                 "evaluation.bleu_sentences=2", "evaluation.test_sequences=4", "evaluation.max_ratio=0",
                 "evaluation.max_extra=4"]  # fmt: skip
    else:
        small = ["data=text_files", *text]
    small += [f"paths.cache={cache}", f"paths.runs={tmp_path}", "evaluation.validation_sequences=4",
              "runtime.threads=1", *QUICK]  # fmt: skip
    if experiment.endswith("_methods"):  # whose question is not the shape
        small += ["model.depth=2", "model.width=64"]
    monkeypatch.setattr(machine, "calibrate", lambda device: {})
    monkeypatch.setattr(latency, "measure", once)
    monkeypatch.setattr(point, "example_latency", partial(latency.example_latency, seconds=0.0))
    configs, errors = sweep.compose([f"experiment={experiment}", *small])
    assert not errors
    configs = [config for config in configs if config.seed == 0]  # other seeds are set alike
    assert configs
    for number, config in enumerate(configs):
        recipes = config.recipes if number == 0 else ["none"]
        cell = dataclasses.asdict(dataclasses.replace(config, recipes=recipes))
        monkeypatch.setattr(sys, "argv", ["run", json.dumps(cell)])
        assert run.main() == 0
    results = [
        path for path in tmp_path.glob("*/*/result.json") if not (is_finetuning and path.parent.name.startswith("mlm-"))
    ]
    assert len(results) == len(configs)
    rows = [row for path in results for row in RunDirectory(path.parent).points().values()]
    assert len(rows) == len(configs) - 1 + len(configs[0].recipes)
    assert all(read_json(path)["points"] for path in results) and all(row["test_loss"] > 0 for row in rows)
