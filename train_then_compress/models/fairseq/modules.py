"""``model.impl=fairseq``: fairseq's modules compute, under the names, the initialization and the storage of ours.

A model here holds our parameters. Each forward pass hands them to fairseq's module through `to_fairseq`, and autograd
takes the gradients back. So training, checkpoints, compression of weights, packed files and exports know only our
names. fairseq is imported when the first such model computes.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from train_then_compress.config import RobertaConfig
from train_then_compress.config.base import reject
from train_then_compress.config.model import TransformerConfig
from train_then_compress.data.prepare import PAD, SPECIAL_TOKENS
from train_then_compress.models.fairseq.weights import ROBERTA, TRANSFORMER, Names, to_fairseq
from train_then_compress.models.roberta import Classifier, Encoder, MaskedLM
from train_then_compress.models.transformer import Translator

Model = TypeVar("Model", MaskedLM, Classifier, Translator)


def implemented(model: Model, impl: str) -> Model:
    """The model as ``model.impl`` says: itself, or one of the same parameters whose forward pass is fairseq's."""
    if impl == "native":
        return model
    if isinstance(model, MaskedLM):
        return FairseqMaskedLM(model)
    return FairseqClassifier(model) if isinstance(model, Classifier) else FairseqTranslator(model)


class FairseqEncoder(Encoder):
    """The encoder of RobertaModel."""

    def __init__(self, native: Encoder):
        self.__dict__.update(native.__dict__)  # modules, parameters and settings are those of the native one
        size = native.embedding.weight.shape[0]
        self.peer = Peer(partial(RobertaAtPlaces, native.config, size, native.length), ROBERTA)
        self.parameter_names = [name for name, _ in self.named_parameters()]

    def forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """As `Encoder`; fairseq looks for padding itself, whatever ``padded`` says."""
        weights = {f"encoder.{name}": attrgetter(name)(self) for name in self.parameter_names}
        return self.peer(weights, self.training, tokens)


class FairseqMaskedLM(MaskedLM):
    """RobertaModel."""

    encoder: FairseqEncoder

    def __init__(self, native: MaskedLM):
        self.__dict__.update(native.__dict__)
        self.encoder = FairseqEncoder(native.encoder)
        self.parameter_names = [name for name, _ in self.named_parameters()]

    def forward(self, tokens: Tensor, where: Tensor, padded: bool = True) -> Tensor:
        """As `MaskedLM`."""
        return self.encoder.peer(_weights(self, self.parameter_names), self.training, tokens, where)


class FairseqClassifier(Classifier):
    """The encoder of RobertaModel under our head, which is built as fairseq's is."""

    def __init__(self, native: Classifier):
        self.__dict__.update(native.__dict__)
        self.encoder = FairseqEncoder(native.encoder)


class FairseqTranslator(Translator):
    """TransformerModel in training and scoring. Translations are decoded by our own steps, from the same weights."""

    def __init__(self, native: Translator):
        self.__dict__.update(native.__dict__)
        size = native.embedding.weight.shape[0]
        self.peer = Peer(partial(TransformerAtPlaces, native.config, size, native.length), TRANSFORMER)
        self.parameter_names = [name for name, _ in self.named_parameters()]

    def forward(self, source: Tensor, target: Tensor, where: Tensor) -> Tensor:
        """As `Translator`."""
        return self.peer(_weights(self, self.parameter_names), self.training, source, target, where)


def _weights(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Parameters by the names that they had when the model was made: some may be parametrized by now."""
    return {name: attrgetter(name)(model) for name in names}


class Peer:
    """A module of fairseq's that computes with the weights it is given. It is made when it is first called."""

    def __init__(self, make: Callable[[], nn.Module], names: Names):
        self._make, self._names = make, names
        self._module: nn.Module | None = None
        self._device = torch.device("cpu")

    def __call__(self, weights: dict[str, Tensor], training: bool, *inputs: Tensor) -> Tensor:
        """The module's output; ``weights`` are ours."""
        if self._module is None:
            self._module = self._make()
            for parameter in self._module.parameters():
                parameter.data = parameter.new_empty(0)  # never used
        if self._device != inputs[0].device:
            self._device = inputs[0].device
            self._module.to(self._device)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):  # it keeps masks that training uses later
            theirs = {f"model.{name}": value for name, value in to_fairseq(weights, self._names).items()}
            return functional_call(self._module.train(training), theirs, inputs)


class RobertaAtPlaces(nn.Module):
    """fairseq's RobertaModel, called as `MaskedLM` is or, without ``where``, as `Encoder`."""

    def __init__(self, config: RobertaConfig, vocab_size: int, length: int):
        super().__init__()
        self.model: Any = roberta(config, vocab_size, length)

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        """``tokens`` int64 [batch, length], ``where`` int64 [n] -> logits [n, vocabulary] or all hidden states.

        fairseq's own way to masked positions is a bool mask; here both compute the same rows, those that only fill up
        a batch included.
        """
        features: Tensor = self.model(tokens, features_only=True)[0]
        if where is None:
            return features
        return self.model.encoder.lm_head(features.flatten(0, 1).index_select(0, where))


class TransformerAtPlaces(nn.Module):
    """fairseq's TransformerModel, called as `Translator` is."""

    def __init__(self, config: TransformerConfig, vocab_size: int, length: int):
        super().__init__()
        self.model: Any = transformer(config, vocab_size, length)

    def forward(self, source: Tensor, target: Tensor, where: Tensor) -> Tensor:
        """As `Translator.forward`."""
        lengths = (source != PAD).sum(dim=1)
        features = self.model(source, lengths, target, features_only=True)[0]
        return self.model.decoder.output_layer(features.flatten(0, 1).index_select(0, where))


def roberta_settings(config: RobertaConfig, length: int) -> dict[str, Any]:
    """What fairseq calls the arguments of a RobertaModel of the same shape.

    Embeddings are normalized before the first layer under pre-norm too, as here and as in RoBERTa
    (``--layernorm-embedding``; fairseq's architecture named ``roberta_prenorm`` leaves that out).
    """
    _refuse_rotary(config.positions)
    return {
        "encoder_layers": config.depth, "encoder_embed_dim": config.width, "encoder_ffn_embed_dim": 4 * config.width,
        "encoder_attention_heads": config.heads, "encoder_normalize_before": config.norm == "pre",
        "encoder_learned_pos": config.positions == "learned", "layernorm_embedding": True, "max_positions": length,
        "untie_weights_roberta": not config.tied,
        "dropout": config.dropout, "attention_dropout": config.dropout, "activation_dropout": 0.0,
    }  # fmt: skip


def transformer_settings(config: TransformerConfig, length: int) -> dict[str, Any]:
    """What fairseq calls the arguments of a TransformerModel of the same shape."""
    _refuse_rotary(config.positions)
    side = {"embed_dim": config.width, "ffn_embed_dim": 4 * config.width, "attention_heads": config.heads,
            "normalize_before": config.norm == "pre", "learned_pos": config.positions == "learned"}  # fmt: skip
    return {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in side.items()} | {
        "encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers,
        "share_all_embeddings": config.tied,
        "max_source_positions": length, "max_target_positions": length,
        "dropout": config.dropout, "attention_dropout": config.dropout, "activation_dropout": 0.0,
    }  # fmt: skip


def roberta(config: RobertaConfig, vocab_size: int, length: int) -> nn.Module:
    """fairseq's RobertaModel of the same shape, initialized as fairseq does it."""
    _find_fairseq()
    from fairseq.models.roberta import RobertaModel

    task = SimpleNamespace(source_dictionary=dictionary(vocab_size))
    model: nn.Module = RobertaModel.build_model(Namespace(**roberta_settings(config, length)), task)
    return model


def transformer(config: TransformerConfig, vocab_size: int, length: int) -> nn.Module:
    """fairseq's TransformerModel of the same shape, initialized as fairseq does it."""
    _find_fairseq()
    from fairseq.models.transformer import TransformerModel, base_architecture

    arguments = Namespace(**transformer_settings(config, length))
    base_architecture(arguments)
    words = dictionary(vocab_size)
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    model: nn.Module = TransformerModel.build_model(arguments, task)
    return model


def dictionary(vocab_size: int) -> Any:
    """A Dictionary of fairseq's with our numbers: it begins with <s>, <pad>, </s>, <unk>, as `SPECIAL_TOKENS` does."""
    _find_fairseq()
    from fairseq.data import Dictionary

    words = Dictionary()
    for number in range(len(words), vocab_size):
        words.add_symbol(SPECIAL_TOKENS[number] if number < len(SPECIAL_TOKENS) else f"token{number}")
    return words


def _find_fairseq() -> None:
    """Raise `ConfigError` where there is no fairseq; quiet it where there is."""
    try:
        import fairseq  # noqa: F401
    except ImportError as error:
        raise reject("model.impl", "fairseq", f"fairseq cannot be imported ({error}); it comes with the extra: "
                     "pip install 'train-then-compress[fairseq]'") from None  # fmt: skip
    logging.getLogger("fairseq").setLevel(logging.WARNING)


def _refuse_rotary(positions: str) -> None:
    if positions == "rotary":
        raise reject("model.positions", positions, "fairseq has learned and sinusoidal positions only")
