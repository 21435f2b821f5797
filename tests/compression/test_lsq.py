"""Learned step sizes: the paper's equations one number at a time, and training that resumes, packs and pays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train_then_compress.compression import lsq, quant
from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Codes, Compressed, matrices
from train_then_compress.compression.lsq import LearnedSteps, Round
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.prune import prune
from train_then_compress.config import BudgetConfig, ConfigError, RobertaConfig, parse_recipe
from train_then_compress.config.steps import Lsq, Prune
from train_then_compress.records import read_rows
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training import interrupt
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.loop import Desk, Training, fit
from train_then_compress.training.schedule import schedule

MakeBench = Callable[..., Bench]
BITS = [8, 6, 4, 3, 2]
PEAK = 1e-2


@pytest.fixture
def new_bench(make_bench: MakeBench) -> MakeBench:
    """A function that gives the bench of a task in a directory, with an untrained ``teacher``."""

    def new(task: str = "mlm", place: str = "run", dropout: float = 0.0) -> Bench:
        return make_bench(task, place, model={"dropout": dropout}, optimizer={"lr": PEAK})

    return new


def trained_by(bench: Bench, bits: int, start: Compressed | None = None, **settings: Any) -> Compressed:
    (step,) = parse_recipe(f"lsq{bits}", {"lsq": settings}, bench.config.model, bench.config.task.name)
    compressed = start or Compressed(copy.deepcopy(bench.teacher))
    lsq.apply(compressed, step, bench)
    return compressed


def logits_of(bench: Bench, model: nn.Module) -> Tensor:
    (part,) = bench.task.parts(bench.task.batch(0), 0, 1, 0)
    with torch.inference_mode():
        return bench.task.logits(model.eval(), part)[: part.terms]


def by_hand(v: float, s: float, bits: int) -> tuple[float, float, float]:
    """Equations 1 to 3 and 5 for one weight: its rounded value, and that value's derivatives by weight and step."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if v / s <= lowest:
        return lowest * s, 0.0, float(lowest)
    if v / s >= highest:
        return highest * s, 0.0, float(highest)
    nearest = min(range(lowest, highest + 1), key=lambda code: abs(v / s - code))
    return nearest * s, 1.0, nearest - v / s


def some_groups(bits: int) -> tuple[Tensor, Tensor]:
    """Weights, some beyond the range, one at its end and one zero, and steps; float64."""
    torch.manual_seed(bits)
    steps = torch.tensor([[0.25], [0.0625]], dtype=torch.float64)
    groups = torch.randn(2, 40, dtype=torch.float64) * steps * 2 ** (bits - 1) * 0.8
    groups[0, :2] = torch.tensor([0.0, 0.25 * (2 ** (bits - 1) - 1)])
    return groups, steps


@pytest.mark.parametrize("bits", BITS)
def test_values_and_gradients_are_those_of_the_paper(bits: int) -> None:
    groups, steps = some_groups(bits)
    largest, size = 2 ** (bits - 1) - 1, groups.shape[1]
    scale = torch.full_like(steps, 1 / math.sqrt(size * largest))
    groups.requires_grad_(), steps.requires_grad_()
    result = Round.apply(groups, steps, scale, largest)
    into = torch.randn(2, size, dtype=torch.float64)
    result.backward(into)
    for row, (step,) in enumerate(steps.tolist()):
        expected = [by_hand(v, step, bits) for v in groups[row].tolist()]
        assert result[row].tolist() == pytest.approx([value for value, _, _ in expected], abs=1e-12)
        by_weight = [float(g) * slope for g, (_, slope, _) in zip(into[row], expected, strict=True)]
        assert groups.grad is not None and groups.grad[row].tolist() == pytest.approx(by_weight)
        by_step = sum(float(g) * slope for g, (_, _, slope) in zip(into[row], expected, strict=True))
        assert steps.grad is not None and float(steps.grad[row]) == pytest.approx(by_step / math.sqrt(size * largest))
    inside = sum(by_hand(v, 0.25, bits)[1] for v in groups[0].tolist())
    assert 0 < inside < size


@pytest.mark.parametrize("bits", BITS)
def test_where_rounding_is_smooth_finite_differences_agree(bits: int) -> None:
    """By the step the true slope is the code; straight through, a weight inside the range adds -v / s to it."""
    groups, steps = some_groups(bits)
    largest = 2 ** (bits - 1) - 1
    scaled = groups / steps
    sure = ((scaled - 0.5) - (scaled - 0.5).round()).abs() > 1e-3
    groups = torch.where(sure, groups, 0.0)
    into = torch.randn_like(groups)
    small = 1e-7

    def weighted(s: Tensor) -> Tensor:
        result: Tensor = (into * Round.apply(groups, s, torch.ones_like(s), largest)).sum(dim=1)
        return result

    slope = (weighted(steps * (1 + small)) - weighted(steps * (1 - small))) / (2 * small * steps[:, 0])
    steps.requires_grad_()
    weighted(steps).sum().backward()
    inside = (groups / steps > -largest - 1) & (groups / steps < largest)
    through = (into * inside * groups / steps).sum(dim=1)
    assert steps.grad is not None and torch.allclose(steps.grad[:, 0] + through, slope, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity, groups", [("tensor", (1, 1)), ("channel", (6, 1)), ("group", (6, 2))])
def test_steps_begin_at_twice_the_mean_magnitude(bits: int, granularity: str, groups: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6))
    weight = model[0].weight.detach().clone()
    config = Lsq(granularity=granularity, group_size=8)  # type: ignore[arg-type]
    (learned,) = lsq.learn_steps(model, {}, bits, config).values()
    cut = weight.view(groups[0], -1) if granularity == "tensor" else weight.view(6 * groups[1], -1)
    expected = [2 * sum(abs(float(v)) for v in row) / len(row) / math.sqrt(2 ** (bits - 1) - 1) for row in cut]
    assert learned.steps.tolist() == pytest.approx(expected, rel=1e-5)
    assert learned.gradient_scale.tolist() == pytest.approx([(cut.shape[1] * (2 ** (bits - 1) - 1)) ** -0.5] * len(cut))
    assert learned.steps.dim() == 1 and learned.codes(weight).scale.shape == groups


def test_pruned_weights_do_not_count_in_the_first_step() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    learned = LearnedSteps(weight, weight != 0, bits=3, size=4)
    assert learned.steps.tolist()[0] == pytest.approx(2 * 2 / math.sqrt(3))
    assert learned.gradient_scale.tolist() == pytest.approx([(2 * 3) ** -0.5, (1 * 3) ** -0.5])
    assert 0 < float(learned.codes(weight).scale[1, 0]) < 1e-4
    assert torch.equal(learned(weight)[1], torch.zeros(4))


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_rounded_weights_with_the_step_as_stored(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(12, 16)
    learned = LearnedSteps(weight, torch.ones_like(weight, dtype=torch.bool), bits, 8)
    step = learned.steps.detach().half().float().view(12, 2).repeat_interleave(8, dim=1)
    for factor in (1, 10):  # within the range, and over all of it, where the last bits of a step matter
        codes = learned.codes(factor * weight)
        scaled = (factor * weight / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(codes.dequantize(), scaled.round() * step)
        assert (codes.zero == 2 ** (bits - 1)).all()
    wide = learned.codes(100 * weight).codes  # one code further below zero than above
    assert int(wide.min()) == 0 and int(wide.max()) == 2**bits - 1
    with torch.no_grad():
        learned.steps.fill_(-1.0)
    learned.keep_positive()
    assert (learned.codes(weight).scale > 0).all() and learned.codes(weight).dequantize().isfinite().all()


@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
def test_every_use_of_a_matrix_is_rounded_and_sends_back_its_gradient(new_bench: MakeBench, task: str) -> None:
    """Against a plain model that was given the rounded weights; a tied embedding is used twice or more."""
    bench = new_bench(task)
    model, plain = copy.deepcopy(bench.teacher).eval(), copy.deepcopy(bench.teacher).eval()
    bits, largest = 3, 3
    parameters = dict(model.named_parameters())
    steps = lsq.learn_steps(model, {}, bits, Lsq(granularity="channel"))
    assert steps.keys() == matrices(plain, True).keys()
    with torch.no_grad():
        for name, weight in matrices(plain, True).items():
            size = steps[name].steps[:, None]
            weight.copy_((weight / size).clamp(-4, 3).round() * size)
    (part,) = bench.task.parts(bench.task.batch(0), 0, 1, 0)
    losses = [bench.task.loss(each, part)[0] for each in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, weight in plain.named_parameters():
        gradient = parameters[name].grad
        assert gradient is not None and weight.grad is not None
        if name not in steps:
            assert torch.allclose(gradient, weight.grad, atol=1e-6), name
            continue
        scaled = parameters[name].detach() / steps[name].steps.detach()[:, None]
        inside = (scaled > -4) & (scaled < 3)
        assert torch.allclose(gradient, weight.grad * inside, atol=1e-6), name
        slope = torch.where(inside, scaled.round() - scaled, scaled.clamp(-4, 3))
        expected = (weight.grad * slope).sum(dim=1) / math.sqrt(weight.shape[1] * largest)
        assert torch.allclose(steps[name].steps.grad, expected, atol=1e-5), name  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
def test_a_packed_file_gives_the_trained_models_logits(
    new_bench: MakeBench, tmp_path: Path, task: str, granularity: str, bits: int
) -> None:
    bench = new_bench(task)
    settings = {"granularity": granularity, "group_size": 16, "max_steps": 3}
    compressed = trained_by(bench, bits, **settings)
    names = [name for name, _ in bench.teacher.named_parameters()]
    assert [name for name, _ in compressed.model.named_parameters()] == names
    assert set(compressed.codes) == set(matrices(bench.teacher, True))
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, bench.task.new_model())  # type: ignore[attr-defined]
    assert torch.equal(logits_of(bench, back.model), logits_of(bench, compressed.model))
    assert pack(back, torch.float32, {}) == path.read_bytes()
    for name, codes in compressed.codes.items():
        assert isinstance(codes, Codes) and codes.bits == bits
        assert torch.equal(compressed.model.get_parameter(name), codes.dequantize())
        assert not torch.equal(codes.dequantize(), bench.teacher.get_parameter(name))
    unquantized = "encoder.layers.0.feed_forward.inner.bias"  # trained along
    assert not torch.equal(compressed.model.get_parameter(unquantized), bench.teacher.get_parameter(unquantized))


def test_the_rate_falls_linearly_to_zero(new_bench: MakeBench) -> None:
    bench = new_bench()
    trained_by(bench, 4, max_steps=5, lr_factor=0.5)
    rates = {row["steps"]: row["lr"] for row in read_rows(bench.run.metrics) if row["split"] == "train"}
    assert rates == pytest.approx({step: 0.5 * PEAK * (1 - (step - 0.5) / 5) for step in range(1, 6)})
    assert bench.ledger.clock.steps == 5


@pytest.mark.parametrize("embeddings", [True, False])
def test_pruned_weights_stay_zero_and_the_rest_is_trained(new_bench: MakeBench, embeddings: bool) -> None:
    bench = new_bench()
    pruned = Compressed(copy.deepcopy(bench.teacher))
    prune(pruned, 0.6, Prune())
    before = {name: parameter.detach().clone() for name, parameter in pruned.model.named_parameters()}
    compressed = trained_by(bench, 4, pruned, max_steps=4, embeddings=embeddings)
    assert ("encoder.embedding.weight" in compressed.codes) == embeddings
    for name, mask in compressed.masks.items():
        weight = compressed.model.get_parameter(name).detach()
        assert not weight[~mask].any(), name
        assert weight[mask].count_nonzero() > 0.5 * mask.sum() and not torch.equal(weight, before[name]), name
        if name in compressed.codes:
            assert torch.equal(weight, compressed.codes[name].dequantize())


@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
def test_interrupted_in_the_middle_it_ends_in_the_same_weights(
    new_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    undisturbed = trained_by(new_bench(task, "undisturbed", dropout=0.1), 3, max_steps=12)
    bench, calls = new_bench(task, "stopped", dropout=0.1), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "requested", lambda: next(calls) == 6)
        with pytest.raises(interrupt.Interrupted, match="stopped at step 7"):
            trained_by(bench, 3, max_steps=12)
    resumed = trained_by(bench, 3, max_steps=12)
    for name, parameter in undisturbed.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    assert pack(undisturbed, torch.float32, {}) == pack(resumed, torch.float32, {})
    rows = [(row["split"], row["steps"]) for row in read_rows(bench.run.metrics)]
    assert len(rows) == len(set(rows)) and bench.ledger.clock.steps == 12


def test_at_two_bits_training_beats_rounding(new_bench: MakeBench, tmp_path: Path) -> None:
    bench = new_bench("classification")
    config, model = bench.config, bench.teacher
    training = Training(
        BudgetConfig(kind="steps", value=250), config.optimizer, schedule(config.optimizer), [1.0], config.seed
    )
    with StageProgress("pretrain") as display:
        checkpoints = Checkpoints(tmp_path / "dense", 1e9)
        fit(model, bench.task, training, Desk("pretrain", config.runtime, checkpoints, bench.metrics, display))

    def loss(model: nn.Module) -> float:
        return bench.task.evaluate(model, "test").facts["loss"]

    rounded = Compressed(copy.deepcopy(model))
    (step,) = parse_recipe("quant2", {"quant": {"granularity": "tensor"}}, config.model)
    quant.apply(rounded, step, bench)
    trained = trained_by(bench, 2, granularity="tensor", max_steps=60)
    dense, nearest, learned = loss(model), loss(rounded.model), loss(trained.model)
    assert dense + 1 < nearest  # there is something to win
    assert learned < nearest - 0.5 * (nearest - dense)


@pytest.mark.parametrize(
    "recipe, settings, words",
    [
        ("lsq5", {}, "recipes: lsq5: bits must be one of 8, 6, 4, 3, 2"),
        ("lsq1", {}, "recipes: lsq1: bits must be one of 8, 6, 4, 3, 2"),
        ("lsq", {}, "'lsq' is not a method and a strength"),
        ("lsq4+quant4", {}, "lsq4 must be the last step"),
        ("lsq4", {"group_size": 24}, "steps.lsq.group_size=24: must divide the matrices' inputs (model.width=32"),
        ("lsq4", {"group_size": 1}, "steps.lsq.group_size=1: must be greater than or equal to 2"),
        ("lsq4", {"granularity": "row"}, "steps.lsq.granularity='row': must be 'tensor', 'channel' or 'group'"),
        ("lsq4", {"max_steps": 0}, "steps.lsq.max_steps=0: must be greater than or equal to 1"),
        ("lsq4", {"lr_factor": 0}, "steps.lsq.lr_factor=0: must be greater than 0"),
        ("lsq4", {"lr_factor": 11}, "steps.lsq.lr_factor=11: must be less than or equal to 10"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe, {"lsq": settings}, RobertaConfig(depth=1, width=32, head_size=16))
    assert words in str(error.value)
