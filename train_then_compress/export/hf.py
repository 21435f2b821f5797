"""A directory that ``transformers`` loads: post-norm models as RoBERTa, pre-norm ones as RoBERTa-PreLayerNorm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, SPECIAL_TOKENS, UNK
from train_then_compress.export.point import ExportError, Point
from train_then_compress.export.tokenizer import has_prefix_space, write_tokenizer
from train_then_compress.models.positions import FIRST_POSITION
from train_then_compress.models.roberta import Classifier, MaskedLM
from train_then_compress.models.transformer import Translator


def write(point: Point, directory: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's two files.

    ``AutoModelForMaskedLM`` (``AutoModelForSequenceClassification``) and ``AutoTokenizer`` load them; weights are
    fp32, compressed ones unpacked. Raises `ExportError` for what RoBERTa's classes cannot be.
    """
    _check(point)
    model = point.model
    assert isinstance(model, MaskedLM | Classifier)
    (directory / "model.safetensors").write_bytes(save(weights(model), {"format": "pt"}))
    _write_json(directory / "config.json", settings(model, point.labels))
    _write_json(directory / "tokenizer_config.json", _tokenizer_settings(point))
    write_tokenizer(point.tokenizer, directory)


def settings(model: MaskedLM | Classifier, labels: list[str] | None = None) -> dict[str, Any]:
    """The content of ``config.json``; ``labels`` names a classifier's."""
    config, encoder = model.config, model.encoder
    family = "Roberta" if config.norm == "post" else "RobertaPreLayerNorm"
    head = "ForMaskedLM" if isinstance(model, MaskedLM) else "ForSequenceClassification"
    described: dict[str, Any] = {
        "model_type": "roberta" if config.norm == "post" else "roberta-prelayernorm",
        "architectures": [family + head], "vocab_size": encoder.embedding.num_embeddings,
        "hidden_size": config.width, "num_hidden_layers": len(encoder.layers), "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width, "hidden_act": "gelu", "type_vocab_size": 1,
        "max_position_embeddings": encoder.length + FIRST_POSITION, "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout,
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS, "tie_word_embeddings": config.tied,
    }  # fmt: skip
    if labels:
        described |= {
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    return described


def weights(model: MaskedLM | Classifier) -> dict[str, Tensor]:
    """The weights under transformers' names; those that it ties to others are left out."""
    pre = model.config.norm == "pre"
    prefix = "roberta_prelayernorm" if pre else "roberta"
    ours = dict(model.state_dict())
    positions = model.encoder.positions.detach()
    ours.pop("encoder.positions", None)
    theirs = {
        f"{prefix}.embeddings.position_embeddings.weight":
            torch.cat([positions.new_zeros(FIRST_POSITION, positions.shape[1]), positions]),
        f"{prefix}.embeddings.token_type_embeddings.weight": positions.new_zeros(1, positions.shape[1]),
        f"{prefix}.embeddings.word_embeddings.weight": ours.pop("encoder.embedding.weight"),
    }  # fmt: skip
    outside = {"encoder.embedding_norm": f"{prefix}.embeddings.LayerNorm", "encoder.final_norm": f"{prefix}.LayerNorm"}
    if isinstance(model, MaskedLM):
        theirs["lm_head.bias"] = ours.pop("bias") if model.config.tied else ours["output_embedding.bias"]
        outside |= {"head": "lm_head.dense", "head_norm": "lm_head.layer_norm", "output_embedding": "lm_head.decoder"}
    else:
        outside |= {"head": "classifier.dense", "projection": "classifier.out_proj"}
    for name, value in ours.items():
        part, _, kind = name.rpartition(".")
        if part in outside:
            theirs[f"{outside[part]}.{kind}"] = value
        else:
            theirs |= _in_layer(part, kind, value, f"{prefix}.encoder.layer", pre)
    return {name: value.clone() for name, value in theirs.items()}


def _in_layer(part: str, kind: str, value: Tensor, layers: str, pre: bool) -> dict[str, Tensor]:
    """A parameter of a layer (``part``: ``encoder.layers.<number>.<module>``) under transformers' name or names."""
    _, _, number, inside = part.split(".", 3)
    if inside == "attention.query_key_value":
        pieces = zip(("query", "key", "value"), value.chunk(3), strict=True)
        return {f"{layers}.{number}.attention.self.{which}.{kind}": piece for which, piece in pieces}
    names = {
        "attention.output": "attention.output.dense", "feed_forward.inner": "intermediate.dense",
        "feed_forward.outer": "output.dense",
        "attention_norm": "attention.LayerNorm" if pre else "attention.output.LayerNorm",
        "feed_forward_norm": "intermediate.LayerNorm" if pre else "output.LayerNorm",
    }  # fmt: skip
    return {f"{layers}.{number}.{names[inside]}.{kind}": value}


def _check(point: Point) -> None:
    """Refuse what RoBERTa's classes in transformers cannot be."""
    instead = "--to onnx and --to safetensors take it"
    if isinstance(point.model, Translator):
        raise ExportError(f"{point.name}: transformers has no class for this translator; --to ctranslate2, --to "
                          "fairseq and --to safetensors take it")  # fmt: skip
    if point.config.model.positions == "rotary":
        raise ExportError(f"{point.name}: transformers' RoBERTa has no rotary positions; {instead}")
    point.refuse_changes("transformers' RoBERTa", instead)


def _tokenizer_settings(point: Point) -> dict[str, Any]:
    """``tokenizer_config.json``: whatever class reads it, ``tokenizer.json`` says what is done."""
    roles = {"bos": BOS, "cls": BOS, "eos": EOS, "sep": EOS, "pad": PAD, "unk": UNK}
    mask = {"__type": "AddedToken", "content": SPECIAL_TOKENS[MASK], "lstrip": True, "rstrip": False,
            "normalized": False, "single_word": False, "special": True}  # fmt: skip
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": point.longest, "padding_side": "right",
        "add_prefix_space": has_prefix_space(point.tokenizer), "clean_up_tokenization_spaces": False,
        "mask_token": mask, **{f"{role}_token": SPECIAL_TOKENS[token] for role, token in roles.items()},
    }  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
