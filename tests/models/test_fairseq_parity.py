"""Our models against fairseq's with the same weights, both ways: logits, gradients, and what has no counterpart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config import ConfigError, RobertaConfig
from train_then_compress.config.model import TransformerConfig
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD
from train_then_compress.models.fairseq.modules import RobertaAtPlaces, TransformerAtPlaces, roberta, transformer
from train_then_compress.models.fairseq.weights import (
    ROBERTA,
    TRANSFORMER,
    Incompatible,
    Names,
    from_fairseq,
    state_dict,
)
from train_then_compress.models.roberta import MaskedLM
from train_then_compress.models.transformer import Translator

pytest.importorskip("fairseq")
VOCABULARY, LENGTH = 97, 24
SHAPES = [(2, 48, 16), (3, 32, 32), (4, 64, 16), (6, 40, 8)]


def padded(lengths: list[int], first: int | None = None) -> Tensor:
    """Tokens of several lengths, ended by ``</s>`` and padded; ``first`` stands at the beginning."""
    tokens = torch.randint(MASK + 1, VOCABULARY, (len(lengths), max(lengths)))
    for row, end in zip(tokens, lengths, strict=True):
        row[end - 1], row[end:] = EOS, PAD
        if first is not None:
            row[0] = first
    return tokens


def masked_lm_batch() -> tuple[tuple[Tensor, ...], Tensor]:
    """Tokens and places to predict, none of them padding; what to predict there."""
    tokens = padded([LENGTH, LENGTH - 1, 15, 7, 3], BOS)
    where = torch.nonzero((tokens.flatten() > MASK) & (torch.rand(tokens.numel()) < 0.4)).flatten()
    return (tokens, where), torch.randint(MASK + 1, VOCABULARY, (len(where),))


def translation_batch() -> tuple[tuple[Tensor, ...], Tensor]:
    """Sources, what the decoder reads, and every place in it; what to predict there."""
    source, target = padded([7, LENGTH, 3]), padded([9, 4, 11], EOS)
    where = (target != PAD).flatten().nonzero().squeeze(1)
    return (source, target, where), torch.randint(MASK + 1, VOCABULARY, (len(where),))


def randomize(model: nn.Module) -> None:
    """No weight, bias or norm keeps the value it is initialized to: a wrong one would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(
    ours: nn.Module, theirs: nn.Module, names: Names, batch: Callable[[], tuple[tuple[Tensor, ...], Tensor]]
) -> None:
    """Load their random weights into ours, and compare logits and gradients."""
    randomize(theirs)
    expected = [name for name, _ in ours.named_parameters()]
    ours.load_state_dict(from_fairseq(theirs.get_submodule("model").state_dict(), names, expected))
    inputs, targets = batch()
    logits = [model(*inputs) for model in (ours, theirs)]
    assert logits[1].std() > 0.3
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for result in logits:
        F.cross_entropy(result, targets).backward()
    found, wanted = gradients(ours), from_fairseq(gradients(theirs.get_submodule("model")), names, expected)
    for name in expected:
        scale = float(wanted[name].abs().max())
        assert scale > 0
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-4, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("depth", "width", "head_size"), SHAPES)
def test_masked_lm_has_fairseqs_logits_and_gradients(
    norm: str, positions: str, tied: bool, depth: int, width: int, head_size: int
) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(depth=depth, width=width, head_size=head_size, norm=norm, positions=positions, tied=tied)  # type: ignore[arg-type]
    models = MaskedLM(config, VOCABULARY, LENGTH), RobertaAtPlaces(config, VOCABULARY, LENGTH)
    assert_same(*models, ROBERTA, masked_lm_batch)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("depth", "width", "head_size"), SHAPES)
def test_translator_has_fairseqs_logits_and_gradients(
    norm: str, positions: str, tied: bool, depth: int, width: int, head_size: int
) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(depth=depth, decoder_depth=2, width=width, head_size=head_size, norm=norm,
                               positions=positions, tied=tied, dropout=0.0)  # type: ignore[arg-type]  # fmt: skip
    models = Translator(config, VOCABULARY, LENGTH), TransformerAtPlaces(config, VOCABULARY, LENGTH)
    assert_same(*models, TRANSFORMER, translation_batch)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
def test_our_weights_load_into_fairseqs_models_and_come_back(norm: str, tied: bool) -> None:
    for config, ours, make, names in (
        (RobertaConfig(depth=2, width=32, head_size=16, norm=norm, tied=tied), MaskedLM, roberta, ROBERTA),  # type: ignore[arg-type]
        (
            TransformerConfig(depth=2, width=32, head_size=16, norm=norm, tied=tied),
            Translator,
            transformer,
            TRANSFORMER,
        ),  # type: ignore[arg-type]
    ):
        model = ours(config, VOCABULARY, LENGTH)  # type: ignore[arg-type]
        randomize(model)
        theirs = make(config, VOCABULARY, LENGTH)  # type: ignore[arg-type,operator]
        missing = theirs.load_state_dict(state_dict(model.state_dict(), names), strict=True).missing_keys
        assert not missing
        back = from_fairseq(theirs.state_dict(), names, model.state_dict())
        assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_without_padding_the_attention_mask_may_be_left_out() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(depth=2, width=32, head_size=16)
    theirs, ours = RobertaAtPlaces(config, VOCABULARY, LENGTH).eval(), MaskedLM(config, VOCABULARY, LENGTH).eval()
    randomize(theirs)
    ours.load_state_dict(from_fairseq(theirs.model.state_dict(), ROBERTA, ours.state_dict()))
    tokens, where = torch.randint(5, VOCABULARY, (3, LENGTH)), torch.tensor([0, 5, 40, 71])
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens, where, padded=False), theirs(tokens, where), rtol=1e-5, atol=1e-5)


def test_what_has_no_counterpart_is_refused_in_words() -> None:
    config = RobertaConfig(depth=1, width=32, head_size=16)
    ours = MaskedLM(config, VOCABULARY, LENGTH).state_dict()
    theirs = state_dict(ours, ROBERTA)
    head = "encoder.lm_head.weight"
    with pytest.raises(Incompatible, match=rf"its {head} is not tied to .*embed_tokens"):
        from_fairseq(theirs | {head: theirs[head] + 1}, ROBERTA, ours)
    with pytest.raises(Incompatible, match=r"its classification_heads\.x has no counterpart here"):
        from_fairseq(theirs | {"classification_heads.x": torch.zeros(1)}, ROBERTA, ours)
    del theirs["encoder.sentence_encoder.layernorm_embedding.weight"]
    with pytest.raises(Incompatible, match=r"it has no .*layernorm_embedding\.weight"):
        from_fairseq(theirs, ROBERTA, ours)
    with pytest.raises(ConfigError, match=r"model\.positions=rotary: fairseq has learned and sinusoidal positions"):
        transformer(TransformerConfig(depth=1, width=32, head_size=16, positions="rotary"), VOCABULARY, LENGTH)
