"""GPTQ against optimal brain quantization row by row, least squares, and round to nearest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.calibration import blocks, second_moments
from train_then_compress.compression.compressed import Codes, Compressed, matrices
from train_then_compress.compression.gptq import apply, gptq
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.prune import prune
from train_then_compress.compression.quant import quantize
from train_then_compress.config import Config, ConfigError, parse_recipe
from train_then_compress.config.steps import Gptq, Prune
from train_then_compress.data.prepare import PAD
from train_then_compress.records import RunDirectory, StageKey
from train_then_compress.tasks import RunTask

BITS = [8, 6, 4, 3, 2]
DAMPING = 0.01


def layer(rows: int = 6, columns: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight float32 [rows, columns] and correlated inputs float64 [500, columns] of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns // 2, columns, generator=generator) * torch.logspace(-1, 1, columns)
    mixing = mixing[:, torch.randperm(columns, generator=generator)]
    inputs = torch.randn(500, columns // 2, generator=generator) @ mixing
    return weight, (inputs + 0.3 * torch.randn(500, columns, generator=generator)).double()


def moment_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


class Row:
    """One row's grid: rounds a weight of a column to the nearest value, or to zero where it is pruned."""

    def __init__(self, codes: Codes, row: int, largest: int, kept: np.ndarray):
        columns, groups = codes.codes.shape[1], codes.scale.shape[1]
        group = np.arange(columns) // -(-columns // groups)
        self.scale, self.zero = codes.scale[row].float().numpy()[group], codes.zero[row].float().numpy()[group]
        self.largest, self.kept = largest, kept

    def code(self, weight: float, column: int) -> int:
        if not self.kept[column]:
            return int(self.zero[column])
        nearest = np.round(np.float32(weight) / self.scale[column] + self.zero[column])
        return int(np.clip(nearest, 0, self.largest))

    def value(self, code: int, column: int) -> float:
        return float((code - self.zero[column]) * self.scale[column])


def brain_quantization(weight: np.ndarray, hessian: np.ndarray, order: list[int], grid: Row) -> list[int]:
    """Frantar et al. 2023, equations 2 and 3, in a fixed order: the inverse Hessian of what is left, step by step."""
    weight, inverse, codes = weight.copy(), np.linalg.inv(hessian), [0] * len(weight)
    for q in order:
        codes[q] = grid.code(weight[q], q)
        error = (weight[q] - grid.value(codes[q], q)) / inverse[q, q]
        weight = weight - error * inverse[:, q]
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


def least_squares(weight: np.ndarray, hessian: np.ndarray, order: list[int], grid: Row) -> list[int]:
    """The weights left are always those with the least error of the output, given the values rounded so far."""
    codes, change = [0] * len(weight), np.zeros_like(weight)
    for place, q in enumerate(order):
        done, left = order[:place], order[place:]
        best = -np.linalg.solve(hessian[np.ix_(left, left)], hessian[np.ix_(left, done)] @ change[done])
        codes[q] = grid.code(weight[q] + best[0], q)
        change[q] = grid.value(codes[q], q) - weight[q]
    return codes


@pytest.mark.parametrize("reference", [brain_quantization, least_squares])
@pytest.mark.parametrize("sparsity", [0, 0.4])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity, bits", [("channel", 4), ("channel", 2), ("group", 8), ("group", 6), ("group", 3)]
)
def test_codes_are_those_of_slow_textbook_algorithms(
    granularity: str, bits: int, symmetric: bool, activation_order: bool, sparsity: float, reference: Callable[..., Any]
) -> None:
    weight, inputs = layer(seed=bits)
    inputs[:, [3, 10]] = 0
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(bits)) >= sparsity
    weight *= mask
    chosen: dict[str, Any] = {"granularity": granularity, "symmetric": symmetric, "activation_order": activation_order}
    config = Gptq(group_size=8, **chosen)
    codes = gptq(weight, moment_of(inputs), bits, config, mask if sparsity else None)
    nearest = quantize(weight, bits, config)
    assert torch.equal(codes.scale, nearest.scale) and torch.equal(codes.zero, nearest.zero) and codes.bits == bits
    moment = moment_of(inputs).numpy()
    size = np.diag(moment)
    order = np.argsort(-size, kind="stable").tolist() if activation_order else list(range(len(size)))
    hessian = 2 * (moment + DAMPING * size.mean() * np.eye(len(size)))
    largest = 2**bits - 2 if symmetric else 2**bits - 1
    for row, values in enumerate(weight.double().numpy()):
        grid = Row(nearest, row, largest, mask[row].numpy())
        assert codes.codes[row].tolist() == reference(values, hessian, order, grid)
    assert not codes.dequantize()[~mask].any()
    assert not torch.equal(codes.codes, nearest.codes)


@pytest.mark.parametrize("columns", [128, 129, 300])
@pytest.mark.parametrize("activation_order", [False, True])
def test_blocks_of_columns_change_nothing(columns: int, activation_order: bool) -> None:
    weight, inputs = layer(3, columns)
    config = Gptq(granularity="channel", activation_order=activation_order)
    moment = moment_of(inputs)
    codes = gptq(weight, moment, 4, config)
    size = moment.diagonal().numpy()
    order = np.argsort(-size, kind="stable").tolist() if activation_order else list(range(columns))
    hessian = moment.numpy() + DAMPING * size.mean() * np.eye(columns)
    for row, values in enumerate(weight.double().numpy()):
        grid = Row(codes, row, 14, np.ones(columns, dtype=bool))
        assert codes.codes[row].tolist() == brain_quantization(values, hessian, order, grid)


def test_groups_that_do_not_divide_the_columns_are_as_even_as_can_be() -> None:
    weight, inputs = layer(4, 20)
    codes, moment = gptq(weight, moment_of(inputs), 4, Gptq(group_size=8)), moment_of(inputs).numpy()
    assert codes.scale.shape == (4, 3)
    alone = [quantize(part, 4, Gptq(granularity="channel")).scale for part in weight.split([7, 7, 6], dim=1)]
    assert torch.equal(codes.scale, torch.cat(alone, dim=1))
    hessian = moment + DAMPING * np.diag(moment).mean() * np.eye(20)
    for row, values in enumerate(weight.double().numpy()):
        grid = Row(codes, row, 14, np.ones(20, dtype=bool))
        assert codes.codes[row].tolist() == brain_quantization(values, hessian, list(range(20)), grid)


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 3])
def test_the_outputs_error_is_below_that_of_rounding_to_nearest(
    bits: int, symmetric: bool, activation_order: bool, sparsity: float
) -> None:
    weight, inputs = layer(32, 96)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) >= sparsity
    weight *= mask
    config = Gptq(symmetric=symmetric, activation_order=activation_order)

    def error(codes: Codes) -> float:
        return float((inputs @ (codes.dequantize().double() - weight).T).norm())

    found, nearest = gptq(weight, moment_of(inputs), bits, config, mask), quantize(weight, bits, config)
    assert error(found) < (0.95 if sparsity else 0.8) * error(nearest)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_without_correlation_it_is_rounding_to_nearest(
    bits: int, symmetric: bool, granularity: str, activation_order: bool
) -> None:
    """Uncorrelated inputs of one size, of different sizes, and inputs that are always zero."""
    weight, _ = layer(16, 160)
    chosen: dict[str, Any] = {"granularity": granularity, "symmetric": symmetric, "activation_order": activation_order}
    config = Gptq(**chosen)
    sizes = torch.rand(160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for moment in (torch.eye(160).double(), 7 * torch.eye(160).double(), sizes.diag(), torch.zeros(160, 160).double()):
        codes, nearest = gptq(weight, moment, bits, config), quantize(weight, bits, config)
        assert torch.equal(codes.codes, nearest.codes) and torch.equal(codes.dequantize(), nearest.dequantize())


def test_an_input_that_was_always_zero_is_rounded_to_nearest() -> None:
    weight, inputs = layer()
    inputs[:, [0, 7, 23]] = 0
    codes, nearest = gptq(weight, moment_of(inputs), 3, Gptq(group_size=8)), quantize(weight, 3, Gptq(group_size=8))
    assert torch.equal(codes.codes[:, [0, 7, 23]], nearest.codes[:, [0, 7, 23]])
    assert not torch.equal(codes.codes, nearest.codes)


def test_fewer_inputs_than_columns_are_enough() -> None:
    weight, inputs = layer()
    codes = gptq(weight, moment_of(inputs[:5]), 4, Gptq(granularity="channel"))
    few = inputs[:5] @ (codes.dequantize().double() - weight).T
    nearest = inputs[:5] @ (quantize(weight, 4, Gptq(granularity="channel")).dequantize().double() - weight).T
    assert few.norm() < nearest.norm()


def test_layers_of_a_block_are_done_together() -> None:
    parts = ["encoder.layers.0.a", "encoder.layers.0.b", "encoder.layers.10.a", "head", "projection"]
    names = [f"{part}.weight" for part in parts]
    assert blocks(names) == [names[:2], names[2:3], names[3:4], names[4:]]


# Whole models.

#: By task, the blocks of a model and the number of their linear layers.
BLOCKS = {
    "mlm": {"encoder.layers.0.": 4, "encoder.layers.1.": 4, "head.": 1},
    "translation": {"encoder.layers.0.": 4, "decoder.layers.0.": 7},
}


def bench_of(task: RunTask, directory: Path) -> Bench:
    key = StageKey("gptq", "0123456789abcdef")
    return Bench(task, task.config, RunDirectory(directory), None, 0.0, nn.Module(), key)  # type: ignore[arg-type]


def run_gptq(compressed: Compressed, bench: Bench, recipe: str = "gptq4", **settings: Any) -> Gptq:
    """Apply a step to a model in place; its settings."""
    (step,) = parse_recipe(recipe, {"gptq": {"calibration_batches": 3} | settings}, bench.config.model)
    apply(compressed, step, bench)
    assert isinstance(step.config, Gptq)
    return step.config


@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_is_calibrated_behind_the_quantized_ones_before_it(
    build_task: Callable[..., RunTask], tmp_path: Path, name: str
) -> None:
    task = build_task(name)
    dense = task.new_model()
    compressed, bench = Compressed(copy.deepcopy(dense)), bench_of(task, tmp_path)
    config = run_gptq(compressed, bench)
    parts = list(bench_of(task, tmp_path).calibration(3))
    model, done = copy.deepcopy(dense), dict(compressed.model.named_parameters())
    mixed = dict(model.named_parameters())
    table = "embedding.weight" if name == "translation" else "encoder.embedding.weight"
    mixed[table].data.copy_(quantize(dense.get_parameter(table).detach(), 4, config).dequantize())
    for block, count in BLOCKS[name].items():
        names = [name for name in compressed.codes if name.startswith(block)]
        moments = second_moments(model, task, parts)
        assert len(names) == count
        for name in names:
            expected = gptq(mixed[name].detach(), moments[name], 4, config)
            assert torch.equal(compressed.codes[name].codes, expected.codes), name
        for name in names:
            mixed[name].data.copy_(done[name])


@pytest.mark.parametrize("embeddings", [True, False])
def test_embeddings_are_rounded_to_nearest_by_choice(
    embeddings: bool, build_task: Callable[..., RunTask], tmp_path: Path
) -> None:
    task = build_task("mlm")
    compressed = Compressed(task.new_model())
    before = {name: parameter.detach().clone() for name, parameter in compressed.model.named_parameters()}
    config = run_gptq(compressed, bench_of(task, tmp_path), "gptq3", embeddings=embeddings)
    assert set(compressed.codes) == set(matrices(compressed.model, embeddings))
    for name, parameter in compressed.model.named_parameters():
        if name not in compressed.codes:
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, compressed.codes[name].dequantize()) and compressed.codes[name].bits == 3
    if embeddings:
        name = "encoder.embedding.weight"
        assert torch.equal(compressed.codes[name].codes, quantize(before[name], 3, config).codes)


def test_a_layer_that_no_text_reaches_is_rounded_to_nearest(build_task: Callable[..., RunTask], tmp_path: Path) -> None:
    task = build_task("mlm")
    model = task.new_model()
    model.never_used = nn.Linear(32, 4)
    weight = model.never_used.weight.detach().clone()
    compressed = Compressed(model)
    config = run_gptq(compressed, bench_of(task, tmp_path))
    assert torch.equal(compressed.codes["never_used.weight"].codes, quantize(weight, 4, config).codes)


@pytest.mark.parametrize("name", ["mlm", "classification", "translation"])
@pytest.mark.parametrize("batches", [1, 3])
def test_calibration_tokens_stand_in_the_ledger(
    batches: int, name: str, build_task: Callable[..., RunTask], tmp_path: Path
) -> None:
    task = build_task(name)
    bench = bench_of(task, tmp_path)
    run_gptq(Compressed(task.new_model()), bench, calibration_batches=batches)
    drawn = [task.with_seed(bench.seed).batch(step) for step in range(batches)]
    texts = [
        text for batch in drawn for text in ((batch.source, batch.target) if name == "translation" else (batch.tokens,))
    ]
    assert bench.ledger.calibration_tokens == sum(int((text != PAD).sum()) for text in texts) > 0


@pytest.mark.parametrize("name", ["mlm", "classification", "translation"])
@pytest.mark.parametrize("sparsity", [0, 0.6])
@pytest.mark.parametrize("settings", [{}, {"symmetric": False, "granularity": "channel", "activation_order": True}])
def test_a_packed_file_gives_the_same_model_back_and_pruned_weights_stay_zero(
    settings: dict[str, Any], sparsity: float, name: str, build_task: Callable[..., RunTask], tmp_path: Path
) -> None:
    task = build_task(name)
    compressed, again = Compressed(task.new_model()), Compressed(task.new_model())
    for one in (compressed, again):
        if sparsity:
            prune(one, sparsity, Prune())
        run_gptq(one, bench_of(task, tmp_path), **settings)
    for weight, codes in compressed.codes.items():
        assert torch.equal(codes.codes, again.codes[weight].codes)
        if sparsity:
            assert not codes.dequantize()[~compressed.masks[weight]].any()
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    fresh = task.with_seed(7).new_model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    back = unpack(path, fresh)
    part = next(task.parts(task.batch(0), 0, 1, 0))
    with torch.inference_mode():
        assert torch.equal(task.logits(back.model.eval(), part), task.logits(compressed.model.eval(), part))
    assert set(back.codes) == set(matrices(compressed.model, True))
    assert pack(back, torch.float32, {}) == path.read_bytes()


@pytest.mark.parametrize(
    "recipe, settings, words",
    [
        ("gptq5", {}, "recipes: gptq5: bits must be one of 8, 6, 4, 3, 2"),
        ("gptq", {}, "'gptq' is not a method and a strength"),
        ("gptq4", {"granularity": "tensor"}, "steps.gptq.granularity='tensor': must be 'channel' or 'group'"),
        ("gptq4", {"calibration_batches": 0}, "steps.gptq.calibration_batches=0: must be greater than or equal"),
        ("gptq4", {"damping": 0}, "steps.gptq.damping=0: must be greater than or equal to 0.000001"),
        ("gptq4", {"damping": 1.5}, "steps.gptq.damping=1.5: must be less than or equal to 1"),
        ("gptq4", {"group_size": 48}, "steps.gptq.group_size=48: must divide the matrices' inputs (model.width=64"),
        ("gptq4", {"bits": 4}, "steps.gptq.bits=4: there is no such setting"),
        ("gptq4+prune60", {}, "gptq4 must be the last step"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(recipe: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build({"recipes": [recipe], "model": {"width": 64}, "steps": {"gptq": settings}})
    assert words in str(error.value)
