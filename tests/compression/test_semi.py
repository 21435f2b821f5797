"""2:4 sparsity: the pattern for every criterion, torch's own sparsifier, brute force, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier

from train_then_compress.compression.compressed import Compressed, matrices
from train_then_compress.compression.semi import apply
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.steps import STEPS, Semi
from train_then_compress.cost.flops import forward_flops

CRITERIA = [
    ("magnitude", "mlm"), ("magnitude", "classification"), ("wanda", "mlm"), ("wanda", "classification"),
    ("movement", "classification"), ("magnitude", "translation"), ("wanda", "translation"),
]  # fmt: skip
TRAINING = {"steps": 8, "begin": 0.1, "ramp": 0.7, "every": 1, "lr_factor": 1.0}


def settings(criterion: str, max_steps: int = 2) -> dict[str, Any]:
    return {
        "criterion": criterion, "calibration_batches": 2, "recovery": {"max_steps": max_steps}, "training": TRAINING
    }  # fmt: skip


def brute_force(scores: Tensor) -> Tensor:
    """Of four consecutive scores of a row the two that add up to the most, every pair tried."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for first in range(0, len(row), 4):
            best = max(itertools.combinations(range(first, first + 4), 2), key=lambda pair: row[pair[0]] + row[pair[1]])
            mask[i, list(best)] = True
    return mask


@pytest.mark.parametrize("criterion, task", CRITERIA)
def test_of_each_four_two_are_zero_in_every_linear_layer(
    stand: Callable[..., Any], tmp_path: Path, criterion: str, task: str
) -> None:
    place = stand("semi50", task, semi=settings(criterion))
    compressed = place.compress()
    linear = matrices(compressed.model, False)
    assert set(compressed.masks) == set(linear)
    for name, weight in linear.items():
        fours = weight.detach().reshape(-1, 4)
        assert ((fours != 0).sum(dim=1) == 2).all() and torch.equal(weight != 0, compressed.masks[name])
    moved = dict(compressed.model.named_parameters())
    assert all(not torch.equal(moved[name], parameter) for name, parameter in place.model.named_parameters())
    dense, sparse = forward_flops(place.model), forward_flops(compressed.model, nonzero=True)
    assert sparse.per_token_in_matrices == dense.per_token_in_matrices / 2
    assert sparse.per_target_in_matrices == dense.per_target_in_matrices / 2
    place.assert_comes_back(compressed, tmp_path)


@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
def test_by_magnitude_it_is_torchs_sparsifier(stand: Callable[..., Any], task: str) -> None:
    place = stand("semi50", task, semi=settings("magnitude", max_steps=0))
    expected = copy.deepcopy(place.model)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(expected, [{"tensor_fqn": name} for name in matrices(expected, False)])
    sparsifier.step()
    sparsifier.squash_mask()
    compressed = place.compress()
    weights = dict(expected.named_parameters())
    for name, weight in compressed.model.named_parameters():
        assert torch.equal(weight, weights[name]), name
        if name in compressed.masks:
            assert torch.equal(compressed.masks[name], brute_force(dict(place.model.named_parameters())[name].abs()))


def test_by_movement_the_highest_final_scores_of_four_stay(
    stand: Callable[..., Any], stopped: Callable[..., Any]
) -> None:
    """The scores are read from a checkpoint of the last step."""
    ends = ".parametrizations.weight.0.scores"
    checkpoint = stopped(stand("semi50", "classification", semi=settings("movement")), 8)
    scores = {name.removesuffix(ends) + ".weight": value for name, value in checkpoint.items() if name.endswith(ends)}
    masks = stand("semi50", "classification", semi=settings("movement")).compress().masks
    assert masks.keys() == scores.keys() and len(masks) == 6
    compared = 0
    for name, mask in masks.items():
        fours, kept = scores[name].view(-1, 4), mask.view(-1, 4)
        distinct = fours.sort(dim=1).values.diff(dim=1).gt(0).all(dim=1)
        compared += int(distinct.sum())
        assert torch.equal(kept[distinct], brute_force(fours[distinct]))
    assert compared > 3000


def test_wider_sparsity_may_follow_and_quantization_keeps_the_zeros(stand: Callable[..., Any], tmp_path: Path) -> None:
    still = {"recovery": {"max_steps": 0}}
    steps = {"prune": still | {"increment": 30}, "semi": settings("wanda", 0), "oneshot": still}
    place = stand("prune30+semi50+oneshot75+quant4", **steps)
    first = stand("prune30+semi50", directory="first", **steps).compress()
    compressed = place.compress()
    for name, weight in matrices(compressed.model, True).items():
        assert not weight[~first.masks[name]].any() and not weight[~compressed.masks[name]].any()
        assert int((~compressed.masks[name]).sum()) == round(0.75 * weight.numel())
        if "embedding" not in name:
            assert (first.masks[name].view(-1, 4).sum(dim=1) <= 2).all()
    place.assert_comes_back(compressed, tmp_path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"recipes": ["semi60"]}, "recipes: semi60: 2 of every 4 weights are zero: the strength must be 50"),
        ({"recipes": ["semi"]}, "'semi' is not a method and a strength"),
        ({"recipes": ["semi50"], "model": {"width": 30, "head_size": 15}},
         "model.width=30: semi50 needs a multiple of 4"),
        ({"recipes": ["semi50"], "steps": {"semi": {"criterion": "random"}}},
         "steps.semi.criterion='random': must be 'magnitude', 'wanda' or 'movement'"),
        ({"recipes": ["semi50"], "steps": {"semi": {"criterion": "movement"}}},
         "steps.semi.criterion=movement: works for task=classification only"),
        ({"recipes": ["semi50"], "steps": {"semi": {"calibration_batches": 0}}},
         "steps.semi.calibration_batches=0: must be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build(settings)
    assert words in str(error.value)


def test_movement_is_allowed_where_it_has_a_finetuning(labelled: dict[str, Any]) -> None:
    asked = labelled | {"recipes": ["semi50"]}
    config = Config.build(asked | {"steps": {"semi": {"criterion": "movement"}}})
    assert [step.config for step in config.parsed_recipes()["semi50"]] == [Semi(criterion="movement")]
    with pytest.raises(ConfigError, match=r"steps\.semi\.training\.every=1: the sparsity must rise at least once"):
        Config.build(asked | {"steps": {"semi": {"criterion": "movement", "training": {"begin": 0.8}}}})


def test_inputs_that_an_earlier_step_made_no_multiple_of_four_are_refused() -> None:
    step: Any = SimpleNamespace(name="semi50", strength=50, config=Semi())
    compressed = Compressed(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)))
    bench: Any = None
    with pytest.raises(ConfigError, match=r"recipes: semi50: 1\.weight has 6 inputs .* a multiple of 4"):
        apply(compressed, step, bench)
    assert not compressed.masks


def test_it_is_said_that_its_speed_is_simulated() -> None:
    assert "simulated only" in STEPS["semi"].explained
