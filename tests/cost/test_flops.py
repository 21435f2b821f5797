"""Counted FLOPs against torch's own counter, which looks at every matrix product that is really made."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.config import RobertaConfig
from train_then_compress.cost.flops import MaskedLMFlops
from train_then_compress.models.roberta import MaskedLM

VOCABULARY = 97
SHAPES = [
    # depth, width, head size, length, sequences, predictions
    (1, 16, 8, 12, 2, 3),
    (3, 48, 16, 20, 4, 12),
    (2, 64, 64, 7, 1, 7),
    (2, 32, 64, 33, 3, 1),
]


def measured(shape: tuple[int, ...], positions: str, backward: bool) -> tuple[int, MaskedLMFlops]:
    """What torch counts for a forward pass, with or without a backward pass, and our formula for the shape."""
    depth, width, head_size, length, sequences, predictions = shape
    config = RobertaConfig(depth=depth, width=width, head_size=head_size, positions=positions)  # type: ignore[arg-type]
    model = MaskedLM(config, VOCABULARY, length)
    tokens = torch.randint(5, VOCABULARY, (sequences, length))
    # The math backend makes plain products, which the counter sees; it does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens, torch.arange(predictions), padded=False)
        if backward:
            logits.square().sum().backward()
    return counter.get_total_flops(), MaskedLMFlops(config, VOCABULARY, length)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_flops_are_those_of_the_products_that_are_made(shape: tuple[int, ...], positions: str) -> None:
    counted, flops = measured(shape, positions, backward=False)
    length, sequences, predictions = shape[3:]
    assert flops.per_token * sequences * length + flops.per_prediction * predictions == counted


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_flops_are_three_forward_passes(shape: tuple[int, ...], positions: str) -> None:
    counted, flops = measured(shape, positions, backward=True)
    length, sequences, predictions = shape[3:]
    assert flops.training(sequences * length, predictions) == counted


def test_a_share_of_the_tokens_is_predicted() -> None:
    flops = MaskedLMFlops(RobertaConfig(depth=2, width=64, head_size=32), VOCABULARY, 128)
    by_hand = 2 * (24 * 64**2 + 4 * 128 * 64) + 0.15 * (2 * 64**2 + 2 * 64 * VOCABULARY)
    assert flops.dense_per_token() == pytest.approx(by_hand)


def test_nonzero_flops_are_the_dense_ones_less_those_of_the_zeros() -> None:
    config = RobertaConfig(depth=2, width=32, head_size=16)
    model, flops = MaskedLM(config, VOCABULARY, 24), MaskedLMFlops(config, VOCABULARY, 24)
    full = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert flops.nonzero_per_token(full) == flops.dense_per_token()
    layer = {name: full[name] // 2 for name in full if name.startswith("encoder.layers.0.") and full[name] > 4 * 32}
    assert flops.nonzero_per_token(full | layer) == flops.dense_per_token() - 12 * 32**2
    head = {"head.weight": 0, "encoder.embedding.weight": full["encoder.embedding.weight"] - 10}
    assert flops.nonzero_per_token(full | head) == pytest.approx(flops.dense_per_token() - 0.15 * 2 * (32**2 + 10))
    other = {name: 0 for name in full if name.endswith(("bias", "norm.weight", "positions"))}
    assert len(other) > 20 and flops.nonzero_per_token(full | other) == flops.dense_per_token()
