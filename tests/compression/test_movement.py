"""Movement pruning: gradients against the definition written out, what moves away from zero stays, whole trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from train_then_compress.compression.compressed import matrices
from train_then_compress.compression.masks import masks_of
from train_then_compress.compression.movement import Scored
from train_then_compress.config import Config, ConfigError

TRAINING = {"steps": 12, "begin": 0.1, "ramp": 0.7, "every": 1, "lr_factor": 1.0}


def settings(**changes: Any) -> dict[str, Any]:
    return {"training": TRAINING} | changes


def scored(weight: Tensor, mask: Tensor) -> tuple[nn.Linear, Scored]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    kind = Scored(mask)
    parametrize.register_parametrization(layer, "weight", kind)
    return layer, kind


def test_gradients_are_those_of_the_definition() -> None:
    """a_i = sum_k W_ik M_ik x_k; dL/dW_ij = dL/da_i M_ij x_j; dL/dS_ij = dL/da_i W_ij x_j."""
    torch.manual_seed(0)
    weight, x, mask = torch.randn(3, 4), torch.randn(5, 4), torch.rand(3, 4) > 0.5
    layer, kind = scored(weight, mask)
    kind.scores.data.normal_()
    outputs = layer(x)
    assert torch.equal(outputs, nn.functional.linear(x, weight * mask)) and torch.equal(layer.weight, weight * mask)
    outputs.retain_grad()
    (outputs.sin() * outputs).sum().backward()
    by_output = outputs.grad
    assert by_output is not None and kind.scores.grad is not None
    for i in range(3):
        for j in range(4):
            slope = sum(float(by_output[n, i] * x[n, j]) for n in range(5))
            original = layer.parametrizations.weight.original
            assert float(original.grad[i, j]) == pytest.approx(slope * float(mask[i, j]), abs=1e-5)
            assert float(kind.scores.grad.view(3, 4)[i, j]) == pytest.approx(slope * float(weight[i, j]), abs=1e-5)


def toy(optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[Tensor, list[Tensor], Scored]:
    """Two small weights are drawn away from zero, two large ones towards it; two of the four are always masked."""
    weight, goal = torch.tensor([[0.5, -0.5, 2.0, -2.0]]), torch.tensor([[1.5, -1.5, 0.1, -0.1]])
    layer, kind = scored(weight, torch.ones(1, 4, dtype=torch.bool))
    steps = optimizer(layer.parametrizations.weight.original, kind.scores)
    moved = []
    for _ in range(20):
        before = layer.parametrizations.weight.original.detach().clone()
        loss = (layer.weight - goal).square().sum()
        steps.zero_grad()
        loss.backward()
        steps.step()
        moved.append(before * 2 * (before * kind.mask - goal))  # W dL/dW'
        kind.mask.copy_(masks_of({"a": kind.score(weight)}, 0.5, "layer")["a"])
    return kind.mask, moved, kind


def test_weights_that_move_away_from_zero_are_kept_however_small() -> None:
    mask, moved, kind = toy(lambda weight, scores: torch.optim.SGD([weight, scores], lr=0.01))
    assert mask.tolist() == [[True, True, False, False]]
    assert torch.allclose(kind.scores, -0.01 * sum(moved).flatten(), atol=1e-6)  # S accumulates -W dL/dW'
    assert torch.equal(masks_of({"a": torch.tensor([[0.5, -0.5, 2.0, -2.0]]).abs()}, 0.5, "layer")["a"], ~mask)


def test_the_rate_of_the_scores_does_not_matter() -> None:
    """Under AdamW a power of two as a factor leaves every bit of the rest as it was."""

    def optimizer(factor: float) -> Callable[..., torch.optim.Optimizer]:
        return lambda weight, scores: torch.optim.AdamW(
            [{"params": [weight]}, {"params": [scores], "lr": factor * 0.01, "weight_decay": 0.0}], lr=0.01
        )

    (mask, moved, kind), (other_mask, other_moved, other) = toy(optimizer(1.0)), toy(optimizer(256.0))
    assert torch.equal(256 * kind.scores, other.scores) and torch.equal(mask, other_mask)
    assert all(torch.equal(a, b) for a, b in zip(moved, other_moved, strict=True))


def test_scores_are_not_decayed() -> None:
    """`fit` decays parameters of two dimensions."""
    kind = Scored(torch.ones(3, 4, dtype=torch.bool))
    assert kind.scores.shape == (12,) and not kind.scores.any()


def scores_in(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = ".parametrizations.weight.0.scores"
    return {
        name.removesuffix(ends) + ".weight":
        scores.view(checkpoint[name.replace("0.scores", "original")].shape)
        for name, scores in checkpoint.items() if name.endswith(ends)
    }  # fmt: skip


def highest(scores: list[Tensor], kept: int) -> Tensor:
    """Sorted by score, then place; the last so many."""
    flat = torch.cat([score.flatten() for score in scores])
    order = sorted(range(len(flat)), key=lambda place: float(flat[place]))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[len(flat) - kept :]] = True
    return mask


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_the_end_keeps_the_highest_final_scores_in_an_ordinary_model(
    stand: Callable[..., Any], stopped: Callable[..., Any], tmp_path: Path, scope: str, embeddings: bool
) -> None:
    movement = settings(scope=scope, embeddings=embeddings)
    scores = scores_in(stopped(stand("movement60", "classification", movement=movement), 12))
    place = stand("movement60", "classification", movement=movement)
    compressed = place.compress()
    weights = matrices(compressed.model, embeddings)
    assert set(compressed.masks) == set(scores) == set(weights) and len(weights) == 6 + embeddings
    for group in [list(weights)] if scope == "global" else [[name] for name in weights]:
        total = sum(weights[name].numel() for name in group)
        expected = highest([scores[name] for name in group], total - round(0.6 * total))
        assert torch.equal(torch.cat([compressed.masks[name].flatten() for name in group]), expected)
    assert all(not weight[~compressed.masks[name]].any() for name, weight in weights.items())
    expected_names = [name for name, _ in place.model.named_parameters()]
    assert [name for name, _ in compressed.model.named_parameters()] == expected_names
    place.assert_comes_back(compressed, tmp_path)


def test_kept_weights_moved_away_from_zero_more_than_pruned_ones(
    stand: Callable[..., Any], stopped: Callable[..., Any]
) -> None:
    """Before any mask: of a whole training the scores say which weights grew."""
    late = {"training": TRAINING | {"begin": 0.5, "ramp": 1.0}}
    place = stand("movement50", "classification", movement=late)
    dense = {name: weight.detach().clone() for name, weight in matrices(place.model, False).items()}
    checkpoint = stopped(place, 6)
    for name, score in scores_in(checkpoint).items():
        now = checkpoint[name.replace(".weight", ".parametrizations.weight.original")]
        grown = (now.abs() - dense[name].abs()).flatten()
        order = score.flatten().argsort()
        half = len(order) // 2
        assert grown[order[half:]].mean() > grown[order[:half]].mean()


@pytest.mark.parametrize("step", [4, 12])
def test_a_stopped_training_goes_on_to_the_same_weights(
    stand: Callable[..., Any], stopped: Callable[..., Any], step: int
) -> None:
    def place(directory: str) -> Any:
        return stand("movement60", "classification", directory, movement=settings())

    undisturbed = place("undisturbed").compress()
    stopped(place("stopped"), step)
    resumed = place("stopped").compress()
    expected = undisturbed.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert all(torch.equal(mask, undisturbed.masks[name]) for name, mask in resumed.masks.items())


def test_pruned_before_and_quantized_after_zeros_stay(stand: Callable[..., Any], tmp_path: Path) -> None:
    prune = {"increment": 30, "recovery": {"max_steps": 0}}
    first = stand("prune30", "classification", "first", prune=prune)
    earlier = copy.deepcopy(first.compress().masks)
    place = stand("prune30+movement60+quant4", "classification", prune=prune, movement=settings())
    compressed = place.compress()
    for name, weight in matrices(compressed.model, True).items():
        assert not weight[~earlier[name]].any() and not weight[~compressed.masks[name]].any()
        share = 0.3 if "embedding" in name else 0.6
        assert int((~compressed.masks[name]).sum()) == round(share * weight.numel())
    place.assert_comes_back(compressed, tmp_path)


@pytest.mark.parametrize(
    "recipe, movement, words",
    [
        ("movement100", {}, "recipes: pruning 100 %: must lie between 1 and 99 per cent"),
        ("movement60", {"training": {"every": 0}},
         "steps.movement.training.every=0: must be greater than or equal to 1"),
        ("movement60", {"training": {"begin": 0.7}}, "steps.movement.training.every=1: the sparsity must rise"),
        ("movement60", {"recovery": {}}, "steps.movement.recovery={}: there is no such setting"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_words(
    labelled: dict[str, Any], recipe: str, movement: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build(labelled | {"recipes": [recipe], "steps": {"movement": movement}})
    assert words in str(error.value)


def test_it_is_for_classification_only(labelled: dict[str, Any]) -> None:
    Config.build(labelled | {"recipes": ["movement60"]})
    with pytest.raises(ConfigError, match="'movement60': movement works for task=classification only"):
        Config.build({"recipes": ["movement60"]})
