"""Gradual magnitude pruning: the schedule against its closed form, masks in training, trainings that are stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as reference

from train_then_compress.compression.compressed import matrices
from train_then_compress.compression.masks import masks_of
from train_then_compress.compression.sparse_training import Masked, sparsity_after
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.steps import Gradual, SparseTraining
from train_then_compress.cost.flops import forward_flops

# First masks after step 2, then after 5, 8, 11 and, at the last sparsity, 14.
TRAINING = {"steps": 20, "begin": 0.1, "ramp": 0.7, "every": 3, "lr_factor": 1.0}
EXPECTED = {2: 0.0, 5: 1 - (3 / 4) ** 3, 8: 1 - (2 / 4) ** 3, 11: 1 - (1 / 4) ** 3, 14: 1.0}  # shares of the target


def settings(**changes: Any) -> dict[str, Any]:
    return {"training": TRAINING} | changes


@given(
    st.integers(1, 2000), st.floats(0, 0.9), st.floats(0.01, 1), st.integers(1, 50),
    st.floats(0, 0.5), st.floats(0.51, 0.99), st.data(),
)  # fmt: skip
def test_the_sparsity_is_that_of_equation_1(
    steps: int, begin: float, ramp: float, every: int, start: float, end: float, data: st.DataObject
) -> None:
    training = SparseTraining(steps=steps, begin=begin, ramp=ramp, every=every)
    assume(training.rises >= 1)
    t0, last = training.first, training.first + training.rises * every
    assert t0 == round(begin * steps) and round(ramp * steps) - every < last <= round(ramp * steps) <= steps
    assert sparsity_after(0, training, start, end) == sparsity_after(t0, training, start, end) == pytest.approx(start)
    assert sparsity_after(last, training, start, end) == sparsity_after(steps, training, start, end) == end
    t = data.draw(st.sampled_from(range(t0, last + 1, every)))
    expected = end + (start - end) * (1 - (t - t0) / (training.rises * every)) ** 3
    assert sparsity_after(t, training, start, end) == pytest.approx(expected, abs=1e-12)
    if t < last:
        assert sparsity_after(t + every - 1, training, start, end) == sparsity_after(t, training, start, end)
        assert sparsity_after(t + every, training, start, end) > sparsity_after(t, training, start, end)


def test_a_masked_weight_gets_no_gradient_and_keeps_its_value() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(7, 5)
    mask = torch.rand(3, 5) > 0.5
    weight = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Masked(mask))
    assert torch.equal(layer.weight, weight * mask)
    layer(x).sin().sum().backward()
    dense = (weight * mask).requires_grad_()
    (x @ dense.T + layer.bias.detach()).sin().sum().backward()
    original = layer.parametrizations.weight.original
    assert dense.grad is not None and torch.allclose(original.grad, dense.grad * mask)
    assert torch.equal(original, weight)
    assert any(key.endswith("mask") for key in layer.state_dict())


def masks_in(checkpoint: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Masks, and weights without them, by the weight's name."""
    ends = ".parametrizations.weight.0.mask"
    return {
        name.removesuffix(ends) + ".weight": (mask, checkpoint[name.replace("0.mask", "original")])
        for name, mask in checkpoint.items() if name.endswith(ends)
    }  # fmt: skip


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("step", [1, 5, 8, 10, 14, 19])
def test_masks_grow_by_the_schedule_and_the_smallest_weights_go(
    stand: Callable[..., Any], stopped: Callable[..., Any], step: int, scope: str
) -> None:
    found = masks_in(stopped(stand("gradual60", gradual=settings(scope=scope)), step))
    assert len(found) == 6  # four linear layers, the head, the embedding
    rise = max((t for t in EXPECTED if t <= step), default=2)
    sparsity = 0.6 * EXPECTED[rise]
    groups = [list(found)] if scope == "global" else [[name] for name in found]
    for group in groups:
        mask = torch.cat([found[name][0].flatten() for name in group])
        size = torch.cat([found[name][1].flatten() for name in group]).abs()
        assert int((~mask).sum()) == round(sparsity * len(mask))
        if step == rise:  # not trained on since
            assert size[~mask].numel() == 0 or size[~mask].max() <= size[mask].min()


@pytest.mark.parametrize("step", [8, 10, 20])
@pytest.mark.parametrize("task", ["mlm", "classification", "translation"])
def test_a_stopped_training_goes_on_to_the_same_weights(
    stand: Callable[..., Any], stopped: Callable[..., Any], task: str, step: int
) -> None:
    undisturbed = stand("gradual60", task, "undisturbed", gradual=settings()).compress()
    stopped(stand("gradual60", task, "stopped", gradual=settings()), step)
    resumed = stand("gradual60", task, "stopped", gradual=settings()).compress()
    expected = undisturbed.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert all(torch.equal(mask, undisturbed.masks[name]) for name, mask in resumed.masks.items())


@pytest.mark.parametrize("task", ["mlm", "translation"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_the_end_has_the_sparsity_asked_for_and_an_ordinary_model(
    stand: Callable[..., Any], tmp_path: Path, embeddings: bool, task: str
) -> None:
    place = stand("gradual60", task, gradual=settings(embeddings=embeddings))
    before = place.model.state_dict()
    compressed = place.compress()
    names = [name for name, _ in compressed.model.named_parameters()]
    assert names == [name for name, _ in place.model.named_parameters()]
    weights = matrices(compressed.model, embeddings)
    assert set(compressed.masks) == set(weights)
    for name, weight in weights.items():
        assert int((weight == 0).sum()) == int((~compressed.masks[name]).sum()) == round(0.6 * weight.numel())
    assert all(not torch.equal(value, before[name]) for name, value in compressed.model.named_parameters())
    place.assert_comes_back(compressed, tmp_path)


@pytest.mark.parametrize("task", ["mlm", "translation"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_where_nothing_moves_the_end_is_torchs_one_shot_pruning(
    stand: Callable[..., Any], scope: str, task: str
) -> None:
    place = stand("gradual60", task, gradual={"scope": scope, "training": TRAINING | {"lr_factor": 1e-12}})
    expected = copy.deepcopy(place.model)
    kinds = (nn.Linear, nn.Embedding)
    modules = {f"{name}.weight": module for name, module in expected.named_modules() if isinstance(module, kinds)}
    if scope == "layer":
        for module in modules.values():
            reference.l1_unstructured(module, "weight", 0.6)
    else:
        pairs = [(module, "weight") for module in modules.values()]
        reference.global_unstructured(pairs, reference.L1Unstructured, amount=0.6)
    masks = place.compress().masks
    assert masks.keys() == modules.keys()
    assert all(torch.equal(masks[name], module.weight_mask.bool()) for name, module in modules.items())


def test_what_earlier_steps_pruned_stays_zero_in_every_matrix(stand: Callable[..., Any], tmp_path: Path) -> None:
    """prune30 prunes the embedding, gradual60 after it does not; it goes on from 30 %."""
    still = {"recovery": {"max_steps": 0}}
    first = stand("prune30", directory="first", prune=still | {"increment": 30}).compress()
    steps = {"prune": still | {"increment": 30}, "gradual": settings(embeddings=False)}
    both = stand("prune30+gradual60+quant4", quant={"symmetric": False}, **steps).compress()
    weights = matrices(both.model, True)
    assert set(both.masks) == set(first.masks) == set(weights) == set(both.codes)
    for name, weight in weights.items():
        assert not weight[~first.masks[name]].any() and not weight[~both.masks[name]].any()
        share = 0.3 if "embedding" in name else 0.6
        assert int((~both.masks[name]).sum()) == round(share * weight.numel())
    stand("none").assert_comes_back(both, tmp_path)


def test_an_earlier_sparsity_is_where_the_schedule_begins(
    stand: Callable[..., Any], stopped: Callable[..., Any]
) -> None:
    prune = {"increment": 30, "recovery": {"max_steps": 0}}
    found = masks_in(stopped(stand("prune30+gradual60", prune=prune, gradual=settings(embeddings=False)), 8))
    assert len(found) == 6  # the embedding with the mask that it has
    for name, (mask, _) in found.items():
        expected = 0.3 if "embedding" in name else 0.6 - 0.3 * (1 - 2 / 4) ** 3
        assert int((~mask).sum()) == pytest.approx(expected * mask.numel(), abs=1)


def test_a_parametrized_model_costs_the_same_flops(stand: Callable[..., Any]) -> None:
    model = stand("none").model
    plain = forward_flops(model)
    masks = masks_of({name: weight.detach().abs() for name, weight in matrices(model, True).items()}, 0.5, "layer")
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name.removesuffix(".weight")), "weight", Masked(mask))
    assert forward_flops(model) == plain
    assert forward_flops(model, nonzero=True).per_prediction == pytest.approx(plain.per_prediction / 2, rel=0.01)


@pytest.mark.parametrize(
    "recipe, gradual, words",
    [
        ("gradual0", {}, "recipes: pruning 0 %: must lie between 1 and 99 per cent"),
        ("gradual100", {}, "recipes: pruning 100 %: must lie between 1 and 99 per cent"),
        ("gradual60", {"scope": "row"}, "steps.gradual.scope='row': must be 'layer' or 'global'"),
        ("gradual60", {"training": {"steps": 0}},
         "steps.gradual.training.steps=0: must be greater than or equal to 1"),
        ("gradual60", {"training": {"ramp": 1.1}},
         "steps.gradual.training.ramp=1.1: must be less than or equal to 1"),
        ("gradual60", {"training": {"begin": 1}}, "steps.gradual.training.begin=1: must be less than 1"),
        ("gradual60", {"training": {"begin": 0.8}},
         "steps.gradual.training.every=10: the sparsity must rise at least once between training.begin=0.8 and "
         "training.ramp=0.7 of training.steps=600"),
        ("gradual60", {"training": {"every": 361}},
         "steps.gradual.training.every=361: the sparsity must rise at least"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_words(recipe: str, gradual: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build({"recipes": [recipe], "steps": {"gradual": gradual}})
    assert words in str(error.value)


def test_a_recipe_is_one_stage() -> None:
    assert Gradual().increments(60) == [60]
