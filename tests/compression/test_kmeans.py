"""k-means quantization against scikit-learn, brute force, and the even spacing that it begins with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Reference
from torch import Tensor, nn

from train_then_compress.compression.compressed import Codebook, Compressed, matrices
from train_then_compress.compression.kmeans import apply, lloyd, quantize
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.prune import prune
from train_then_compress.compression.quant import quantize as round_to_nearest
from train_then_compress.config import Config, ConfigError, RobertaConfig, parse_recipe
from train_then_compress.config.steps import KMeans, Prune, Quant
from train_then_compress.models.roberta import Classifier, MaskedLM

GRANULARITIES = ["tensor", "channel", "group"]
SHAPE = RobertaConfig(depth=1, width=32, head_size=16)


def everything(weights: Tensor) -> Tensor:
    return torch.ones_like(weights, dtype=torch.bool)


def squared_error(points: np.ndarray, centroids: np.ndarray) -> float:
    """Of each point to its nearest centroid."""
    return float(((points[:, None] - centroids[None]) ** 2).min(axis=1).sum())


def weights_like(kind: str, groups: int = 4, size: int = 300) -> Tensor:
    """``normal``; ``pruned``, without small ones; ``outlier``: one far away, so that even spacing leaves much empty."""
    weights = torch.randn(groups, size, generator=torch.Generator().manual_seed(3))
    if kind == "pruned":
        weights += 1.5 * weights.sign()
    if kind == "outlier":
        weights[:, 7] = 40 + torch.arange(groups)
    return weights


@pytest.mark.parametrize("kind", ["normal", "pruned", "outlier"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_centroids_and_error_are_scikit_learns(bits: int, kind: str) -> None:
    weights = weights_like(kind)
    centroids = lloyd(weights, everything(weights), 2**bits, 300)
    for row, found in zip(weights.double().numpy(), centroids.numpy(), strict=True):
        start = np.linspace(row.min(), row.max(), 2**bits)[:, None]
        theirs = Reference(2**bits, init=start, n_init=1, max_iter=300, tol=0.0, algorithm="lloyd").fit(row[:, None])
        assert squared_error(row, found) == pytest.approx(theirs.inertia_, rel=1e-9)
        np.testing.assert_allclose(found, np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-6, atol=1e-9)


def best_error(points: list[float], kinds: int) -> float:
    """The least squared error of any clustering: clusters of the best one are runs of the sorted points."""
    ordered, errors = np.sort(points), []
    for cuts in itertools.combinations_with_replacement(range(len(points) + 1), kinds - 1):
        runs = np.split(ordered, cuts)
        errors.append(sum(((run - run.mean()) ** 2).sum() for run in runs if len(run)))
    return min(errors)


VALUES = st.floats(-1, 1, width=16).map(lambda x: x if abs(x) > 1e-3 else 0.0)


@given(st.lists(VALUES, min_size=1, max_size=7), st.sampled_from([2, 4]))
def test_tiny_groups_end_where_no_mean_moves_and_never_below_the_optimum(points: list[float], kinds: int) -> None:
    weights = torch.tensor([points])
    found = lloyd(weights, everything(weights), kinds, 300)[0].numpy()
    exact = np.array(points)
    error, even = squared_error(exact, found), squared_error(exact, np.linspace(min(points), max(points), kinds))
    assert best_error(points, kinds) - 1e-12 <= error <= even + 1e-12
    assert (np.diff(found) >= 0).all()
    if len(set(points)) <= kinds:
        assert error < 1e-12
    distance = np.abs(exact[:, None] - found[None])
    if (np.sort(distance, axis=1)[:, 1] > distance.min(axis=1) + 1e-9).all():  # no ties
        nearest = distance.argmin(axis=1)
        for cluster in set(nearest):
            assert found[cluster] == pytest.approx(exact[nearest == cluster].mean(), abs=1e-9)


@given(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.booleans()), min_size=32, max_size=32),
    st.sampled_from(GRANULARITIES), st.integers(2, 3), st.sampled_from([1, 2, 300]), st.sampled_from([1e-2, 1.0, 50.0]),
)  # fmt: skip
def test_error_is_never_above_that_of_even_spacing(
    entries: list[tuple[float, bool]], granularity: str, bits: int, iterations: int, size: float
) -> None:
    """After however few iterations; but for the centroids' rounding to float16, 2^-11 of each (2^-25 of small ones)."""
    weight = size * torch.tensor([value for value, _ in entries]).view(2, 16)
    mask = torch.tensor([kept for _, kept in entries]).view(2, 16)
    config = KMeans(granularity=granularity, group_size=8, iterations=iterations)  # type: ignore[arg-type]
    codebook = quantize(weight * mask, mask, bits, config)
    result = codebook.dequantize()
    groups = {"tensor": 1, "channel": 2, "group": 4}[granularity]
    shape = {"tensor": (1, 1), "channel": (2, 1), "group": (2, 2)}[granularity]
    assert codebook.centroids.shape == (*shape, 2**bits) and codebook.centroids.dtype == torch.float16
    assert codebook.codes.dtype == torch.uint8 and int(codebook.codes.max()) < 2**bits
    assert not codebook.codes[~mask].any()
    for values, kept, rounded in zip(*(part.reshape(groups, -1) for part in (weight, mask, result)), strict=True):
        if not kept.any():
            continue
        points = values[kept].double().numpy()
        even = squared_error(points, np.linspace(points.min(), points.max(), 2**bits))
        error = float(((rounded[kept].double().numpy() - points) ** 2).sum())
        float16 = len(points) ** 0.5 * (2.0**-11 * np.abs(points).max() + 2.0**-25)
        assert error**0.5 <= even**0.5 + 1.001 * float16


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_weights_lose_less_than_by_rounding_to_nearest(granularity: str, bits: int) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits))

    def error(codes: Any) -> float:
        return float((codes.dequantize() - weight).norm())

    scales: dict[str, Any] = {"granularity": granularity, "group_size": 64}
    found = error(quantize(weight, everything(weight), bits, KMeans(**scales)))
    for symmetric in (True, False):
        config = Quant(symmetric=symmetric, **scales)
        assert found < error(round_to_nearest(weight, bits, config))


def test_each_weight_has_its_nearest_centroid_and_groups_know_nothing_of_each_other() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 6)[:, None]
    codebook = quantize(weight, everything(weight), 3, KMeans(granularity="group", group_size=16))
    for row, column in itertools.product(range(6), range(0, 64, 16)):
        part, centroids = weight[row, column : column + 16], codebook.centroids[row, column // 16].float()
        nearest = (part[:, None] - centroids).abs().min(dim=1).values
        used = codebook.dequantize()[row, column : column + 16]
        torch.testing.assert_close((part - used).abs(), nearest)
        alone = quantize(part[None], everything(part[None]), 3, KMeans())
        assert torch.equal(alone.centroids[0, 0], codebook.centroids[row, column // 16])
        assert torch.equal(alone.codes[0], codebook.codes[row, column : column + 16])


def test_groups_that_do_not_divide_the_columns_are_as_even_as_can_be() -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    codebook = quantize(weight, everything(weight), 2, KMeans(granularity="group", group_size=8))
    assert codebook.centroids.shape == (3, 3, 4)
    parts = weight.split([7, 7, 6], dim=1)
    alone = [quantize(part, everything(part), 2, KMeans(granularity="channel")).dequantize() for part in parts]
    assert torch.equal(codebook.dequantize(), torch.cat(alone, dim=1))


def test_the_result_does_not_depend_on_how_many_groups_are_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights_like("outlier", 12, 64)
    config = KMeans(granularity="group", group_size=32)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    whole = quantize(weight * mask, mask, 4, config)
    monkeypatch.setattr("train_then_compress.compression.kmeans._WEIGHTS_AT_ONCE", 100)
    pieces = quantize(weight * mask, mask, 4, config)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.centroids, pieces.centroids)


def test_pruned_weights_do_not_move_centroids() -> None:
    weight = torch.tensor([[5.0, 0.0, 1.0, 0.0, 2.0, 0.0, 9.0, 0.0]])
    codebook = quantize(weight, weight != 0, 2, KMeans())
    assert codebook.centroids.tolist() == [[[1.0, 2.0, 5.0, 9.0]]]
    assert torch.equal(codebook.dequantize() * (weight != 0), weight)
    nothing = quantize(weight, torch.zeros_like(weight, dtype=torch.bool), 2, KMeans())
    assert not nothing.centroids.any() and not nothing.codes.any()


def new_model(classifier: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return (Classifier(SHAPE, 60, 12, 3) if classifier else MaskedLM(SHAPE, 60, 12)).eval()


def logits_of(model: nn.Module) -> Tensor:
    tokens = torch.arange(5, 29).view(2, 12)
    with torch.inference_mode():
        result: Tensor = model(tokens) if isinstance(model, Classifier) else model(tokens, torch.arange(24))
    return result


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("sparsity", [0, 0.6])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_packed_file_gives_the_same_model_back(
    tmp_path: Path, granularity: str, sparsity: float, classifier: bool
) -> None:
    compressed = Compressed(new_model(classifier))
    if sparsity:
        prune(compressed, sparsity, Prune())
    masks = {name: mask.clone() for name, mask in compressed.masks.items()}
    (step,) = parse_recipe("kmeans3", {"kmeans": {"granularity": granularity}}, SHAPE)
    apply(compressed, step, None)  # type: ignore[arg-type]  # needs no bench
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, new_model(classifier, seed=1))
    assert torch.equal(logits_of(back.model), logits_of(compressed.model))
    assert pack(back, torch.float32, {}) == path.read_bytes()
    weights = matrices(back.model, True)
    assert set(back.codes) == set(weights) and set(back.masks) == set(masks)
    for name, weight in weights.items():
        codes = back.codes[name]
        assert isinstance(codes, Codebook) and torch.equal(codes.codes, compressed.codes[name].codes)
        if sparsity:
            assert torch.equal(back.masks[name], masks[name]) and not weight[~masks[name]].any()
            assert weight[masks[name]].count_nonzero() > 0.9 * masks[name].sum()


@pytest.mark.parametrize("embeddings", [True, False])
def test_matrices_get_codebooks_and_nothing_else_and_always_the_same(embeddings: bool) -> None:
    first, second = Compressed(new_model(False)), Compressed(new_model(False))
    before = {name: parameter.detach().clone() for name, parameter in first.model.named_parameters()}
    (step,) = parse_recipe("kmeans4", {"kmeans": {"embeddings": embeddings}}, SHAPE)
    for compressed in (first, second):
        apply(compressed, step, None)  # type: ignore[arg-type]
    expected = matrices(first.model, embeddings)
    assert set(first.codes) == set(expected) and ("encoder.embedding.weight" in expected) == embeddings
    others = dict(second.model.named_parameters())
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, others[name])
        if name in expected:
            assert len(parameter.unique()) <= 16 and torch.equal(parameter, first.codes[name].dequantize())
        else:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    "recipe, settings, words",
    [
        ("kmeans1", {}, "recipes: kmeans1: bits must lie between 2 and 8"),
        ("kmeans9", {}, "recipes: kmeans9: bits must lie between 2 and 8"),
        ("kmeans", {}, "'kmeans' is not a method and a strength"),
        ("kmeans4", {"granularity": "row"}, "steps.kmeans.granularity='row': must be 'tensor', 'channel' or"),
        ("kmeans4", {"iterations": 0}, "steps.kmeans.iterations=0: must be greater than or equal to 1"),
        ("kmeans4", {"group_size": 1}, "steps.kmeans.group_size=1: must be greater than or equal to 2"),
        ("kmeans4", {"granularity": "group", "group_size": 48}, "steps.kmeans.group_size=48: must divide"),
        ("kmeans5", {"granularity": "group", "group_size": 16},
         "steps.kmeans.granularity=group: a codebook of 32 values (kmeans5) for 16 weights"),
        ("kmeans7", {"granularity": "channel"},
         "steps.kmeans.granularity=channel: a codebook of 128 values (kmeans7) for 64 weights"),
        ("kmeans4+prune60", {}, "kmeans4 must be the last step"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_words(recipe: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build({"recipes": [recipe], "model": {"width": 64}, "steps": {"kmeans": settings}})
    assert words in str(error.value)
