"""Layers on packed 4-bit codes: exact where unpacked, within bf16's rounding by torch's kernel, and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from train_then_compress.compression.compressed import Codebook, Codes, Compressed, matrices
from train_then_compress.compression.packed_linear import (
    Int4Linear,
    PackedEmbedding,
    PackedLinear,
    kernel_group,
    to_packed_linears,
)
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.prune import prune
from train_then_compress.compression.quant import quantize
from train_then_compress.config import RobertaConfig
from train_then_compress.config.steps import Prune, Quant
from train_then_compress.models.layers import TokenEmbedding
from train_then_compress.models.roberta import Classifier, MaskedLM

VOCABULARY, LENGTH = 96, 16
SHAPE = RobertaConfig(depth=2, width=64, head_size=16)


def codes_of(rows: int, columns: int, quant: Quant, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return quantize(weight + 0.2 * torch.randn(rows, 1, generator=generator), 4, quant)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity, group_size, columns, group",
    [("group", 32, 64, 32), ("group", 32, 32, 32), ("group", 64, 128, 64), ("group", 96, 192, 32),
     ("group", 128, 256, 128), ("group", 256, 512, 256), ("channel", 32, 320, 64), ("channel", 32, 1024, 256),
     ("tensor", 32, 128, 128)],
)  # fmt: skip
def test_torchs_kernel_is_within_the_stated_bound(
    symmetric: bool, granularity: str, group_size: int, columns: int, group: int
) -> None:
    """Against float64 arithmetic on the dequantized weights."""
    rows, u = 48, 2.0**-8
    codes = codes_of(rows, columns, Quant(symmetric=symmetric, granularity=granularity, group_size=group_size))  # type: ignore[arg-type]
    assert kernel_group(codes) == group
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(2))
    weight = codes.dequantize().double()
    product = x.double() @ weight.T
    size = columns // codes.scale.shape[1]
    scale, zero = (part.double().repeat_interleave(size, 1).expand(rows, -1) for part in (codes.scale, codes.zero))
    terms = weight.abs() + scale * ((codes.codes.double() - 8).abs() + (8 - zero).abs())
    bound = 1.02 * u * (product.abs() + x.abs().double() @ terms.T) + 1e-5
    layer = Int4Linear(codes, bias)
    y = layer(x)
    assert y.shape == (2, 5, rows) and y.dtype == torch.float32
    error = (y.double() - product - bias.double()).abs()
    assert (error <= bound).all()
    assert float(error.norm() / product.norm()) < 0.01
    assert torch.equal(Int4Linear(codes, None)(x[0]), Int4Linear(codes, None)(x)[0])


def test_pruned_weights_are_exactly_zero_in_the_kernel() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    used = Int4Linear(quantize(weight, 4, Quant()), None)(torch.eye(64)).T
    assert (used[weight == 0] == 0).all() and (used != 0).float().mean() > 0.3


@given(
    rows=st.integers(1, 20), columns=st.integers(1, 24), size=st.sampled_from([2, 3, 5, 8]), symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", "group"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_unpacking_is_exact_for_any_shape(
    rows: int, columns: int, size: int, symmetric: bool, granularity: str, seed: int
) -> None:
    quant = Quant(symmetric=symmetric, granularity=granularity, group_size=size)  # type: ignore[arg-type]
    codes = codes_of(rows, columns, quant, seed)
    dense = codes.dequantize()
    linear, embedding = PackedLinear(codes, None), PackedEmbedding(codes)
    assert torch.equal(linear.weight, dense) and torch.equal(embedding.weight, dense)
    which = torch.randint(rows, (3, 2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(embedding(which), dense[which])
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(linear(x), nn.functional.linear(x, dense))


def compressed_model(quant: Quant, bits: int = 4, sparsity: float = 0.0, model: nn.Module | None = None) -> Compressed:
    if model is None:
        torch.manual_seed(0)
        model = MaskedLM(SHAPE, VOCABULARY, LENGTH)
    compressed = Compressed(model.eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if sparsity:
            prune(compressed, sparsity, Prune())
        for name, weight in matrices(model, quant.embeddings).items():
            compressed.codes[name] = quantize(weight.detach(), bits, quant)
            weight.copy_(compressed.codes[name].dequantize())
    return compressed


def logits_of(model: nn.Module) -> Tensor:
    tokens = torch.arange(5, 5 + 2 * LENGTH).view(2, LENGTH)
    with torch.inference_mode():
        logits: Tensor = model(tokens, torch.arange(2 * LENGTH))
    return logits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
@pytest.mark.parametrize("group_size, kind", [(32, Int4Linear), (16, PackedLinear)])
def test_a_whole_model_agrees_with_its_dense_form(
    symmetric: bool, sparsity: float, group_size: int, kind: type[nn.Module]
) -> None:
    compressed = compressed_model(Quant(symmetric=symmetric, group_size=group_size), sparsity=sparsity)
    before = {name: value.clone() for name, value in compressed.model.state_dict().items()}
    packed = to_packed_linears(compressed)
    linear = [module for name, module in packed.named_modules() if f"{name}.weight" in compressed.codes]
    assert {type(module) for module in linear} == {kind, PackedEmbedding} and len(linear) == 2 * 4 + 2
    expected, logits = logits_of(compressed.model), logits_of(packed)
    if kind is PackedLinear:
        assert torch.equal(logits, expected)
    else:
        assert 0 < float((logits - expected).norm() / expected.norm()) < 0.01
    assert all(torch.equal(value, before[name]) for name, value in compressed.model.state_dict().items())


def test_factored_layers_and_embeddings_are_packed_too() -> None:
    """The second factor of the embedding is used both ways round, and for that unpacked."""
    torch.manual_seed(0)
    changed = Compressed(MaskedLM(SHAPE, VOCABULARY, LENGTH))
    changed.change({"method": "svd", "embeddings": True, "ranks": [48, 0, 0, 0, 0, 20, 0, 0, 32]})
    compressed = compressed_model(Quant(), model=changed.model)
    packed = to_packed_linears(compressed)
    kinds = {name: type(module) for name, module in packed.named_modules()}
    layers = "encoder.layers"
    assert kinds["encoder.embedding.first"] is PackedEmbedding and kinds["encoder.embedding.second"] is PackedLinear
    assert kinds[f"{layers}.0.attention.query_key_value.first"] is Int4Linear
    assert kinds[f"{layers}.0.attention.query_key_value.second"] is PackedLinear  # two groups of 24
    assert kinds[f"{layers}.1.attention.output.first"] is PackedLinear  # 20 outputs
    expected, logits = logits_of(compressed.model), logits_of(packed)
    assert 0 < float((logits - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("ranks", [None, [12] * 12], ids=["dense", "factored"])
def test_a_translator_reads_and_decodes_on_packed_layers(small: Any, ranks: list[int] | None) -> None:
    """By torch's kernel, or unpacked where factors are too thin for it."""
    changed = Compressed(small("translation", depth=1))
    if ranks:
        changed.change({"method": "svd", "embeddings": True, "ranks": ranks})
    compressed = compressed_model(Quant(), model=changed.model)
    packed: Any = to_packed_linears(compressed)
    linear = [module for name, module in packed.named_modules() if f"{name}.weight" in compressed.codes]
    assert all(isinstance(module, Int4Linear | PackedLinear | PackedEmbedding) for module in linear)
    assert len(linear) == (24 if ranks else 12) == len(compressed.codes)
    expected, logits = small.logits(compressed.model), small.logits(packed)
    assert float((logits - expected).norm() / expected.norm()) < 0.01
    source, target = small.tokens(), small.targets()
    with torch.inference_mode():
        memory, cache = packed.remember(source), packed.new_cache(len(source))
        steps = [packed.step(tokens[:, None], memory, cache)[:, 0] for tokens in target.unbind(1)]
    assert float((torch.stack(steps, 1).flatten(0, 1) - expected).norm() / expected.norm()) < 0.01


def test_a_stored_model_is_packed_the_same(tmp_path: Path) -> None:
    compressed = compressed_model(Quant(), sparsity=0.6)
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, MaskedLM(SHAPE, VOCABULARY, LENGTH))
    assert torch.equal(logits_of(to_packed_linears(back)), logits_of(to_packed_linears(compressed)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_is_that_of_codes_scales_and_the_rest(symmetric: bool) -> None:
    """Half a byte a code; by torch's kernel 4 bytes for scale and offset of a group, unpacked 2 and a zero point."""
    compressed = compressed_model(Quant(symmetric=symmetric))
    packed = to_packed_linears(compressed)
    held = sum(tensor.nbytes for tensor in [*packed.parameters(), *packed.buffers()])
    expected = 0
    for name, parameter in compressed.model.named_parameters():
        n = parameter.numel()
        if name not in compressed.codes:
            expected += 4 * n
        elif name == "encoder.embedding.weight":
            expected += n // 2 + 2 * n // 32 + (1 if symmetric else n // 32)
        else:
            expected += n // 2 + 4 * n // 32
    assert held == expected
    largest = max(p.numel() for p in packed.parameters())
    assert largest <= LENGTH * SHAPE.width  # what is left dense: norms, biases, the table of positions


def test_a_classifiers_few_labels_are_unpacked_and_other_codes_stay_dense() -> None:
    torch.manual_seed(0)
    shape = RobertaConfig(depth=1, width=32, head_size=16)
    compressed = compressed_model(Quant(embeddings=False), model=Classifier(shape, VOCABULARY, LENGTH, 3))
    name = "encoder.layers.0.feed_forward.inner.weight"
    eight = quantize(compressed.model.get_parameter(name).detach(), 8, Quant())
    compressed.codes[name] = eight
    table = torch.randn(1, 1, 16).half()
    book = Codebook(torch.randint(0, 16, (32, 128), dtype=torch.uint8), table, 4)
    compressed.codes["encoder.layers.0.feed_forward.outer.weight"] = book
    with torch.no_grad():
        compressed.model.get_parameter(name).copy_(eight.dequantize())
        compressed.model.get_parameter("encoder.layers.0.feed_forward.outer.weight").copy_(book.dequantize())
    packed = to_packed_linears(compressed)
    kinds = {name: type(module) for name, module in packed.named_modules()}
    assert kinds["projection"] is PackedLinear and kinds["head"] is Int4Linear
    assert kinds["encoder.embedding"] is TokenEmbedding
    assert kinds["encoder.layers.0.feed_forward.inner"] is kinds["encoder.layers.0.feed_forward.outer"] is nn.Linear
    tokens = torch.arange(5, 37).view(2, 16)
    with torch.inference_mode():
        assert torch.allclose(packed(tokens), compressed.model(tokens), atol=0.05)
