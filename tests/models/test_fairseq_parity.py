"""Our RoBERTa against fairseq's, with the same weights: the peer of the benchmark computes the same function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config import RobertaConfig
from train_then_compress.data.prepare import BOS, PAD
from train_then_compress.models.roberta import MaskedLM

pytest.importorskip("fairseq")
VOCABULARY, LENGTH = 97, 24
#: fairseq numbers positions from padding index + 1.
FIRST_POSITION = PAD + 1
OF_A_LAYER = {
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "feed_forward.inner": "fc1",
    "feed_forward.outer": "fc2",
    "feed_forward_norm": "final_layer_norm",
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "masked_lm_training.py"
    spec = importlib.util.spec_from_file_location("masked_lm_training", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def under_our_names(roberta: nn.Module, config: RobertaConfig, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``of`` each of fairseq's parameters (their values, their gradients), fused and named as ours."""
    there = {name: of(parameter) for name, parameter in roberta.named_parameters()}
    encoder, head = "encoder.sentence_encoder", "encoder.lm_head"
    found = {"encoder.embedding.weight": there[f"{encoder}.embed_tokens.weight"], "bias": there[f"{head}.bias"]}
    if config.positions == "learned":
        found["encoder.positions"] = there[f"{encoder}.embed_positions.weight"][FIRST_POSITION:]
    modules = {"encoder.embedding_norm": f"{encoder}.layernorm_embedding", "head": f"{head}.dense"}
    modules["head_norm"] = f"{head}.layer_norm"
    if config.norm == "pre":
        modules["encoder.final_norm"] = f"{encoder}.layer_norm"
    for layer in range(config.depth):
        ours, theirs = f"encoder.layers.{layer}", f"{encoder}.layers.{layer}"
        modules |= {f"{ours}.{name}": f"{theirs}.{named}" for name, named in OF_A_LAYER.items()}
        for kind in ("weight", "bias"):
            split = [there[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{ours}.attention.query_key_value.{kind}"] = torch.cat(split)
    return found | {f"{a}.{kind}": there[f"{b}.{kind}"] for a, b in modules.items() for kind in ("weight", "bias")}


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of several lengths, padded at the end; places to predict, none of them padding; what to predict there."""
    tokens = torch.randint(5, VOCABULARY, (5, LENGTH))
    tokens[:, 0] = BOS
    for row, end in enumerate((LENGTH, LENGTH - 1, 15, 7, 3)):
        tokens[row, end:] = PAD
    where = torch.nonzero((tokens.flatten() >= 5) & (torch.rand(tokens.numel()) < 0.4)).flatten()
    return tokens, where, torch.randint(5, VOCABULARY, (len(where),))


def randomize(model: nn.Module) -> None:
    """No weight, bias or norm keeps the value it is initialized to: a wrong one would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize(("depth", "width", "head_size"), [(2, 48, 16), (3, 32, 32)])
def test_same_weights_same_logits_and_gradients(
    benchmark: ModuleType, norm: str, positions: str, depth: int, width: int, head_size: int
) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(depth=depth, width=width, head_size=head_size, norm=norm, positions=positions)
    theirs = benchmark.FairseqMaskedLM(config, VOCABULARY, LENGTH)
    randomize(theirs)
    ours = MaskedLM(config, VOCABULARY, LENGTH)
    ours.load_state_dict(under_our_names(theirs.roberta, config, torch.Tensor.detach))
    tokens, where, targets = padded_batch()
    logits = {}
    for model in (ours, theirs):
        logits[model] = model(tokens, where, True)
        F.cross_entropy(logits[model], targets).backward()
    torch.testing.assert_close(logits[ours], logits[theirs], rtol=1e-5, atol=1e-5)
    expected = under_our_names(theirs.roberta, config, lambda parameter: parameter.grad)
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            expected[name],
            rtol=1e-4,
            atol=1e-4 * float(expected[name].abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_without_padding_the_attention_mask_may_be_left_out(benchmark: ModuleType) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(depth=2, width=32, head_size=16)
    theirs = benchmark.FairseqMaskedLM(config, VOCABULARY, LENGTH).eval()
    randomize(theirs)
    ours = MaskedLM(config, VOCABULARY, LENGTH).eval()
    ours.load_state_dict(under_our_names(theirs.roberta, config, torch.Tensor.detach))
    tokens, where = torch.randint(5, VOCABULARY, (3, LENGTH)), torch.tensor([0, 5, 40, 71])
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens, where, padded=False), theirs(tokens, where), rtol=1e-5, atol=1e-5)


def test_the_peer_has_our_parameters_and_two_unused_positions(benchmark: ModuleType) -> None:
    config = RobertaConfig(depth=2, width=32, head_size=16)
    theirs, ours = benchmark.FairseqMaskedLM(config, VOCABULARY, LENGTH), MaskedLM(config, VOCABULARY, LENGTH)
    assert benchmark.parameters(theirs) == benchmark.parameters(ours) + FIRST_POSITION * config.width
    assert benchmark.parameters(theirs.encoder) == benchmark.parameters(ours.encoder) + FIRST_POSITION * config.width
