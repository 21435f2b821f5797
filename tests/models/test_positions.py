"""Positions: sinusoidal as fairseq has them, rotary as transformers has them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.config import RobertaConfig
from train_then_compress.data.prepare import PAD
from train_then_compress.models.positions import rotary_angles, rotate, sinusoidal
from train_then_compress.models.roberta import Encoder


@pytest.mark.parametrize("width", [4, 32, 130])
@pytest.mark.parametrize("length", [1, 17, 300])
def test_sinusoidal_positions_are_fairseqs(width: int, length: int) -> None:
    from fairseq.modules.sinusoidal_positional_embedding import SinusoidalPositionalEmbedding

    tokens = torch.full((1, length), 7)
    expected = SinusoidalPositionalEmbedding(width, padding_idx=PAD, init_size=512)(tokens)[0]
    assert torch.allclose(sinusoidal(length, width, PAD + 1), expected, atol=1e-6)
    encoder = Encoder(RobertaConfig(depth=1, width=width, head_size=width, positions="sinusoidal"), 50, length)
    assert torch.allclose(encoder.positions, expected, atol=1e-6)
    assert "positions" not in encoder.state_dict()  # computed, not stored


def test_the_narrowest_sinusoidal_table_is_finite() -> None:
    table = sinusoidal(5, 2)
    assert torch.allclose(table[:, 0], torch.arange(5.0).sin()) and torch.allclose(table[:, 1], torch.arange(5.0).cos())


@pytest.mark.parametrize("head_size", [2, 16, 64])
def test_rotary_positions_are_those_of_transformers(transformers: ModuleType, head_size: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=2 * head_size, num_attention_heads=2, head_dim=head_size, max_position_embeddings=512
    )
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 2, 200, head_size)
    cosine, sine = LlamaRotaryEmbedding(config)(query, torch.arange(200)[None])
    ours = rotary_angles(200, head_size)
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(head_size // 2)
    assert torch.allclose(ours[0], cosine[0], atol=2e-5) and torch.allclose(ours[1], signs * sine[0], atol=2e-5)
    expected = apply_rotary_pos_emb(query, key, cosine, sine)
    for x, rotated in zip((query, key), expected, strict=True):
        assert torch.allclose(rotate(x, *ours), rotated, atol=1e-4)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.sampled_from([2, 8, 32]), st.integers(0, 99))
def test_rotary_scores_depend_on_the_distance_alone(a: int, b: int, shift: int, head_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, head_size)
    cosine, sine = rotary_angles(201, head_size)

    def score(m: int, n: int) -> float:
        rotated = rotate(query, cosine[m : m + 1], sine[m : m + 1]), rotate(key, cosine[n : n + 1], sine[n : n + 1])
        return float((rotated[0] * rotated[1]).sum())

    scale = float(query.norm() * key.norm())
    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=1e-4 * scale)
    assert float(rotate(query, cosine[a : a + 1], sine[a : a + 1]).norm()) == pytest.approx(
        float(query.norm()), rel=1e-5
    )
    assert torch.equal(rotate(query, cosine[:1], sine[:1]), query)
