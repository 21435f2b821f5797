"""A directory for CTranslate2, a fast engine for translation on CPUs and GPUs: its specification filled directly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train_then_compress.cost.engines import load
from train_then_compress.data.prepare import BOS, EOS, PAD, SPECIAL_TOKENS
from train_then_compress.export.point import ExportError, Point
from train_then_compress.export.tokenizer import vocabulary
from train_then_compress.models.transformer import CrossAttention, Stack, Translator

#: What no translation has.
_NEVER = [SPECIAL_TOKENS[token] for token in (BOS, PAD)]


def write(point: Point, directory: Path, quantization: str = "float32") -> None:
    """Write ``model.bin``, ``config.json``, ``shared_vocabulary.json`` and ``tokenizer.json``.

    ``ctranslate2.Translator`` takes each source as the tokens of ``tokenizer.json`` (``</s>`` is added) and never
    produces <s> or <pad>, as here; in the length that it divides scores by, </s> does not count. Compressed weights are
    unpacked. Raises `Unavailable` without the package ``ctranslate2``, and `ExportError` for what is no translator or
    has layers of unequal shapes.
    """
    model = point.model
    if not isinstance(model, Translator):
        raise ExportError(f"{point.name}: CTranslate2 takes translators; --to onnx and --to safetensors take it")
    point.refuse_changes("CTranslate2", "--to safetensors takes it")
    words = vocabulary(point.tokenizer)
    never = [number for number, word in enumerate(words) if word in _NEVER]
    with torch.no_grad():
        spec = _specification(copy.deepcopy(model), never)  # its quantizer writes into the arrays it is given
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.decoder_start_token = SPECIAL_TOKENS[EOS]
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(directory))
    (directory / "tokenizer.json").write_bytes(point.tokenizer.read_bytes())


def _specification(model: Translator, never: list[int]) -> Any:
    specs = load("ctranslate2.specs.transformer_spec")
    config = model.config
    rotary = {"rotary_dim": 0, "rotary_interleave": False} if config.positions == "rotary" else {}
    sides = []
    for kind, stack in (("Encoder", model.encoder), ("Decoder", model.decoder)):
        side = getattr(specs, f"Transformer{kind}Spec")(
            len(stack.layers), config.heads, pre_norm=config.norm == "pre", **rotary
        )
        _fill(side, stack)
        sides.append(side)
    encoder, decoder = sides
    encoder.embeddings[0].weight = decoder.embeddings.weight = decoder.projection.weight = model.embedding.weight
    if not config.tied:
        decoder.embeddings.weight = model.target_embedding.weight
        decoder.projection.weight = model.output_embedding.weight
    decoder.projection.bias = torch.zeros(len(model.embedding.weight))
    decoder.projection.bias[never] = -1e9
    if config.positions == "rotary":
        del encoder.position_encodings
    else:
        encoder.position_encodings.encodings = model.source_positions
        decoder.position_encodings.encodings = model.target_positions
    return specs.TransformerSpec(encoder, decoder)


def _fill(side: Any, stack: Stack) -> None:
    for spec, layer in zip(side.layer, stack, strict=True):
        _copy(spec.self_attention, layer.attention_norm, layer.attention.query_key_value, layer.attention.output)
        if hasattr(layer, "cross_attention"):
            across: CrossAttention = layer.cross_attention
            _copy(spec.attention, layer.cross_attention_norm, across.query, across.key_value, across.output)
        ffn = layer.feed_forward
        _set_norm(spec.ffn.layer_norm, layer.feed_forward_norm)
        _set_linear(spec.ffn.linear_0, ffn.inner)
        _set_linear(spec.ffn.linear_1, ffn.outer)
    if isinstance(stack.final_norm, nn.LayerNorm):
        _set_norm(side.layer_norm, stack.final_norm)


def _copy(spec: Any, norm: nn.LayerNorm, *linears: nn.Linear) -> None:
    """An attention: its normalization and its projections."""
    _set_norm(spec.layer_norm, norm)
    for place, linear in zip(spec.linear, linears, strict=True):
        _set_linear(place, linear)


def _set_norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = norm.weight, norm.bias


def _set_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = linear.weight, linear.bias
