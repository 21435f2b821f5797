"""Wanda against brute force in numpy, and whole stages of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as reference

from train_then_compress.compression.calibration import blocks
from train_then_compress.compression.compressed import Compressed, matrices
from train_then_compress.compression.masks import masks_of
from train_then_compress.compression.wanda import prune_by_inputs
from train_then_compress.config import Config, ConfigError


class Toy(nn.Module):
    """Two layers, each of two linear layers, and a head: x -> x + outer(relu(inner(x))), twice, -> head."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"inner": nn.Linear(width, 2 * width), "outer": nn.Linear(2 * width, width)})
            for _ in range(2)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["outer"](layer["inner"](x).relu())  # type: ignore[index]
        return self.head(x)  # type: ignore[no-any-return]


def bench_for(pieces: list[tuple[Tensor, int]]) -> Any:
    """Gives pieces of batches: inputs [rows, width], and how many rows are real."""
    parts = [SimpleNamespace(inputs=inputs, terms=terms) for inputs, terms in pieces]
    task = SimpleNamespace(logits=lambda model, part: model(part.inputs))
    return SimpleNamespace(calibration=lambda batches: iter(parts[:batches]), task=task)


def pieces_of(width: int, scale: float = 1.0) -> list[tuple[Tensor, int]]:
    """Inputs whose columns differ in size; the last two rows only fill up."""
    sizes = torch.logspace(-scale, scale, width)
    return [(torch.cat([torch.randn(5, width) * sizes, torch.full((2, width), 1e6)]), 5) for _ in range(3)]


def brute_mask(weight: np.ndarray, inputs: np.ndarray, pruned: int, group: int) -> np.ndarray:
    """Equation 1 and a sort within each group of a row, number by number."""
    mask = np.ones(weight.shape, dtype=bool)
    for i in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            places = range(first, first + group)
            score = {j: abs(float(weight[i, j])) * np.sqrt(sum(float(x) ** 2 for x in inputs[:, j])) for j in places}
            for j in sorted(places, key=lambda j: score[j])[:pruned]:
                mask[i, j] = False
    return mask


@pytest.mark.parametrize("scope", ["row", "four"])
def test_masks_are_those_of_brute_force_block_after_block(scope: Any) -> None:
    """In numpy: what goes into each block, given the pruned blocks before it; inside a block nothing is pruned yet."""
    torch.manual_seed(1)
    model = Toy()
    pieces = pieces_of(8)
    dense = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    compressed = Compressed(model)
    prune_by_inputs(compressed, bench_for(pieces), 3, 0.5, scope)

    def linear(name: str, x: np.ndarray, mask: np.ndarray | float = 1.0) -> np.ndarray:
        return x @ (dense[f"{name}.weight"] * mask).T + dense[f"{name}.bias"]

    def mask_of(name: str, x: np.ndarray) -> np.ndarray:
        weight, columns = dense[f"{name}.weight"], x.shape[1]
        expected = brute_mask(weight, x, *((columns // 2, columns) if scope == "row" else (2, 4)))
        assert np.array_equal(compressed.masks[f"{name}.weight"].numpy(), expected), name
        return expected

    x = np.concatenate([inputs[:terms].numpy() for inputs, terms in pieces])
    for number in range(2):
        inner, outer = f"layers.{number}.inner", f"layers.{number}.outer"
        first = mask_of(inner, x)
        second = mask_of(outer, np.maximum(linear(inner, x), 0))
        x = x + linear(outer, np.maximum(linear(inner, x, first), 0), second)
    mask_of("head", x)
    assert all(not weight[~compressed.masks[name]].any() for name, weight in matrices(model, False).items())


def test_magnitude_alone_would_prune_other_weights() -> None:
    torch.manual_seed(1)
    model = Toy()
    plain = masks_of({name: weight.detach().abs() for name, weight in matrices(model, False).items()}, 0.5, "row")
    compressed = Compressed(model)
    prune_by_inputs(compressed, bench_for(pieces_of(8)), 3, 0.5, "row")
    assert not torch.equal(compressed.masks["layers.0.inner.weight"], plain["layers.0.inner.weight"])


@given(st.integers(0, 999), st.integers(1, 99))
def test_with_equal_norms_it_is_magnitude_row_by_row(seed: int, percent: int) -> None:
    """torch's own magnitude pruning of each row as a layer of one output."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 5))
    weight = model[0].weight.detach().clone()
    signs = torch.randint(0, 2, (6, 12)) * 2.0 - 1
    compressed = Compressed(model)
    prune_by_inputs(compressed, bench_for([(signs, 6)]), 1, percent / 100, "row")
    for row, mask in zip(weight, compressed.masks["0.weight"], strict=True):
        single = nn.Linear(12, 1)
        single.weight.data.copy_(row)
        reference.l1_unstructured(single, "weight", percent / 100)
        assert torch.equal(single.weight_mask[0].bool(), mask)


def test_scores_are_those_that_torchs_pruning_is_given() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 1))
    expected, inputs = copy.deepcopy(model), torch.randn(6, 12) * torch.logspace(-1, 1, 12)
    scores = expected[0].weight.detach().abs() * inputs.norm(dim=0)
    reference.l1_unstructured(expected[0], "weight", 0.5, importance_scores=scores)
    compressed = Compressed(model)
    prune_by_inputs(compressed, bench_for([(inputs, 6)]), 1, 0.5, "row")
    assert torch.equal(compressed.masks["0.weight"], expected[0].weight_mask.bool())


def test_a_layer_that_nothing_reaches_is_pruned_by_magnitude() -> None:
    torch.manual_seed(3)
    model = Toy()
    model.add_module("spare", nn.Linear(8, 4))
    expected = masks_of({"a": model.get_parameter("spare.weight").detach().abs()}, 0.5, "row")["a"]
    compressed = Compressed(model)
    prune_by_inputs(compressed, bench_for(pieces_of(8)), 1, 0.5, "row")
    assert torch.equal(compressed.masks["spare.weight"], expected)


def test_the_weights_of_one_transformer_layer_are_pruned_at_once(stand: Callable[..., Any]) -> None:
    names = matrices(stand("none", "classification").model, False)
    found = blocks(names)
    layer = [name for name in names if name.startswith("encoder.layers.0.")]
    assert found == [layer, ["head.weight"], ["projection.weight"]] and len(layer) == 4


@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_stage_prunes_rows_alike_and_recovery_keeps_the_zeros(
    stand: Callable[..., Any], tmp_path: Path, task: str, embeddings: bool, steps: int
) -> None:
    wanda = {"calibration_batches": 2, "embeddings": embeddings, "recovery": {"max_steps": steps}}
    place = stand("wanda37", task, wanda=wanda)
    compressed = place.compress()
    linear = matrices(compressed.model, False)
    for name, weight in linear.items():
        zeros = (weight == 0).sum(dim=1)
        assert (zeros == round(0.37 * weight.shape[1])).all()
        assert torch.equal(weight != 0, compressed.masks[name])
    (name,) = set(matrices(compressed.model, True)) - set(linear)
    table = compressed.model.get_parameter(name)
    assert set(compressed.masks) - set(linear) == ({name} if embeddings else set())
    if embeddings:
        gone, kept = (place.model.get_parameter(name)[part] for part in (table == 0, table != 0))
        assert gone.numel() == round(0.37 * table.numel()) and gone.abs().max() <= kept.abs().min()
    record = place.bench.run.stage_record(place.stages[-1])
    task_ = place.task.with_seed(int(place.stages[-1].id[:7], 16))
    assert record["calibration_tokens"] == sum(task_.counts(task_.batch(n)).tokens for n in range(2))
    assert record["clock"]["steps"] == steps
    place.assert_comes_back(compressed, tmp_path)


@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
def test_pruned_before_and_quantized_after_zeros_stay(stand: Callable[..., Any], tmp_path: Path, task: str) -> None:
    still = {"recovery": {"max_steps": 0}}
    steps = {"prune": still | {"increment": 30}, "wanda": still, "quant": {"group_size": 16}}
    pruned = stand("prune30", task, "first", **steps).compress()
    place = stand("prune30+wanda50+quant4", task, **steps)
    compressed = place.compress()
    weights = matrices(compressed.model, True)
    assert set(weights) == set(compressed.masks) == set(compressed.codes)
    for name, weight in weights.items():
        assert not weight[~compressed.masks[name]].any() and not weight[~pruned.masks[name]].any()
        assert torch.equal(weight, compressed.codes[name].dequantize() * compressed.masks[name])
        zeros = (~compressed.masks[name]).sum(dim=1)
        if "embedding" not in name:  # a row that had more zeros before has them now
            most = torch.maximum(torch.tensor(weight.shape[1] // 2), (~pruned.masks[name]).sum(dim=1))
            assert torch.equal(zeros, most)
    place.assert_comes_back(compressed, tmp_path)


@pytest.mark.parametrize(
    "recipe, wanda, words",
    [
        ("wanda100", {}, "recipes: pruning 100 %: must lie between 1 and 99 per cent"),
        ("wanda50", {"calibration_batches": 0},
         "steps.wanda.calibration_batches=0: must be greater than or equal to 1"),
        ("wanda50", {"recovery": {"max_steps": -1}},
         "steps.wanda.recovery.max_steps=-1: must be greater than or equal to 0"),
        ("wanda50", {"scope": "layer"}, "steps.wanda.scope='layer': there is no such setting"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_words(recipe: str, wanda: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build({"recipes": [recipe], "steps": {"wanda": wanda}})
    assert words in str(error.value)
