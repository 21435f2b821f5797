"""Structured pruning: what is left computes what it did before, and costs really fall."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.compression import quant
from train_then_compress.compression.compressed import Compressed, rebuild, weight_errors
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.structured import magnitude_scores, shrink
from train_then_compress.compression.svd import factorize
from train_then_compress.config import ConfigError, RobertaConfig, parse_recipe
from train_then_compress.config.steps import Structured, Svd
from train_then_compress.cost.flops import forward_flops
from train_then_compress.data.prepare import PAD
from train_then_compress.models.roberta import Classifier, MaskedLM

VOCABULARY, LENGTH = 60, 12
SHAPES: list[dict[str, Any]] = [
    {"norm": "pre"}, {"norm": "post"}, {"positions": "rotary"}, {"positions": "sinusoidal", "norm": "post"},
]  # fmt: skip
KINDS = ["mlm", "classification"]


def new_model(kind: str = "mlm", seed: int = 0, **shape: Any) -> nn.Module:
    """Four heads of 8 and 128 FFN units a layer; far from initialization, so that every part matters."""
    torch.manual_seed(seed)
    config = RobertaConfig(**{"depth": 2, "width": 32, "head_size": 8, **shape})
    model = MaskedLM(config, VOCABULARY, LENGTH) if kind == "mlm" else Classifier(config, VOCABULARY, LENGTH, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def some_tokens(rows: int = 3) -> Tensor:
    tokens = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    tokens[-1, 8:] = PAD
    return tokens


def logits_of(model: nn.Module) -> Tensor:
    tokens = some_tokens()
    with torch.inference_mode():
        logits: Tensor = model(tokens, torch.arange(tokens.numel())) if isinstance(model, MaskedLM) else model(tokens)
    return logits


def layers_of(model: nn.Module) -> list[Any]:
    return list(model.get_submodule("encoder.layers").children())


def half_of(depth: int, heads: int = 4, ffn: int = 128) -> dict[str, list[Tensor]]:
    """For each layer true where a unit shall stay: half of them, at random."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"heads": heads, "ffn": ffn}
    return {
        unit: [torch.randperm(size, generator=generator) < size // 2 for _ in range(depth)]
        for unit, size in sizes.items()
    }


def as_scores(stays: dict[str, list[Tensor]], layers: list[float]) -> dict[str, list[Tensor]]:
    scores = {unit: [stay.double() for stay in each] for unit, each in stays.items()}
    return scores | {"layers": [torch.tensor([score], dtype=torch.double) for score in layers]}


def silence(model: nn.Module, stays: dict[str, list[Tensor]]) -> None:
    """Zero the columns by which the other units are heard."""
    with torch.no_grad():
        for number, layer in enumerate(layers_of(model)):
            heads = stays["heads"][number].repeat_interleave(layer.attention.head_size)
            layer.attention.output.weight[:, ~heads] = 0
            layer.feed_forward.outer.weight[:, ~stays["ffn"][number]] = 0


# What is left computes what it did before.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("units", [["heads"], ["ffn"], ["heads", "ffn"]], ids=str)
def test_logits_are_those_of_the_dense_model_with_the_units_silenced(
    kind: str, shape: dict[str, Any], units: list[str]
) -> None:
    model = new_model(kind, **shape).double()
    stays = half_of(2)
    silenced, before = copy.deepcopy(model), logits_of(model)
    compressed = Compressed(model)
    shrink(compressed, 0.5, Structured(units=units), as_scores(stays, [1, 1]))  # type: ignore[arg-type]
    everything = {unit: [torch.ones_like(stay) for stay in each] for unit, each in stays.items()}
    silence(silenced, everything | {unit: stays[unit] for unit in units})
    logits = logits_of(compressed.model)
    assert torch.allclose(logits, logits_of(silenced), rtol=0, atol=1e-12)
    assert (logits - before).abs().max() > 0.01
    for layer in layers_of(compressed.model):
        heads, ffn = (2 if "heads" in units else 4), (64 if "ffn" in units else 128)
        assert layer.attention.heads == heads and layer.attention.query_key_value.weight.shape == (24 * heads, 32)
        assert layer.attention.output.weight.shape == (32, 8 * heads) and layer.feed_forward.inner.bias.shape == (ffn,)
        assert layer.feed_forward.inner.weight.shape == (ffn, 32) == layer.feed_forward.outer.weight.shape[::-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("units", [["layers"], ["layers", "heads", "ffn"]], ids=str)
def test_removing_a_layer_is_skipping_it(kind: str, norm: str, units: list[str]) -> None:
    model = new_model(kind, depth=4, norm=norm).double()
    stays = half_of(4)
    reference = copy.deepcopy(model)
    if "heads" in units:
        silence(reference, stays)
    for number in (0, 2):
        layers_of(reference)[number].register_forward_hook(lambda layer, inputs, output: inputs[0])
    compressed = Compressed(model)
    shrink(compressed, 0.5, Structured(units=units), as_scores(stays, [1, 3, 2, 4]))  # type: ignore[arg-type]
    assert len(layers_of(compressed.model)) == 2 and compressed.structure[0]["layers"] == [1, 3]
    assert torch.allclose(logits_of(compressed.model), logits_of(reference), rtol=0, atol=1e-12)


def test_a_model_of_low_rank_is_shrunk_like_its_product() -> None:
    """svd before structured pruning."""
    compressed = Compressed(new_model().double())
    factorize(compressed, 60, Svd(weighting="none"), {})
    stays = half_of(2)
    silenced = copy.deepcopy(compressed.model)
    with torch.no_grad():
        for number, layer in enumerate(layers_of(silenced)):
            heads = stays["heads"][number].repeat_interleave(8)
            layer.attention.output.first.weight[:, ~heads] = 0
            layer.feed_forward.outer.first.weight[:, ~stays["ffn"][number]] = 0
    shrink(compressed, 0.5, Structured(), as_scores(stays, [1, 1]))
    assert torch.allclose(logits_of(compressed.model), logits_of(silenced), rtol=0, atol=1e-12)
    assert magnitude_scores(compressed.model)["heads"][0].shape == (2,)


# Costs.


def parameters_of(layer_heads: int, ffn: int) -> int:
    """Of a layer of width 32 with heads of 8."""
    size = 8 * layer_heads
    return 3 * size * 33 + 32 * size + 32 + ffn * 33 + 32 * ffn + 32 + 4 * 32


def test_the_packed_file_gives_the_model_back_and_is_smaller(tmp_path: Path) -> None:
    model = new_model(depth=3)
    outside = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    compressed = Compressed(model)
    shrink(compressed, 0.4, Structured(units=["heads", "ffn", "layers"], scope="global"), magnitude_scores(model))
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, new_model(seed=1, depth=3))
    assert back.structure == compressed.structure and torch.equal(logits_of(back.model), logits_of(compressed.model))
    (entry,) = compressed.structure
    assert len(entry["layers"]) == 2 and sum(entry["heads"]) == 8 - 3 and sum(entry["ffn"]) == 256 - round(0.4 * 256)
    path.write_bytes(pack(compressed, torch.bfloat16, {}))
    inside = sum(parameters_of(heads, ffn) for heads, ffn in zip(entry["heads"], entry["ffn"], strict=True))
    assert sum(tensor.nbytes for tensor in load(path.read_bytes()).values()) == 2 * (outside + inside)


def test_changes_in_a_row_are_relative_to_each_other(tmp_path: Path) -> None:
    compressed = Compressed(new_model(depth=4))
    for share, units in ((0.25, ["heads", "ffn", "layers"]), (0.5, ["heads", "ffn", "layers"]), (0.75, ["ffn"])):
        config = Structured(units=units, scope="global")  # type: ignore[arg-type]
        shrink(compressed, share, config, magnitude_scores(compressed.model))
    first, second, third = compressed.structure
    assert len(first["layers"]) == 3 and sum(first["heads"]) == 9 and sum(first["ffn"]) == 3 * 96
    assert len(second["layers"]) == 2 and max(second["layers"]) <= 2 and sum(second["heads"]) == 4
    assert third["layers"] == [0, 1] and third["heads"] == second["heads"] and sum(third["ffn"]) == 64
    fresh: nn.Module = new_model(seed=1, depth=4)
    for entry in compressed.structure:
        fresh = rebuild(fresh, entry)
    fresh.load_state_dict(compressed.model.state_dict())
    assert torch.equal(logits_of(fresh), logits_of(compressed.model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [["heads"], ["ffn"], ["heads", "ffn", "layers"]], ids=str)
def test_flops_are_those_of_the_products_that_are_made(kind: str, units: list[str]) -> None:
    model = new_model(kind)
    tokens = some_tokens()[:2]
    dense = forward_flops(model)
    compressed = Compressed(model)
    shrink(compressed, 0.5, Structured(units=units, scope="global"), magnitude_scores(model))  # type: ignore[arg-type]
    counted = forward_flops(compressed.model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        if kind == "mlm":
            compressed.model(tokens, torch.arange(5), False)
        else:
            compressed.model(tokens, False)
    predictions = 5 if kind == "mlm" else 2
    total = counted.per_token(LENGTH) * tokens.numel() + counted.per_prediction * predictions
    assert total == counter.get_total_flops()
    assert counted.per_token(LENGTH) < 0.9 * dense.per_token(LENGTH)
    assert counted.per_prediction == dense.per_prediction


@pytest.mark.parametrize("percent", [30, 50])
def test_what_is_left_can_be_quantized(tmp_path: Path, percent: int) -> None:
    """90 FFN units are left of 128 by structured30: 32 do not divide them."""
    compressed = Compressed(new_model())
    shrink(compressed, percent / 100, Structured(), magnitude_scores(compressed.model))
    *_, step = parse_recipe(f"structured{percent}+quant4", {}, RobertaConfig(depth=2, width=32, head_size=8))
    quant.apply(compressed, step, None)  # type: ignore[arg-type]  # needs no bench
    outer = compressed.codes["encoder.layers.0.feed_forward.outer.weight"]
    assert outer.codes.shape == (32, {30: 90, 50: 64}[percent])
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    assert torch.equal(logits_of(unpack(path, new_model(seed=1)).model), logits_of(compressed.model))


def test_where_layers_are_gone_the_others_are_not_taken_for_them() -> None:
    dense = new_model(depth=3)
    compressed = Compressed(copy.deepcopy(dense))
    shrink(compressed, 0.3, Structured(units=["layers"]), as_scores(half_of(3), [1, 2, 3]))
    weights = [{name: p.detach() for name, p in model.named_parameters()} for model in (dense, compressed.model)]
    total, errors = weight_errors(*weights)
    assert total == 0 and set(errors) == {"encoder.embedding.weight", "encoder.positions", "head.weight"}


# What is refused.


@pytest.mark.parametrize(
    "recipe, changes, words",
    [
        ("structured0", {}, "recipes: removing 0 %: must lie between 1 and 99 per cent of the units"),
        ("structured100", {}, "recipes: removing 100 %: must lie between 1 and 99 per cent of the units"),
        ("structured50", {"units": ["neurons"]}, "steps.structured.units.0='neurons': must be 'heads', 'ffn' or"),
        ("structured50", {"units": []}, "steps.structured.units=[]: must be"),
        ("structured90", {"units": ["layers"]}, "structured90 would remove every layer of model.depth=2"),
        ("structured10", {"units": ["layers"]}, "structured10 rounds to no unit of this model"),
        ("structured10", {"units": ["heads"]}, "structured10 rounds to no unit of this model: 2 heads a layer"),
        ("structured50", {"importance": "random"}, "steps.structured.importance='random': must be 'taylor' or"),
        ("structured50", {"scope": "model"}, "steps.structured.scope='model': must be 'layer' or 'global'"),
        ("structured50", {"calibration_batches": 0}, "steps.structured.calibration_batches=0: must be greater"),
        ("structured50", {"increment": 0}, "steps.structured.increment=0: must be greater than or equal to 1"),
        ("prune30+structured50", {}, "structured50 changes shapes and must stand before prune30"),
        ("quant4+structured50", {}, "quant4 must be the last step"),
        ("structured50+structured30", {}, "structured30 must prune more than structured50 before it"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(recipe: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe, {"structured": changes}, RobertaConfig(depth=2, width=32, head_size=16))
    assert words in str(error.value)


def test_a_single_layer_or_head_is_never_removed() -> None:
    one = RobertaConfig(depth=1, width=32, head_size=32)
    with pytest.raises(ConfigError, match=r"would remove every layer of model\.depth=1; at least one must stay"):
        parse_recipe("structured60", {"structured": {"units": ["ffn", "layers"]}}, one)
    with pytest.raises(ConfigError, match="rounds to no unit of this model: 1 heads a layer"):
        parse_recipe("structured90", {"structured": {"units": ["heads"]}}, one)
    (step,) = parse_recipe("structured90", {}, one)
    compressed = Compressed(new_model(depth=1, head_size=32))
    shrink(compressed, step.strength / 100, Structured(), magnitude_scores(compressed.model))
    assert compressed.structure[0] | {"ffn": None} == {"method": "structured", "layers": [0], "heads": [1], "ffn": None}
