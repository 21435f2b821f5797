"""Counted FLOPs against torch's own counter, which looks at every matrix product that is really made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.config import RobertaConfig, TransformerConfig
from train_then_compress.cost.flops import ForwardFlops, forward_flops
from train_then_compress.models.roberta import Classifier, MaskedLM
from train_then_compress.models.transformer import Translator

VOCABULARY = 97
SHAPES = [
    # depth, width, head size, length, sequences, predictions
    (1, 16, 8, 12, 2, 3),
    (3, 48, 16, 20, 4, 12),
    (2, 64, 64, 7, 1, 7),
    (2, 32, 64, 33, 3, 1),
]


def measured(shape: tuple[int, ...], positions: str, backward: bool, tied: bool = True) -> tuple[int, ForwardFlops]:
    """What torch counts for a forward pass, with or without a backward pass, and our count for the model."""
    depth, width, head_size, length, sequences, predictions = shape
    config = RobertaConfig(depth=depth, width=width, head_size=head_size, positions=positions, tied=tied)  # type: ignore[arg-type]
    model = MaskedLM(config, VOCABULARY, length).eval()  # in training it spares itself most of the last layer
    tokens = torch.randint(5, VOCABULARY, (sequences, length))
    # The math backend makes plain products, which the counter sees; it does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens, torch.arange(predictions), padded=False)
        if backward:
            logits.square().sum().backward()
    return counter.get_total_flops(), forward_flops(model)


@pytest.mark.parametrize("positions, tied", [("learned", True), ("rotary", True), ("learned", False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_flops_are_those_of_the_products_that_are_made(
    shape: tuple[int, ...], positions: str, tied: bool
) -> None:
    counted, flops = measured(shape, positions, backward=False, tied=tied)
    length, sequences, predictions = shape[3:]
    assert flops.per_token(length) * sequences * length + flops.per_prediction * predictions == counted


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_flops_are_three_forward_passes(shape: tuple[int, ...], positions: str) -> None:
    counted, flops = measured(shape, positions, backward=True)
    length, sequences, predictions = shape[3:]
    assert flops.training(sequences * length, length, predictions) == counted


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("positions, tied", [("learned", True), ("rotary", True), ("learned", False)])
@pytest.mark.parametrize(
    "depths, width, head_size, source, target, predictions",
    [((1, 1), 16, 8, (2, 12), (2, 9), 3), ((3, 2), 48, 16, (4, 5), (4, 21), 84), ((1, 4), 64, 64, (1, 30), (1, 1), 1)],
)  # fmt: skip
def test_a_translators_flops_are_those_of_the_products_that_are_made(
    depths: tuple[int, int], width: int, head_size: int, source: tuple[int, int], target: tuple[int, int],
    predictions: int, positions: str, tied: bool, backward: bool,
) -> None:  # fmt: skip
    """And by a formula: 12 width^2 a layer of the encoder, 16 of the decoder, 4 width for a pair of positions."""
    config = TransformerConfig(encoder_depth=depths[0], decoder_depth=depths[1], width=width, head_size=head_size,
                               positions=positions, tied=tied)  # type: ignore[arg-type]  # fmt: skip
    model = Translator(config, VOCABULARY, 32)
    texts = (torch.randint(5, VOCABULARY, shape) for shape in (source, target))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(*texts, torch.arange(predictions))
        if backward:
            logits.square().sum().backward()
    flops = forward_flops(model)
    count = flops.training_to_translate if backward else flops.translating
    assert count(source, target, predictions) == counter.get_total_flops()
    (sentences, s), (_, t) = source, target
    encoder = depths[0] * (2 * 12 * width**2 * s + 4 * width * s * s)
    decoder = depths[1] * (2 * width**2 * (2 * s + 14 * t) + 4 * width * t * (t + s))
    by_hand = sentences * (encoder + decoder) + 2 * VOCABULARY * width * predictions
    assert flops.translating(source, target, predictions) == by_hand


def test_a_classifier_predicts_once_a_sequence() -> None:
    model = Classifier(RobertaConfig(depth=2, width=32, head_size=16), VOCABULARY, 24, labels=3).eval()
    flops = forward_flops(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(5, VOCABULARY, (4, 24)), padded=False)
    assert flops.per_token(24) * 4 * 24 + flops.per_prediction * 4 == counter.get_total_flops()
    assert flops.per_prediction == 2 * 32**2 + 2 * 3 * 32


def test_nonzero_flops_are_the_dense_ones_less_those_of_the_zeros() -> None:
    model = MaskedLM(RobertaConfig(depth=2, width=32, head_size=16), VOCABULARY, 24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        dense = forward_flops(model)
        assert forward_flops(model, nonzero=True) == dense
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "positions")):
                parameter.zero_()
        assert forward_flops(model, nonzero=True) == dense
        model.encoder.layers[0].feed_forward.inner.weight[:, :16].zero_()
        model.encoder.embedding.weight[7].zero_()
    counted = forward_flops(model, nonzero=True)
    assert counted.per_token(24) == dense.per_token(24) - 2 * 128 * 16
    assert counted.per_prediction == dense.per_prediction - 2 * 32


def test_a_translators_zeros_are_left_out_where_they_stand() -> None:
    model = Translator(TransformerConfig(depth=1, width=32, head_size=16), VOCABULARY, 24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        dense = forward_flops(model, nonzero=True)
        layer: Any = model.decoder.layers[0]
        layer.cross_attention.key_value.weight[:, :10].zero_()
        layer.cross_attention.query.weight[:5].zero_()
        model.embedding.weight[7].zero_()
    counted = forward_flops(model, nonzero=True)
    assert dense == forward_flops(model)
    assert counted.per_token_in_matrices == dense.per_token_in_matrices - 2 * 64 * 10
    assert counted.per_target_in_matrices == dense.per_target_in_matrices - 2 * 5 * 32
    assert counted.per_prediction == dense.per_prediction - 2 * 32
