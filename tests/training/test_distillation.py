"""The distillation loss against its formula and torch's, what it adds up to, and what a student makes of it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.config import Config, Teaching
from train_then_compress.data.prepare import PAD
from train_then_compress.tasks import RunTask, TranslationTask
from train_then_compress.tasks.classification import Part
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training import interrupt
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.distillation import Distillation
from train_then_compress.training.loop import Desk, Training, fit
from train_then_compress.training.schedule import linear_to_zero
from train_then_compress.training.task import Task


@pytest.fixture(params=["mlm", "classification", "translation"])
def task(request: pytest.FixtureRequest, build_task: Callable[..., RunTask]) -> RunTask:
    return build_task(request.param, model={"depth": 1, "dropout": 0.0})


def teacher_of(task: RunTask, dropout: float = 0.0) -> nn.Module:
    shape = dataclasses.replace(task.config.model, depth=2, width=48, dropout=dropout)
    return task.model_of(task.config.changed(model=shape))


def models_of(task: RunTask) -> tuple[nn.Module, nn.Module]:
    """A student and a deeper, wider teacher, both far from initialization; neither with dropout."""
    student = task.new_model()
    torch.manual_seed(1)
    teacher = teacher_of(task)
    with torch.no_grad():
        for parameter in [*student.parameters(), *teacher.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student.eval(), teacher


def part_of(task: Task, step: int = 0) -> Any:
    (part,) = task.parts(task.batch(step), 0, 1, 0)
    return part


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.3), (2.0, 0.5), (5.0, 1.0)])
def test_loss_and_gradients_are_the_formulas(task: RunTask, temperature: float, alpha: float) -> None:
    student, teacher = models_of(task)
    part = part_of(task)
    distillation = Distillation(task, teacher, student, Teaching(temperature=temperature, alpha=alpha), 0)
    loss, terms = distillation.loss(student, part)
    mine, its = (task.logits(model, part)[:terms] for model in (student, teacher.eval()))
    softened = nn.KLDivLoss(reduction="sum")(
        F.log_softmax(mine / temperature, dim=1), F.softmax(its.detach() / temperature, dim=1)
    )
    task_loss, task_terms = task.loss(student, part)
    expected = alpha * temperature**2 * softened + (1 - alpha) * task_loss
    assert terms == task_terms and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, wanted in zip(gradients(loss, student), gradients(expected, student), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_left_as_it_is_and_has_no_dropout(task: RunTask) -> None:
    student, teacher = models_of(task)
    noisy = teacher_of(task, dropout=0.5)
    noisy.load_state_dict(teacher.state_dict())
    part = part_of(task)
    losses = []
    for model in (teacher.eval(), noisy.train()):
        loss, _ = Distillation(task, model, student, Teaching(hints="hidden"), 0).loss(student, part)
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert losses[0] == losses[1] and noisy.training and not teacher.training


def test_without_its_share_nothing_but_the_task_is_left(task: RunTask) -> None:
    student, teacher = models_of(task)
    part = part_of(task)
    loss, terms = Distillation(task, teacher, student, Teaching(alpha=0), 0).loss(student, part)
    expected, task_terms = task.loss(student, part)
    assert terms == task_terms and torch.equal(loss, expected)
    pairs = zip(gradients(loss, student), gradients(expected, student), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)


def test_at_a_high_temperature_logits_are_matched(task: RunTask) -> None:
    """T^2 KL -> half the mean square of the logits' differences, each row's mean taken off (Hinton, section 2.1)."""
    student, teacher = models_of(task)
    part = part_of(task)
    loss, terms = Distillation(task, teacher, student, Teaching(temperature=100, alpha=1), 0).loss(student, part)
    mine, its = (task.logits(model.eval(), part)[:terms].double() for model in (student, teacher))
    difference = mine - its
    difference = difference - difference.mean(dim=1, keepdim=True)
    assert loss.item() == pytest.approx(0.5 * difference.square().mean(dim=1).sum().item(), rel=0.05)


@pytest.mark.parametrize("hints", ["none", "hidden", "relations"])
def test_pieces_add_up_to_the_batch(task: RunTask, hints: Any) -> None:
    student, teacher = models_of(task)
    distillation = Distillation(task, teacher, student, Teaching(hints=hints), 0)
    batch = distillation.batch(0)
    whole = [distillation.loss(student, part) for part in distillation.parts(batch, 0, 1, 0)]
    pieces = [distillation.loss(student, part) for rank in (0, 1) for part in distillation.parts(batch, rank, 2, 2)]
    assert len(whole) == 1 and len(pieces) >= 4 and sum(terms for _, terms in pieces) == whole[0][1]
    assert sum(loss.item() for loss, _ in pieces) == pytest.approx(whole[0][0].item(), rel=1e-5)


def test_each_sequence_has_its_own_predictions(task: RunTask) -> None:
    batch = task.batch(0)
    for part in task.parts(batch, 0, 1, 4):
        assert len(part.terms_each) == len(part.tokens) <= 4 and int(part.terms_each.sum()) == part.terms
        if isinstance(task, TranslationTask):
            assert torch.equal(part.terms_each, (part.target != PAD).sum(dim=1))
    if isinstance(task, MaskedLMTask):
        each = torch.cat([part.terms_each for part in task.parts(batch, 0, 1, 4)])
        assert each.tolist() == batch.masked.sum(axis=1).tolist()


@pytest.mark.parametrize("hints", ["hidden", "relations"])
@pytest.mark.parametrize("task", ["classification"], indirect=True)
def test_padding_does_not_count(task: RunTask, hints: Any) -> None:
    student, teacher = models_of(task)
    distillation = Distillation(task, teacher, student, Teaching(hints=hints), 0)
    tokens = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    tokens[1, 6:] = PAD
    labels = torch.tensor([0, 1, 2])
    wide = torch.cat([tokens, torch.full((3, 8), PAD)], dim=1)
    losses = [distillation.loss(student, Part(given, labels))[0].item() for given in (tokens, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "translation"], indirect=True)
@pytest.mark.parametrize("hints", ["none", "hidden"])
def test_counts_are_the_students_step_and_the_teachers_forward_pass(task: RunTask, hints: Any) -> None:
    """FLOPs by torch's own counter."""
    student, teacher = models_of(task)
    distillation = Distillation(task, teacher.eval(), student, Teaching(hints=hints), 0)
    batch: Any = task.batch(0)
    positions, given = batch.tokens.size, [torch.from_numpy(batch.tokens)]
    if isinstance(task, TranslationTask):
        positions += batch.target.size
        given += [torch.from_numpy(batch.target), torch.from_numpy((batch.labels != PAD).flatten().nonzero()[0])]
    passes = []
    for model in (student, teacher):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*given)
        passes.append(counter.get_total_flops())
    projections = 3 * 2 * 32 * 48 * 2 * positions if hints == "hidden" else 0
    counts = distillation.counts(batch)
    assert counts.flops == 3 * passes[0] + passes[1] + projections
    assert counts.tokens == task.counts(batch).tokens


def test_a_student_with_another_seed_sees_other_batches(task: RunTask) -> None:
    student, teacher = models_of(task)
    distillation = Distillation(task, teacher, student, Teaching(), 0)
    first, other = distillation.batch(0), distillation.with_seed(5).batch(0)
    assert (first.tokens == task.batch(0).tokens).all() and first.tokens.tolist() != other.tokens.tolist()


def train(task: Task, model: nn.Module, directory: Path, steps: int, dtype: str = "fp32", lr: float = 5e-3) -> None:
    config = Config.build({"budget": {"kind": "steps", "value": steps}, "runtime": {"dtype": dtype, "threads": 1},
                           "optimizer": {"lr": lr, "warmup": 0.0}})  # fmt: skip
    training = Training(config.budget, config.optimizer, linear_to_zero(lr), [1.0], seed=3)
    with StageProgress("distill") as display:
        checkpoints = Checkpoints(directory / "checkpoint", 1e9)
        fit(model, task, training, Desk("distill-test", config.runtime, checkpoints,
                                        MetricsLog(directory / "metrics.jsonl"), display))  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_projections_are_trained_resumed_and_not_kept(
    task: RunTask, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted and resumed, student and projections end bit for bit where the undisturbed ones do."""
    student, teacher = models_of(task)
    names = set(student.state_dict())

    def taught(place: str, stop: int = 0) -> list[Tensor]:
        model = copy.deepcopy(student).train()
        distillation = Distillation(task, teacher, model, Teaching(hints="hidden"), 0)
        drawn = distillation.projections["hidden"].detach().clone()
        calls = itertools.count(1)
        monkeypatch.setattr(interrupt, "requested", lambda: next(calls) == stop)
        with distillation.lending(model):
            assert set(model.state_dict()) == names | {"hints.embedding", "hints.hidden"}
            train(distillation, model, tmp_path / place, 9, dtype)
        assert set(model.state_dict()) == names and not torch.equal(drawn, distillation.projections["hidden"])
        return [*model.state_dict().values(), *distillation.projections.values()]

    calm = taught("calm")
    with pytest.raises(interrupt.Interrupted, match="step 4"):
        taught("stopped", 4)
    resumed = taught("stopped")
    assert all(torch.equal(first, second) for first, second in zip(calm, resumed, strict=True))


def divergence(task: RunTask, student: nn.Module, teacher: nn.Module) -> float:
    """Mean KL of the predictions on batches that neither was trained on."""
    total, count = 0.0, 0
    other = task.with_seed(99)
    with torch.no_grad():
        for step in range(4):
            part = part_of(other, step)
            logits = (task.logits(model.eval(), part)[: part.terms] for model in (student, teacher))
            ours, its = (rows.log_softmax(dim=1) for rows in logits)
            total += float((its.exp() * (its - ours)).sum())
            count += part.terms
    return total / count


@pytest.mark.parametrize("hints", ["none", "relations"])
def test_a_taught_student_predicts_as_its_teacher_does(task: RunTask, tmp_path: Path, hints: Any) -> None:
    """The teacher has notions of its own: the same steps without it leave the student far from them."""
    student, teacher = models_of(task)
    alone = copy.deepcopy(student).train()
    train(task, alone, tmp_path / "alone", 60)
    distillation = Distillation(task, teacher, student, Teaching(alpha=1.0, temperature=1.0, hints=hints), 0)
    taught = student.train()
    with distillation.lending(taught):
        train(distillation, taught, tmp_path / "taught", 60)
    assert divergence(task, taught, teacher) < 0.25 * divergence(task, alone, teacher)


def test_it_is_judged_at_the_task(task: RunTask) -> None:
    student, teacher = models_of(task)
    distillation = Distillation(task, teacher, student, Teaching(), 0)
    assert distillation.evaluate(student, "valid") == task.evaluate(student, "valid")
    part = part_of(task)
    assert torch.equal(distillation.logits(student, part), task.logits(student, part))
