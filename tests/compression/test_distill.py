"""The step ``distill`` and recovery with a teacher: inside recipes, resumed, and with what training they amount to."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from train_then_compress.cell import Cell, locate
from train_then_compress.compression import distill
from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed, matrices
from train_then_compress.compression.prune import prune
from train_then_compress.compression.structured import magnitude_scores, shrink
from train_then_compress.config import Config, ConfigError, parse_recipe
from train_then_compress.config.steps import Distill, Prune, Recovery, Structured
from train_then_compress.records import read_json, what
from train_then_compress.run import work
from train_then_compress.training import interrupt
from train_then_compress.training.task import Quality

BuildConfig = Callable[..., Config]
RECIPE = "prune30+distill+quant8"


@pytest.fixture(params=["mlm", "translation"])
def bench(request: pytest.FixtureRequest, make_bench: Callable[..., Bench]) -> Bench:
    """A dense model with notions of its own, as teacher."""
    made = dataclasses.replace(make_bench(request.param, model={"depth": 1, "dropout": 0.1}), dense=100.0)
    with torch.no_grad():
        for parameter in made.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def halved(bench: Bench) -> Compressed:
    compressed = Compressed(copy.deepcopy(bench.teacher))
    prune(compressed, 0.5, Prune())
    return compressed


def divergence(bench: Bench, model: nn.Module) -> float:
    """KL of a model's predictions from the teacher's, on a batch that was not trained on."""
    (part,) = bench.task.parts(bench.task.with_seed(99).batch(0), 0, 1, 0)
    modes = model.training, bench.teacher.training
    with torch.no_grad():
        ours, its = (bench.task.logits(m.eval(), part)[: part.terms].log_softmax(1) for m in (model, bench.teacher))
    model.train(modes[0])
    bench.teacher.train(modes[1])
    return float((its.exp() * (its - ours)).sum()) / part.terms


def step_of(bench: Bench, **settings: Any) -> Any:
    (step,) = parse_recipe("distill", {"distill": settings}, bench.config.model)
    return step


@pytest.mark.parametrize("hints", ["none", "hidden", "relations"])
def test_a_pruned_model_comes_back_to_the_dense_one(bench: Bench, hints: str) -> None:
    compressed = halved(bench)
    before, teacher = divergence(bench, compressed.model), copy.deepcopy(bench.teacher.state_dict())
    names = [name for name, _ in compressed.model.named_parameters()]
    distill.apply(compressed, step_of(bench, steps=40, alpha=1.0, lr_factor=1.0, hints=hints), bench)
    assert divergence(bench, compressed.model) < 0.6 * before
    weights = matrices(compressed.model, True)
    assert all(not weights[name][~mask].any() for name, mask in compressed.masks.items())
    assert [name for name, _ in compressed.model.named_parameters()] == names
    assert all(torch.equal(value, teacher[name]) for name, value in bench.teacher.state_dict().items())
    assert bench.teacher.training and bench.ledger.clock.steps == 40


@pytest.mark.parametrize("hints", ["hidden", "relations"])
def test_a_student_of_fewer_heads_and_units_learns_too(bench: Bench, hints: str) -> None:
    compressed = Compressed(copy.deepcopy(bench.teacher))
    shrink(compressed, 0.5, Structured(), magnitude_scores(compressed.model))
    before = divergence(bench, compressed.model)
    distill.apply(compressed, step_of(bench, steps=40, alpha=1.0, lr_factor=1.0, hints=hints), bench)
    assert divergence(bench, compressed.model) < 0.6 * before
    task = bench.task.with_seed(bench.seed)
    own, dense = (
        sum(counting.counts(task.batch(step)).flops for step in range(40))
        for counting in (task.counting(compressed.model), task)
    )
    assert own < bench.ledger.clock.flops < dense * 4 / 3


def test_the_teachers_passes_are_among_the_flops(bench: Bench) -> None:
    distill.apply(halved(bench), step_of(bench, steps=3), bench)
    task = bench.task.with_seed(bench.seed)
    own = sum(task.counts(task.batch(step)).flops for step in range(3))
    assert bench.ledger.clock.flops == pytest.approx(own * 4 / 3)


@pytest.mark.parametrize("taught", [False, True])
def test_recovery_learns_from_the_dense_model_where_it_is_asked_to(
    bench: Bench, taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default settings of the step; otherwise it is trained on the task alone."""
    trained: list[Any] = []
    train = Bench.train
    monkeypatch.setattr(Bench, "train", lambda self, model, *rest, task, **named: (
        trained.append(task), train(self, model, *rest, task=task, **named)))  # fmt: skip
    compressed = halved(bench)
    recovery = Recovery(target=1, max_steps=40, check_every=40, lr_factor=1.0, distill=taught)
    bench.recover(compressed, recovery, 40)
    (task,) = trained
    assert (task.teaching == Distill() and task.teacher is bench.teacher) if taught else task is bench.task
    weights = matrices(compressed.model, True)
    assert all(not weights[name][~mask].any() for name, mask in compressed.masks.items())


def test_recovery_without_a_teacher_keeps_its_identity() -> None:
    assert what(Recovery()) == {"is": "Recovery"}
    assert what(Recovery(distill=True)) == {"is": "Recovery", "distill": True}
    assert "distill" not in str(what(Prune())) and what(Prune(recovery=Recovery(distill=True))) != what(Prune())


def cell_of(build_config: BuildConfig, runs: Path) -> Cell:
    return locate(build_config(
        model={"depth": 1, "dropout": 0.1}, recipes=["none", RECIPE], paths={"runs": str(runs)},
        steps={"prune": {"increment": 30, "recovery": {"max_steps": 4, "distill": True, "target": 1}},
               "distill": {"steps": 12, "hints": "hidden"}},
    ))  # fmt: skip


def test_a_recipe_ends_in_the_same_weights_when_it_is_interrupted_on_the_way(
    build_config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quality, "recovers", lambda *_: False)  # so little trained, it predicts as well without weights
    calm = cell_of(build_config, tmp_path / "calm")
    work(calm)
    (distilled,) = calm.directory.path.glob("stages/distill-*/record.json")
    assert read_json(distilled)["clock"]["steps"] == 12
    point = {row["recipe"]: row for row in calm.directory.points().values()}[RECIPE]
    assert point["compress_steps"] == 16 and point["nonzero"] < 0.8 * point["parameters"]

    stopped = cell_of(build_config, tmp_path / "stopped")
    for stop in (13, 9 + 2, 1 + 3 + 5):  # in training, in recovery, in the step: 20, 4 and 12 steps
        calls = itertools.count(1)
        monkeypatch.setattr(interrupt, "requested", lambda calls=calls, stop=stop: next(calls) == stop)
        with pytest.raises(interrupt.Interrupted):
            work(stopped)
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    work(cell_of(build_config, tmp_path / "stopped"))
    files = sorted(calm.directory.path.glob("stages/*/*.safetensors"))
    assert len(files) >= 6
    for path in files:
        first = load_file(path)
        second = load_file(stopped.directory.path / path.relative_to(calm.directory.path))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), path


@pytest.mark.parametrize("recipe, settings, words", [
    ("distill5", {}, "'distill5' is not a method without strength"),
    ("quant8+distill", {}, "quant8 must be the last step"),
    ("distill", {"temperature": 0}, "steps.distill.temperature=0: must be greater than 0"),
    ("distill", {"alpha": 1.5}, "steps.distill.alpha=1.5: must be less than or equal to 1"),
    ("distill", {"hints": "attention"}, "steps.distill.hints='attention': must be 'none', 'hidden' or 'relations'"),
    ("distill", {"layer_map": "first"}, "steps.distill.layer_map='first': must be 'uniform' or 'last'"),
    ("distill", {"steps": 0}, "steps.distill.steps=0: must be greater than or equal to 1"),
    ("distill", {"lr_factor": 0}, "steps.distill.lr_factor=0: must be greater than 0"),
    ("distill", {"teacher": "runs/x"}, "steps.distill.teacher='runs/x': there is no such setting"),
])  # fmt: skip
def test_what_cannot_be_is_refused(recipe: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build({"recipes": [recipe], "steps": {"distill": settings}})
    assert words in str(error.value)
