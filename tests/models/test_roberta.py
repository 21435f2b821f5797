"""The masked LM against transformers' RoBERTa, weights copied; padding; initialization."""

from __future__ import annotations

import copy
import math
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train_then_compress.config import RobertaConfig
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD
from train_then_compress.export import hf
from train_then_compress.models import layers
from train_then_compress.models.roberta import Encoder, MaskedLM

VOCABULARY, LENGTH = 120, 24


def small(**changes: Any) -> RobertaConfig:
    return RobertaConfig(**{"depth": 3, "width": 48, "head_size": 16, **changes})


@cache
def model_of(config: RobertaConfig, seed: int = 0) -> MaskedLM:
    """A model far from its initialization, so that every part of it matters to the logits."""
    torch.manual_seed(seed)
    model = MaskedLM(config, VOCABULARY, LENGTH).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(lengths: list[int], length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(MASK, VOCABULARY, (len(lengths), length), generator=generator)
    tokens[:, 0] = BOS
    for row, end in zip(tokens, lengths, strict=True):
        row[end - 1] = EOS
        row[end:] = PAD
    return tokens


def everywhere(tokens: Tensor) -> Tensor:
    return (tokens != PAD).flatten().nonzero().squeeze(1)


def reference_of(model: MaskedLM, transformers: ModuleType) -> torch.nn.Module:
    """transformers' model of the same shape with the same weights, as `ttc export` writes them."""
    described = hf.settings(model)
    config = transformers.AutoConfig.for_model(**described, attn_implementation="eager")
    reference = getattr(transformers, described["architectures"][0])(config)
    missing, unexpected = reference.load_state_dict(hf.weights(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    reference.tie_weights()
    return reference.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("lengths", [[LENGTH] * 3, [LENGTH, 5, 17, 2]], ids=["unpadded", "padded"])
@pytest.mark.parametrize("head_size", [16, 64], ids=["three heads", "one head"])
@pytest.mark.parametrize("explicit_up_to", [0, 512], ids=["fused", "explicit"])
def test_logits_are_those_of_transformers(
    transformers: ModuleType, monkeypatch: pytest.MonkeyPatch, norm: str, lengths: list[int], head_size: int,
    explicit_up_to: int,
) -> None:  # fmt: skip
    """Both ways of computing attention (long sequences and GPUs take the fused one)."""
    monkeypatch.setattr(layers, "_EXPLICIT_UP_TO", explicit_up_to)
    model = model_of(small(norm=norm, head_size=head_size))
    tokens = batch_of(lengths)
    attend = (tokens != PAD).long()
    with torch.inference_mode():
        expected = reference_of(model, transformers)(input_ids=tokens, attention_mask=attend).logits
        logits = model(tokens, everywhere(tokens))
        spared = model(tokens, everywhere(tokens), padded=False) if min(lengths) == LENGTH else logits
    expected = expected.flatten(0, 1)[everywhere(tokens)]
    assert expected.std() > 0.5
    for ours in (logits, spared):
        assert torch.allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_are_those_of_transformers(transformers: ModuleType, norm: str) -> None:
    model = copy.deepcopy(model_of(small(norm=norm)))
    reference = reference_of(model, transformers)
    tokens = batch_of([LENGTH, 9])
    targets = torch.full_like(tokens, -100)
    targets[:, 1:5] = torch.arange(8).view(2, 4) + MASK + 1
    where = (targets != -100).flatten().nonzero().squeeze(1)
    loss = torch.nn.functional.cross_entropy(model(tokens, where), targets.flatten()[where])
    expected = reference(input_ids=tokens, attention_mask=(tokens != PAD).long(), labels=targets).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    prefix = "roberta" if norm == "post" else "roberta_prelayernorm"
    theirs = dict(reference.named_parameters())
    layer = f"{prefix}.encoder.layer.1"
    parts = [theirs[f"{layer}.attention.self.{which}.weight"].grad for which in ("query", "key", "value")]
    pairs = [
        (model.encoder.layers[1].attention.query_key_value.weight.grad, torch.cat(parts)),
        (model.encoder.layers[1].feed_forward.outer.weight.grad, theirs[f"{layer}.output.dense.weight"].grad),
        (model.encoder.positions.grad, theirs[f"{prefix}.embeddings.position_embeddings.weight"].grad[2:]),
        (model.bias.grad, theirs["lm_head.bias"].grad),
    ]
    for ours, expected_gradient in pairs:
        assert torch.allclose(ours, expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@settings(max_examples=12)
@given(lengths=st.lists(st.integers(2, LENGTH), min_size=1, max_size=4), more=st.integers(0, 8))
def test_padding_and_neighbours_change_nothing(positions: str, norm: str, lengths: list[int], more: int) -> None:
    model = model_of(small(positions=positions, norm=norm, depth=2))
    tokens = batch_of(lengths, min(LENGTH, max(lengths) + more))
    with torch.inference_mode():
        together = model(tokens, everywhere(tokens)).split(lengths)
        for row, length, logits in zip(tokens, lengths, together, strict=True):
            alone = row[None, :length]
            assert torch.allclose(model(alone, torch.arange(length), padded=False), logits, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_every_token_sees_every_other_and_where_it_stands(positions: str) -> None:
    model = model_of(small(positions=positions))
    tokens = batch_of([LENGTH])
    changed, swapped = tokens.clone(), tokens.clone()
    changed[0, 3] = MASK + 1 + (tokens[0, 3] - MASK) % 50
    swapped[0, [5, 9]] = swapped[0, [9, 5]]
    with torch.inference_mode():
        before = model(tokens, torch.arange(LENGTH))
        assert ((model(changed, torch.arange(LENGTH)) - before).abs().amax(dim=1) > 1e-4).all()
        assert ((model(swapped, torch.arange(LENGTH)) - before).abs().amax(dim=1) > 1e-5).all()


def test_logits_are_computed_where_they_are_asked_for() -> None:
    model = model_of(small())
    tokens = batch_of([LENGTH, 11])
    where = torch.tensor([3, LENGTH + 7, 3])
    with torch.inference_mode():
        everything = model(tokens, torch.arange(2 * LENGTH))
        assert torch.allclose(model(tokens, where), everything[where], atol=1e-6)
        assert model(tokens, where[:0]).shape == (0, VOCABULARY)


def test_dropout_works_in_training_alone() -> None:
    model = copy.deepcopy(model_of(small(dropout=0.3, positions="rotary")))
    tokens = batch_of([LENGTH])
    where = torch.arange(LENGTH)
    with torch.no_grad():
        assert torch.equal(model(tokens, where), model(tokens, where))
        model.train()
        assert not torch.equal(model(tokens, where), model(tokens, where))
        torch.manual_seed(5)
        first = model(tokens, where)
        torch.manual_seed(5)
        assert torch.equal(model(tokens, where), first)


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_residual_branches_start_smaller_the_deeper_the_model(depth: int) -> None:
    torch.manual_seed(0)
    model = MaskedLM(RobertaConfig(depth=depth, width=128, head_size=32), VOCABULARY, LENGTH)
    for layer in model.encoder.layers:
        full = {layer.attention.query_key_value: 0.05, layer.feed_forward.inner: 0.05}
        scaled = {layer.attention.output: 0.05, layer.feed_forward.outer: 1 / math.sqrt(512)}
        for module, deviation in full.items():
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.04)
        for module, deviation in scaled.items():
            assert module.weight.std().item() == pytest.approx(deviation / math.sqrt(2 * depth), rel=0.04)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert all(not bias.any() for bias in biases) and len(biases) > 6 * depth
    assert not model.encoder.embedding.weight[PAD].any()
    assert model.encoder.embedding.weight[PAD + 1 :].std().item() == pytest.approx(0.02, rel=0.04)


def test_deviation_is_never_above_the_inverse_root_of_the_inputs() -> None:
    torch.manual_seed(0)
    wide = MaskedLM(RobertaConfig(depth=1, width=1024), VOCABULARY, LENGTH)
    assert wide.head.weight.std().item() == pytest.approx(1 / 32, rel=0.02)


def test_the_residual_stream_starts_alike_at_every_depth() -> None:
    torch.manual_seed(0)
    spread = []
    for depth in (2, 24):
        encoder = MaskedLM(RobertaConfig(depth=depth, width=64, head_size=16), VOCABULARY, LENGTH).encoder
        encoder.final_norm = torch.nn.Identity()
        with torch.inference_mode():
            spread.append(float(encoder(batch_of([LENGTH] * 8)).std()))
    assert spread[1] == pytest.approx(spread[0], rel=0.1)


@pytest.mark.parametrize("width, head_size, heads", [(48, 16, 3), (48, 48, 1), (48, 64, 1), (2, 64, 1), (6, 2, 3)])
def test_any_width_works_with_one_head_or_more(width: int, head_size: int, heads: int) -> None:
    for positions in ("learned", "sinusoidal", "rotary"):
        config = RobertaConfig(depth=1, width=width, head_size=head_size, positions=positions)
        model = MaskedLM(config, VOCABULARY, LENGTH)
        assert config.heads == heads == model.encoder.layers[0].attention.heads
        logits = model(batch_of([LENGTH, 4]), torch.arange(5))
        assert logits.shape == (5, VOCABULARY) and logits.isfinite().all()


def test_parameters_are_twelve_width_squared_a_layer_and_the_embeddings() -> None:
    config = small(positions="rotary")
    model = MaskedLM(config, VOCABULARY, LENGTH)
    layer, width = model.encoder.layers[0], config.width
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    assert matrices == 12 * width**2
    assert isinstance(model.encoder, Encoder)
    names = {name for name, parameter in model.named_parameters() if VOCABULARY in parameter.shape}
    assert names == {"encoder.embedding.weight", "bias"}  # the output embedding is the input's


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_training_computes_the_last_layer_at_predicted_positions_only(norm: str, positions: str) -> None:
    """The same logits and gradients as from all positions, those that fill up a batch included."""
    model = copy.deepcopy(model_of(small(norm=norm, positions=positions)))
    tokens, where = batch_of([LENGTH, 17, 9]), torch.tensor([1, 5, 23, 25, 40, 50, 52, 0, 0])
    shapes: list[torch.Size] = []
    found: dict[bool, list[Tensor]] = {}
    hook = model.encoder.layers[-1].feed_forward.register_forward_hook(lambda m, given, out: shapes.append(out.shape))
    for is_training in (True, False):
        model.train(is_training).zero_grad()
        logits = model(tokens, where)
        logits[:7].square().sum().backward()
        found[is_training] = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert shapes == [(9, 48), (3, LENGTH, 48)]
    assert len(found[True]) == len(found[False]) == 1 + len(list(model.parameters()))
    for trained, evaluated in zip(*found.values(), strict=True):
        assert (trained - evaluated).norm() < 1e-5 * (1 + evaluated.norm())
    hook.remove()


def test_who_watches_the_last_layer_sees_all_positions() -> None:
    model = copy.deepcopy(model_of(small())).train()
    seen: list[torch.Size] = []
    model.encoder.layers[-1].register_forward_hook(lambda module, given, out: seen.append(out.shape))
    model(batch_of([LENGTH, 9]), torch.tensor([1, 2]))
    assert seen == [(2, LENGTH, 48)]
