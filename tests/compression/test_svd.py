"""Low rank against numpy's decomposition, the closed form of the weighted problem, and the dense product."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor, nn

from train_then_compress.compression import quant
from train_then_compress.compression.compressed import Compressed, matrices, rebuild
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.structured import magnitude_scores, shrink
from train_then_compress.compression.svd import decompose, factorable, factorize, rank_of, split
from train_then_compress.config import ConfigError, RobertaConfig, parse_recipe
from train_then_compress.config.steps import Structured, Svd
from train_then_compress.models.factored import Factored

SHAPE = RobertaConfig(depth=2, width=32, head_size=8)
SHAPES: list[dict[str, Any]] = [
    {"norm": "pre"}, {"norm": "post"}, {"positions": "rotary"}, {"positions": "sinusoidal", "norm": "post"},
    {"tied": False},
]  # fmt: skip
#: By kind of model, the linear layers inside its layers.
LAYERS = {"mlm": 8, "classification": 8, "translation": 2 * 4 + 2 * 7}
#: By kind of model, embeddings of tokens where they are not tied.
UNTIED = {"mlm": 2, "classification": 1, "translation": 3}
PLAIN = Svd(weighting="none")
PLAIN_EVERYWHERE = Svd(weighting="none", embeddings=True)


def matrix(seed: int, outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def low_rank(weight: Tensor, rank: int, moment: Tensor | None = None) -> Tensor:
    first, second = split(weight, decompose(weight, moment)[0][:, :rank])
    assert first.shape == (rank, weight.shape[1]) and second.shape == (weight.shape[0], rank)
    assert torch.allclose(first.norm(dim=1), second.norm(dim=0))
    return second @ first


# The approximation.


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_the_approximation_is_numpys(outputs: int, inputs: int, seed: int, data: st.DataObject) -> None:
    weight = matrix(seed, outputs, inputs)
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    left, values, right = np.linalg.svd(weight.numpy())
    expected = left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]
    assert np.allclose(low_rank(weight, rank).numpy(), expected, atol=1e-10)
    assert decompose(weight, None)[1].numpy() == pytest.approx(values)


def moment_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def output_error(weight: Tensor, used: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - used).T).square().sum())


@pytest.mark.parametrize("outputs, inputs, rank", [(9, 6, 2), (5, 8, 3), (7, 7, 1), (6, 9, 6)])
def test_the_weighted_approximation_is_the_optimum(outputs: int, inputs: int, rank: int) -> None:
    """By Cholesky factor and inverse, as in SVD-LLM; by alternating least squares from many starts."""
    weight = matrix(1, outputs, inputs)
    samples = matrix(2, 50, inputs) @ (matrix(3, inputs, inputs) * torch.logspace(-1, 1, inputs, dtype=torch.double))
    moment = moment_of(samples)
    ours = low_rank(weight, rank, moment)
    root = np.linalg.cholesky(moment.numpy())
    left, values, right = np.linalg.svd(weight.numpy() @ root)
    whitened = left[:, :rank] @ np.diag(values[:rank]) @ right[:rank] @ np.linalg.inv(root)
    assert np.allclose(ours.numpy(), whitened, atol=1e-4)
    best = min(alternating(weight, moment, rank, start, samples) for start in range(5))
    assert output_error(weight, ours, samples) <= best * (1 + 1e-5) + 1e-9
    assert rank == min(outputs, inputs) or output_error(weight, ours, samples) == pytest.approx(best, rel=1e-3)


def alternating(weight: Tensor, moment: Tensor, rank: int, seed: int, samples: Tensor) -> float:
    """The output error to which the factors come, each in turn the best for the other."""
    first = matrix(100 + seed, rank, weight.shape[1])
    for _ in range(300):
        second = weight @ moment @ first.T @ torch.linalg.inv(first @ moment @ first.T)
        first = torch.linalg.pinv(second) @ weight
    return output_error(weight, second @ first, samples)


@given(
    st.integers(2, 10), st.integers(2, 10), st.integers(1, 30), st.integers(0, 99), st.floats(-3, 3), st.data()
)  # fmt: skip
def test_weighting_never_errs_more_on_what_it_saw(
    outputs: int, inputs: int, rows: int, seed: int, spread: float, data: st.DataObject
) -> None:
    """Also from fewer samples than inputs, and with inputs of very different size."""
    weight = matrix(seed, outputs, inputs)
    samples = matrix(seed + 1, rows, inputs) * torch.logspace(0, spread, inputs, dtype=torch.double)
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    weighted, plain = (
        output_error(weight, low_rank(weight, rank, moment), samples) for moment in (moment_of(samples), None)
    )
    assert weighted <= plain * (1 + 1e-6) + 1e-9 * output_error(weight, 0 * weight, samples)


# The rank.


@pytest.mark.parametrize(
    "shape, strength, expected",
    [((96, 32), 50, 12), ((32, 32), 50, 8), ((128, 32), 50, 12), ((32, 128), 25, 6), ((768, 3072), 50, 307),
     ((16, 16), 1, 1), ((60, 32), 99, 20)],
)  # fmt: skip
def test_rank_by_bytes_by_hand(shape: tuple[int, int], strength: int, expected: int) -> None:
    assert rank_of(torch.ones(min(shape)), shape, strength, "bytes") == expected


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 99))
def test_rank_by_bytes_is_the_largest_that_fits(outputs: int, inputs: int, strength: int) -> None:
    rank = rank_of(torch.ones(min(outputs, inputs)), (outputs, inputs), strength, "bytes")
    room = strength * outputs * inputs
    assert 1 <= rank <= min(outputs, inputs)
    assert rank == 1 or 100 * rank * (outputs + inputs) <= room
    assert 100 * (rank + 1) * (outputs + inputs) > room


@pytest.mark.parametrize("strength, expected", [(1, 1), (63, 1), (65, 2), (94, 2), (96, 3), (99, 4)])
def test_rank_by_energy_by_hand(strength: int, expected: int) -> None:
    """Of 100: 64, 31, 3, 2."""
    values = torch.tensor([64.0, 31.0, 3.0, 2.0], dtype=torch.double).sqrt()
    assert rank_of(values, (4, 9), strength, "energy") == expected


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.integers(1, 99))
def test_rank_by_energy_is_the_smallest_that_keeps_it(values: list[float], strength: int) -> None:
    falling = sorted(values, reverse=True)
    rank = rank_of(torch.tensor(falling, dtype=torch.double), (9, 9), strength, "energy")
    squares = np.square(falling)
    wanted = strength / 100 * squares.sum()
    assert squares[:rank].sum() >= wanted * (1 - 1e-9) and squares[: rank - 1].sum() <= wanted * (1 + 1e-9)


def test_by_energy_a_matrix_stays_where_factors_are_larger(small: Any) -> None:
    compressed = Compressed(small())
    layer = compressed.model.get_submodule("encoder.layers.1")
    with torch.no_grad():
        inner = layer.get_parameter("feed_forward.inner.weight")
        inner.copy_(torch.randn(128, 3) @ torch.randn(3, 32))
    factorize(compressed, 99, Svd(rank="energy", weighting="none"), {})
    ranks = compressed.structure[0]["ranks"]
    assert ranks[6] in (1, 2, 3) and ranks[:6] + ranks[7:] == [0] * 7
    assert isinstance(layer.get_submodule("feed_forward.inner"), Factored)
    assert isinstance(layer.get_submodule("feed_forward.outer"), nn.Linear)


# The model.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", [PLAIN, PLAIN_EVERYWHERE], ids=["layers", "and embedding"])
def test_logits_are_those_of_the_dense_model_with_the_products(
    small: Any, kind: str, shape: dict[str, Any], config: Svd
) -> None:
    """Of a tied embedding in both uses; each product is numpy's best of its rank."""
    dense = small(kind, **shape).double()
    compressed = Compressed(copy.deepcopy(dense))
    factorize(compressed, 50, config, {})
    before, names = small.logits(dense), factorable(dense, config.embeddings)
    assert len(names) == LAYERS[kind] + config.embeddings * (1 if shape.get("tied", True) else UNTIED[kind])
    assert list(names) == list(factorable(compressed.model, config.embeddings))
    with torch.no_grad():
        for (name, module), rank in zip(names.items(), compressed.structure[0]["ranks"], strict=True):
            weight = module.get_parameter("weight")
            outputs, inputs = weight.shape
            assert rank == outputs * inputs // (2 * (outputs + inputs))
            left, values, right = np.linalg.svd(weight.detach().numpy())
            weight.copy_(torch.from_numpy(left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]))
            product: Any = compressed.model.get_submodule(name).weight
            assert torch.allclose(product, weight, atol=1e-12)
    assert torch.allclose(small.logits(compressed.model), small.logits(dense), rtol=0, atol=1e-10)
    assert (small.logits(dense) - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_full_rank_gives_the_same_logits(small: Any, kind: str, norm: str) -> None:
    """Rebuilt at full rank, and at the rank by bytes where the matrices have no more."""
    model = small(kind, norm=norm).double()
    whole = Compressed(copy.deepcopy(model))
    whole.change({"method": "svd", "embeddings": True, "ranks": [32] * (LAYERS[kind] + 1)})
    with torch.no_grad():
        for name, module in factorable(model, True).items():
            weight = module.get_parameter("weight")
            weight = weight if isinstance(module, nn.Linear) else weight.T
            first, second = split(weight, decompose(weight, None)[0])
            first = first if isinstance(module, nn.Linear) else first.T
            whole.model.get_parameter(f"{name}.first.weight").copy_(first)
            whole.model.get_parameter(f"{name}.second.weight").copy_(second)
    assert torch.allclose(small.logits(whole.model), small.logits(model), rtol=0, atol=1e-10)
    with torch.no_grad():
        for module in factorable(model, True).values():
            weight = module.get_parameter("weight")
            weight.copy_(weight[:, :5] @ weight[:5])
    thin = Compressed(copy.deepcopy(model))
    factorize(thin, 50, PLAIN_EVERYWHERE, {})
    assert min(thin.structure[0]["ranks"]) >= 5
    assert torch.allclose(small.logits(thin.model), small.logits(model), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["mlm", "translation"])
def test_each_layer_is_weighted_by_its_own_inputs(small: Any, kind: str) -> None:
    """The embedding never is, and a layer in factors by what goes into them."""
    model = small(kind).double()
    moments = {
        name: moment_of(matrix(seed, 200, weight.shape[1]) * torch.logspace(-1, 1, weight.shape[1], dtype=torch.double))
        for seed, (name, weight) in enumerate(matrices(model, False).items())
    }
    compressed = Compressed(copy.deepcopy(model))
    factorize(compressed, 50, Svd(embeddings=True), moments)
    again = {name.replace(".weight", ".first.weight"): moment for name, moment in moments.items()}
    twice = Compressed(copy.deepcopy(compressed.model))
    factorize(twice, 20, Svd(embeddings=True), again)
    for name, module in factorable(model, True).items():
        weight = module.get_parameter("weight").detach()
        once: Any = compressed.model.get_submodule(name)
        less: Any = twice.model.get_submodule(name)
        ranks = [part.first.weight.shape[1 if "embedding" in name else 0] for part in (once, less)]
        moment = moments.get(f"{name}.weight")
        if moment is None:
            weight = weight.T
        for part, rank in zip((once, less), ranks, strict=True):
            product = part.weight.T if moment is None else part.weight
            assert torch.allclose(product, low_rank(weight, rank, moment), atol=1e-6), name
        assert ranks[1] < ranks[0]


def test_a_second_step_takes_more_or_nothing(small: Any) -> None:
    compressed = Compressed(small())
    for strength in (40, 60, 20):
        factorize(compressed, strength, PLAIN, {})
    first, second, third = (entry["ranks"] for entry in compressed.structure)
    assert first == [9, 6, 10, 10] * 2 and second == [0] * 8 and third == [4, 3, 5, 5] * 2
    fresh: nn.Module = small(seed=1)
    for entry in compressed.structure:
        fresh = rebuild(fresh, entry)
    fresh.load_state_dict(compressed.model.state_dict())
    assert torch.equal(small.logits(fresh), small.logits(compressed.model))


# Costs.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("config", [PLAIN, PLAIN_EVERYWHERE], ids=["layers", "and embedding"])
def test_the_packed_file_gives_the_model_back_and_is_smaller(
    small: Any, tmp_path: Path, kind: str, config: Svd
) -> None:
    model = small(kind)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    compressed = Compressed(model)
    factorize(compressed, 50, config, {})
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, small(kind, seed=1))
    assert back.structure == compressed.structure
    assert torch.equal(small.logits(back.model), small.logits(compressed.model))
    path.write_bytes(pack(compressed, torch.bfloat16, {}))
    layers = 4 if kind == "translation" else 2
    saved = layers * (12 * 32**2 - 12 * 128 - 8 * 64 - 2 * 12 * 160)
    saved += 2 * (4 * 32**2 - 2 * 8 * 64 - 10 * 96) if kind == "translation" else 0  # attention to the source
    saved += (60 * 32 - 10 * (60 + 32)) if config.embeddings else 0
    assert sum(tensor.nbytes for tensor in load(path.read_bytes()).values()) == 2 * (numbers - saved)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("before", [None, "structured"])
def test_flops_are_those_of_the_products_that_are_made(
    small: Any, kind: str, embeddings: bool, tied: bool, before: str | None
) -> None:
    compressed = Compressed(small(kind, tied=tied))
    dense, _ = small.flops(compressed.model)
    if before:
        shrink(compressed, 0.3, Structured(scope="global"), magnitude_scores(compressed.model))
    factorize(compressed, 40, Svd(weighting="none", embeddings=embeddings), {})
    counted, made = small.flops(compressed.model)
    assert counted == made < 0.7 * dense


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("recipe", ["svd50+quant8", "structured30+svd90+quant4"])
def test_the_factors_can_be_quantized(small: Any, tmp_path: Path, kind: str, embeddings: bool, recipe: str) -> None:
    steps = {"svd": {"embeddings": embeddings}, "quant": {"embeddings": embeddings, "group_size": 16}}
    *_, step = parse_recipe(recipe, steps, SHAPE)
    compressed = Compressed(small(kind))
    if "structured" in recipe:
        shrink(compressed, 0.3, Structured(), magnitude_scores(compressed.model))
    factorize(compressed, 50 if "svd50" in recipe else 90, Svd(weighting="none", embeddings=embeddings), {})
    exact = small.logits(compressed.model)
    quant.apply(compressed, step, None)  # type: ignore[arg-type]  # needs no bench
    names = factorable(compressed.model, embeddings)
    factors = {f"{name}.{which}.weight" for name in names for which in ("first", "second")}
    heads = {"mlm": {"head.weight"}, "classification": {"head.weight", "projection.weight"}}.get(kind, set())
    assert set(compressed.codes) == factors | heads
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    logits = small.logits(unpack(path, small(kind, seed=1)).model)
    assert torch.equal(logits, small.logits(compressed.model))
    assert (logits - exact).abs().max() > 0 and ("quant4" in recipe or torch.allclose(logits, exact, atol=0.2))


def test_matrices_without_embeddings_leave_both_factors_out(small: Any) -> None:
    compressed = Compressed(small())
    factorize(compressed, 50, PLAIN_EVERYWHERE, {})
    both, none = matrices(compressed.model, True), matrices(compressed.model, False)
    assert set(both) - set(none) == {"encoder.embedding.first.weight", "encoder.embedding.second.weight"}


@pytest.mark.parametrize(
    "recipe, changes, words",
    [
        ("svd0", {}, "recipes: keeping 0 %: must lie between 1 and 99 per cent of the weights"),
        ("svd100", {"rank": "energy"}, "recipes: keeping 100 %: must lie between 1 and 99 per cent of the squared"),
        ("svd50", {"rank": "half"}, "steps.svd.rank='half': must be 'bytes' or 'energy'"),
        ("svd50", {"weighting": "fisher"}, "steps.svd.weighting='fisher': must be 'none' or 'activations'"),
        ("svd50", {"calibration_batches": 0}, "steps.svd.calibration_batches=0: must be greater than or equal to 1"),
        ("svd50", {"recovery": {"target": 2}}, "steps.svd.recovery.target=2: must be less than or equal to 1"),
        ("prune30+svd50", {}, "svd50 changes shapes and must stand before prune30"),
        ("quant8+svd50", {}, "quant8 must be the last step"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(recipe: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe, {"svd": changes}, SHAPE)
    assert words in str(error.value)
