"""Importance of heads, FFN units and layers against finite differences and by hand, and which of them go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from train_then_compress.compression.structured import choose, magnitude_scores, taylor_scores
from train_then_compress.evaluation.predictions import IGNORED
from train_then_compress.models.roberta import Classifier
from train_then_compress.models.transformer import Translator
from train_then_compress.tasks import masked_lm, translation

LENGTH = 12
SHAPES: list[dict[str, Any]] = [
    {"norm": "pre"}, {"norm": "post"}, {"positions": "rotary"}, {"positions": "sinusoidal", "norm": "post"},
]  # fmt: skip
KINDS = ["mlm", "classification", "translation"]


def losses(model: nn.Module, part: Any) -> Tensor:
    """Each example's summed loss, in float64."""
    if isinstance(model, Classifier):
        return F.cross_entropy(model(part.tokens), part.labels, reduction="none")
    given = (part.source, part.target) if isinstance(model, Translator) else (part.tokens,)
    each = F.cross_entropy(model(*given, part.where), part.targets, ignore_index=IGNORED, reduction="none")
    return each.new_zeros(len(part.tokens)).index_add(0, part.where // given[-1].shape[1], each)


EXACT: Any = SimpleNamespace(loss=lambda model, part: (losses(model, part).sum(), 1))


def piece_of(small: Any, kind: str, rows: int) -> Any:
    tokens, targets = small.tokens(rows), small.targets(rows)
    if kind == "classification":
        return SimpleNamespace(tokens=tokens, labels=torch.arange(rows) % 3)
    length = targets.shape[1] if kind == "translation" else LENGTH
    where = torch.tensor([row * length + place for row in range(rows) for place in (1, 4, 5)] + [0, 0])
    labels = torch.arange(3 * rows + 2) + 7
    labels[-2:] = IGNORED
    if kind == "translation":
        return translation.Part(tokens, targets, where, labels, 3 * rows)
    return masked_lm.Part(tokens, where, labels, 3 * rows, True)


def difference(model: nn.Module, part: Any, scale: Callable[[float], Any], step: float = 1e-5) -> float:
    """The mean of ``|dL / d gate|`` over examples by central differences; ``scale`` sets a gate."""
    sides = []
    for gate in (1 + step, 1 - step):
        undo = scale(gate)
        with torch.no_grad():
            sides.append(losses(model, part))
        undo()
    return float(((sides[0] - sides[1]) / (2 * step)).abs().mean())


def scale_columns(weight: Tensor, columns: slice, gate: float) -> Callable[[], None]:
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, columns] *= gate

    def undo() -> None:
        with torch.no_grad():
            weight.copy_(kept)

    return undo


def scale_layer(layer: nn.Module, gate: float) -> Callable[[], None]:
    hook = layer.register_forward_hook(lambda layer, inputs, output: inputs[0] + gate * (output - inputs[0]))
    return hook.remove


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Layers, attentions and feed-forward networks by name."""
    return {
        name: module for name, module in model.named_modules()
        if name.endswith(("attention", "feed_forward")) or name.rpartition(".")[0].endswith("layers")
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_taylor_importance_is_the_slope_of_the_loss_in_the_gate(small: Any, kind: str, shape: dict[str, Any]) -> None:
    model = small(kind, **shape).double()
    part = piece_of(small, kind, 3)
    scores, modules = taylor_scores(model, EXACT, [part]), parts_of(model)
    assert scores.keys() == modules.keys() and len(scores) == (14 if kind == "translation" else 6)
    for name, module in modules.items():
        if name.endswith("attention"):
            places, weight = {h: slice(8 * h, 8 * h + 8) for h in range(4)}, module.output.weight
        elif name.endswith("feed_forward"):
            places, weight = {unit: slice(unit, unit + 1) for unit in (0, 17, 64, 127)}, module.outer.weight
        else:
            whole = difference(model, part, partial(scale_layer, module))
            assert scores[name].tolist() == pytest.approx([whole], rel=1e-5, abs=1e-8) and whole > 1e-3
            continue
        slopes = [difference(model, part, partial(scale_columns, weight, place)) for place in places.values()]
        assert scores[name][list(places)].tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)
        assert max(slopes) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_examples_count_alike_in_whatever_pieces_they_come(small: Any, kind: str) -> None:
    """And nothing stays on the model: neither hooks nor gradients nor another mode."""
    model = small(kind).double().train()
    whole = piece_of(small, kind, 4)
    pieces = []
    for rows in (slice(0, 1), slice(1, 4)):
        if kind == "classification":
            pieces.append(SimpleNamespace(tokens=whole.tokens[rows], labels=whole.labels[rows]))
            continue
        length = (whole.target if kind == "translation" else whole.tokens).shape[1]
        mine = slice(3 * rows.start, 3 * rows.stop)
        changes = {"where": whole.where[mine] - rows.start * length, "targets": whole.targets[mine], "terms": 3}
        texts = ("source", "target") if kind == "translation" else ("tokens",)
        pieces.append(dataclasses.replace(whole, **changes, **{name: getattr(whole, name)[rows] for name in texts}))
    together, apart = taylor_scores(model, EXACT, [whole]), taylor_scores(model, EXACT, pieces)
    assert all(torch.allclose(scores, apart[name], rtol=1e-10) for name, scores in together.items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_magnitude_is_the_norm_of_the_units_weights(small: Any) -> None:
    model = small("translation")
    scores, modules = magnitude_scores(model), parts_of(model)
    assert scores.keys() == modules.keys()
    for name, module in modules.items():
        matrices = {inner: p.detach().numpy() for inner, p in module.named_parameters() if p.dim() == 2}
        if name.endswith("attention"):
            output = matrices.pop("output.weight")
            for head in range(4):
                own = np.arange(8 * head, 8 * head + 8)
                rows = [part[own] for matrix in matrices.values() for part in np.split(matrix, len(matrix) // 32)]
                expected = np.linalg.norm(np.stack([*rows, output[:, own].T]))
                assert len(rows) == 3 and scores[name][head].item() == pytest.approx(expected, rel=1e-5)
        elif name.endswith("feed_forward"):
            inner, outer = matrices["inner.weight"], matrices["outer.weight"]
            for unit in (0, 5, 127):
                expected = np.sqrt((inner[unit] ** 2).sum() + (outer[:, unit] ** 2).sum())
                assert scores[name][unit].item() == pytest.approx(expected, rel=1e-5)
        else:
            expected = np.linalg.norm(np.concatenate([matrix.ravel() for matrix in matrices.values()]))
            assert len(matrices) in (4, 7) and scores[name].tolist() == pytest.approx([expected], rel=1e-5)


# Which units go.


def test_by_hand_the_lowest_go_in_each_layer_or_everywhere() -> None:
    scores = [torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([30.0, 40.0, 1.0, 2.0])]
    assert [kept.tolist() for kept in choose(scores, 4, 0.5, "layer")] == [[0, 2], [0, 1]]
    # Divided by 5.48 and 50.05: .73 .18 .55 .37 and .60 .80 .02 .04
    assert [kept.tolist() for kept in choose(scores, 4, 0.375, "global")] == [[0, 2, 3], [0, 1]]
    assert [kept.tolist() for kept in choose(scores, 4, 0.5, "global")] == [[0, 2], [0, 1]]
    assert [kept.tolist() for kept in choose(scores, 4, 0.99, "global")] == [[0], [1]]
    assert [kept.tolist() for kept in choose(scores, 4, 0.99, "layer")] == [[0], [1]]
    # Every unit of the first layer (.49 .51 .49 .51) ranks below both of the second (.78 .62).
    even = [torch.tensor([9.5, 10.0, 9.6, 9.9]), torch.tensor([5.0, 4.0])]
    assert [kept.tolist() for kept in choose(even, 4, 0.75, "global")] == [[1], [0]]
    assert [kept.tolist() for kept in choose(even, 4, 0.625, "global")] == [[1], [0, 1]]
    # A quarter of the original eight is gone already: nothing to do, then one more.
    rest = [torch.tensor([4.0, 1.0, 3.0]), torch.tensor([30.0, 40.0, 1.0])]
    assert [kept.tolist() for kept in choose(rest, 4, 0.25, "layer")] == [[0, 1, 2], [0, 1, 2]]
    assert [kept.tolist() for kept in choose(rest, 4, 0.25, "global")] == [[0, 1, 2], [0, 1, 2]]
    assert [kept.tolist() for kept in choose(rest, 4, 0.375, "global")] == [[0, 1, 2], [0, 1]]


SCORES = st.floats(0, 100).map(lambda x: x if x > 1e-6 else 0.0)


@given(
    st.lists(st.lists(SCORES, min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 99), st.integers(0, 3),
)  # fmt: skip
def test_a_global_choice_is_exact_and_empties_no_layer(values: list[list[float]], percent: int, gone: int) -> None:
    scores = [torch.tensor(each, dtype=torch.double) for each in values]
    original = max(map(len, values)) + gone
    kept = choose(scores, original, percent / 100, "global")
    everywhere = original * len(scores)
    wanted = everywhere - round(percent / 100 * everywhere)
    assert sum(map(len, kept)) == min(sum(map(len, scores)), max(len(scores), wanted))
    assert all(len(numbers) and numbers.tolist() == sorted(set(numbers.tolist())) for numbers in kept)
    ranked = [score / score.norm() if score.any() else score for score in scores]
    lost, held = [], []
    for score, numbers in zip(ranked, kept, strict=True):
        stays = torch.zeros(len(score), dtype=torch.bool).index_fill(0, numbers, True)
        assert score[stays].max() == score.max()
        lost += score[~stays].tolist()
        held += score[stays].sort().values[:-1].tolist()
    assert not lost or not held or max(lost) <= min(held)
