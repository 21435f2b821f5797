"""Structured pruning: what is left computes what it did before, and costs really fall."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from train_then_compress.compression import quant
from train_then_compress.compression.compressed import Compressed, rebuild, weight_errors
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.structured import magnitude_scores, shrink
from train_then_compress.compression.svd import factorize
from train_then_compress.config import ConfigError, RobertaConfig, TransformerConfig, parse_recipe
from train_then_compress.config.steps import Structured, Svd
from train_then_compress.models.factored import Factored

SHAPES: list[dict[str, Any]] = [
    {"norm": "pre"}, {"norm": "post"}, {"positions": "rotary"}, {"positions": "sinusoidal", "norm": "post"},
]  # fmt: skip
KINDS = ["mlm", "classification", "translation"]


def half_of(model: nn.Module) -> dict[str, Tensor]:
    """For each attention and feed-forward network true where a unit shall stay: half of them, at random."""
    generator = torch.Generator().manual_seed(7)
    modules: dict[str, Any] = dict(model.named_modules())
    sizes = {name: module.heads for name, module in modules.items() if name.endswith("attention")}
    sizes |= {name: len(module.inner.bias) for name, module in modules.items() if name.endswith("feed_forward")}
    return {name: torch.randperm(size, generator=generator) < size // 2 for name, size in sizes.items()}


def as_scores(model: nn.Module, stays: dict[str, Tensor], layers: list[float]) -> dict[str, Tensor]:
    """``layers``: those of the encoder, and again of the decoder."""
    scores = {name: stay.double() for name, stay in stays.items()}
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    return scores | {name: torch.tensor([layers[number % len(layers)]]) for number, name in enumerate(names)}


def silence(model: nn.Module, stays: dict[str, Tensor]) -> None:
    """Zero the columns by which the other units are heard."""
    with torch.no_grad():
        for name, stay in stays.items():
            module: Any = model.get_submodule(name)
            if name.endswith("feed_forward"):
                heard(module.outer)[:, ~stay] = 0
            else:
                heard(module.output)[:, ~stay.repeat_interleave(module.head_size)] = 0


def heard(linear: Any) -> Tensor:
    """The weights, or first factor, that meet the inputs."""
    weight: Tensor = (linear.first if isinstance(linear, Factored) else linear).weight
    return weight


def of_units(stays: dict[str, Tensor], units: list[str]) -> dict[str, Tensor]:
    return {name: stay for name, stay in stays.items() if ("ffn" if name.endswith("forward") else "heads") in units}


# What is left computes what it did before.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("units", [["heads"], ["ffn"], ["heads", "ffn"]], ids=str)
def test_logits_are_those_of_the_dense_model_with_the_units_silenced(
    small: Any, kind: str, shape: dict[str, Any], units: list[str]
) -> None:
    model = small(kind, **shape).double()
    stays = half_of(model)
    silenced, before = copy.deepcopy(model), small.logits(model)
    compressed = Compressed(model)
    shrink(compressed, 0.5, Structured(units=units), as_scores(model, stays, [1, 1]))  # type: ignore[arg-type]
    silence(silenced, of_units(stays, units))
    logits = small.logits(compressed.model)
    assert torch.allclose(logits, small.logits(silenced), rtol=0, atol=1e-12)
    assert (logits - before).abs().max() > 0.01
    heads, ffn = (2 if "heads" in units else 4), (64 if "ffn" in units else 128)
    for layer in small.layers(compressed.model):
        assert layer.attention.heads == heads and layer.attention.query_key_value.weight.shape == (24 * heads, 32)
        assert layer.attention.output.weight.shape == (32, 8 * heads) and layer.feed_forward.inner.bias.shape == (ffn,)
        assert layer.feed_forward.inner.weight.shape == (ffn, 32) == layer.feed_forward.outer.weight.shape[::-1]
        if hasattr(layer, "cross_attention"):
            cross = layer.cross_attention
            assert cross.heads == heads and cross.query.weight.shape == (8 * heads, 32)
            assert cross.key_value.weight.shape == (16 * heads, 32) == (2 * cross.output.weight.shape[1], 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("units", [["layers"], ["layers", "heads", "ffn"]], ids=str)
def test_removing_a_layer_is_skipping_it(small: Any, kind: str, norm: str, units: list[str]) -> None:
    model = small(kind, depth=4, norm=norm).double()
    stays = half_of(model)
    reference = copy.deepcopy(model)
    silence(reference, of_units(stays, units))
    for number, layer in enumerate(small.layers(reference)):
        if number % 4 in (0, 2):
            layer.register_forward_hook(lambda layer, inputs, output: inputs[0])
    compressed = Compressed(model)
    scores = as_scores(model, stays, [1, 3, 2, 4])
    shrink(compressed, 0.5, Structured(units=units), scores)  # type: ignore[arg-type]
    left = [1, 3, 5, 7] if kind == "translation" else [1, 3]
    assert len(small.layers(compressed.model)) == len(left) and compressed.structure[0]["layers"] == left
    assert torch.allclose(small.logits(compressed.model), small.logits(reference), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_low_rank_is_shrunk_like_its_product(small: Any, kind: str) -> None:
    """svd before structured pruning."""
    compressed = Compressed(small(kind).double())
    factorize(compressed, 60, Svd(weighting="none"), {})
    stays = half_of(compressed.model)
    silenced = copy.deepcopy(compressed.model)
    silence(silenced, stays)
    shrink(compressed, 0.5, Structured(), as_scores(compressed.model, stays, [1, 1]))
    assert torch.allclose(small.logits(compressed.model), small.logits(silenced), rtol=0, atol=1e-12)
    assert magnitude_scores(compressed.model)["encoder.layers.0.attention"].shape == (2,)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_a_smaller_translator_decodes_as_it_reads(small: Any, positions: str) -> None:
    """Step by step with caches, for layers of unequal heads and a factored embedding."""
    compressed = Compressed(small("translation", depth=3, decoder_depth=4, positions=positions))
    config = Structured(units=["heads", "ffn", "layers"], scope="global")
    shrink(compressed, 0.4, config, magnitude_scores(compressed.model))
    factorize(compressed, 60, Svd(weighting="none", embeddings=True), {})
    model: Any = compressed.model
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (2, 2)
    assert len({layer.attention.heads for layer in model.decoder}) == 2
    source, target = small.tokens(), small.targets()
    expected = small.logits(model).view(*target.shape, -1)
    with torch.inference_mode():
        memory, cache = model.remember(source), model.new_cache(len(source))
        for place in range(target.shape[1]):
            logits = model.step(target[:, place, None], memory, cache)[:, 0]
            assert torch.allclose(logits, expected[:, place], atol=1e-4)


# Costs.


def parameters_of(layer_heads: int, ffn: int) -> int:
    """Of a layer of width 32 with heads of 8."""
    size = 8 * layer_heads
    return 3 * size * 33 + 32 * size + 32 + ffn * 33 + 32 * ffn + 32 + 4 * 32


def test_the_packed_file_gives_the_model_back_and_is_smaller(small: Any, tmp_path: Path) -> None:
    model = small(depth=3)
    outside = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    compressed = Compressed(model)
    shrink(compressed, 0.4, Structured(units=["heads", "ffn", "layers"], scope="global"), magnitude_scores(model))
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, small(seed=1, depth=3))
    assert back.structure == compressed.structure
    assert torch.equal(small.logits(back.model), small.logits(compressed.model))
    (entry,) = compressed.structure
    assert len(entry["layers"]) == 2 and sum(entry["heads"]) == 8 - 3 and sum(entry["ffn"]) == 256 - round(0.4 * 256)
    path.write_bytes(pack(compressed, torch.bfloat16, {}))
    inside = sum(parameters_of(heads, ffn) for heads, ffn in zip(entry["heads"], entry["ffn"], strict=True))
    assert sum(tensor.nbytes for tensor in load(path.read_bytes()).values()) == 2 * (outside + inside)


@pytest.mark.parametrize("kind", ["mlm", "translation"])
def test_changes_in_a_row_are_relative_to_each_other(small: Any, kind: str) -> None:
    compressed = Compressed(small(kind, depth=4))
    for share, units in ((0.25, ["heads", "ffn", "layers"]), (0.5, ["heads", "ffn", "layers"]), (0.75, ["ffn"])):
        config = Structured(units=units, scope="global")  # type: ignore[arg-type]
        shrink(compressed, share, config, magnitude_scores(compressed.model))
    sides, attentions = (2, 3) if kind == "translation" else (1, 1)
    first, second, third = compressed.structure
    assert [len(entry["layers"]) for entry in compressed.structure] == [3 * sides, 2 * sides, 2 * sides]
    assert sum(first["heads"]) == 9 * attentions and sum(first["ffn"]) == 3 * 96 * sides
    assert max(second["layers"]) < 3 * sides and sum(second["heads"]) == 4 * attentions
    assert third["layers"] == list(range(2 * sides)) and third["heads"] == second["heads"]
    assert sum(third["ffn"]) == 64 * sides
    fresh: nn.Module = small(kind, seed=1, depth=4)
    for entry in compressed.structure:
        fresh = rebuild(fresh, entry)
    fresh.load_state_dict(compressed.model.state_dict())
    assert torch.equal(small.logits(fresh), small.logits(compressed.model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [["heads"], ["ffn"], ["heads", "ffn", "layers"]], ids=str)
def test_flops_are_those_of_the_products_that_are_made(small: Any, kind: str, units: list[str]) -> None:
    model = small(kind)
    dense, _ = small.flops(model)
    compressed = Compressed(model)
    shrink(compressed, 0.5, Structured(units=units, scope="global"), magnitude_scores(model))  # type: ignore[arg-type]
    counted, made = small.flops(compressed.model)
    assert counted == made < 0.9 * dense


@pytest.mark.parametrize("kind", ["mlm", "translation"])
@pytest.mark.parametrize("percent", [30, 50])
def test_what_is_left_can_be_quantized(small: Any, tmp_path: Path, percent: int, kind: str) -> None:
    """90 FFN units are left of 128 by structured30: 32 do not divide them."""
    compressed = Compressed(small(kind))
    shrink(compressed, percent / 100, Structured(), magnitude_scores(compressed.model))
    *_, step = parse_recipe(f"structured{percent}+quant4", {}, RobertaConfig(depth=2, width=32, head_size=8))
    quant.apply(compressed, step, None)  # type: ignore[arg-type]  # needs no bench
    outer = compressed.codes["encoder.layers.0.feed_forward.outer.weight"]
    assert outer.codes.shape == (32, {30: 90, 50: 64}[percent])
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    assert torch.equal(small.logits(unpack(path, small(kind, seed=1)).model), small.logits(compressed.model))


def test_where_layers_are_gone_the_others_are_not_taken_for_them(small: Any) -> None:
    dense = small(depth=3)
    compressed = Compressed(copy.deepcopy(dense))
    shrink(compressed, 0.3, Structured(units=["layers"]), as_scores(dense, half_of(dense), [1, 2, 3]))
    total, errors = weight_errors(*(weights_of(model) for model in (dense, compressed.model)))
    assert total == 0 and set(errors) == {"encoder.embedding.weight", "encoder.positions", "head.weight"}


def test_a_side_that_keeps_its_layers_is_compared(small: Any) -> None:
    """Of three layers of an encoder one goes, of one layer of a decoder none."""
    dense = small("translation", depth=3, decoder_depth=1)
    compressed = Compressed(copy.deepcopy(dense))
    shrink(compressed, 0.3, Structured(units=["layers"]), as_scores(dense, half_of(dense), [1, 2, 3, 4]))
    total, errors = weight_errors(*(weights_of(model) for model in (dense, compressed.model)))
    decoder = {name for name, p in dense.named_parameters() if name.startswith("decoder.layers.") and p.dim() == 2}
    assert total == 0 and set(errors) == {"embedding.weight"} | decoder and len(decoder) == 7


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


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


def test_neither_side_of_a_translator_loses_every_layer() -> None:
    settings = {"structured": {"units": ["layers"]}}
    shape = TransformerConfig(depth=6, decoder_depth=1, width=32, head_size=16)
    parse_recipe("structured30", settings, shape, "translation")
    with pytest.raises(ConfigError, match=r"would remove every layer of model\.depth=6\.1; at least one must stay"):
        parse_recipe("structured60", settings, shape, "translation")


def test_a_single_layer_or_head_is_never_removed(small: Any) -> None:
    one = RobertaConfig(depth=1, width=32, head_size=32)
    with pytest.raises(ConfigError, match=r"would remove every layer of model\.depth=1; at least one must stay"):
        parse_recipe("structured60", {"structured": {"units": ["ffn", "layers"]}}, one)
    with pytest.raises(ConfigError, match="rounds to no unit of this model: 1 heads a layer"):
        parse_recipe("structured90", {"structured": {"units": ["heads"]}}, one)
    (step,) = parse_recipe("structured90", {}, one)
    compressed = Compressed(small(depth=1, head_size=32))
    shrink(compressed, step.strength / 100, Structured(), magnitude_scores(compressed.model))
    assert compressed.structure[0] | {"ffn": None} == {"method": "structured", "layers": [0], "heads": [1], "ffn": None}
