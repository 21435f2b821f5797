"""What a stored point costs: bytes on disk, parameters, counted FLOPs, measured speed, distance from dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from train_then_compress.compression.compressed import weight_errors
from train_then_compress.config.parts import in_embedding
from train_then_compress.cost.latency import decoding_speed, encoder_speed, example_latency
from train_then_compress.evaluation.decoding import beam_search
from train_then_compress.evaluation.translation import decode_lines, encode
from train_then_compress.models.early_exit import EarlyExitClassifier
from train_then_compress.models.transformer import Translator
from train_then_compress.tasks import ClassificationTask, RunTask, TranslationTask
from train_then_compress.tasks.translation import DECODED_AT_ONCE

#: Test sentences that a translator's speed is taken on: in a batch, and one after the other.
_SENTENCES, _SINGLE = 32, 8


def costs(dense: nn.Module, stored: nn.Module, task: RunTask, packed: Path, dense_stage: Path) -> dict[str, Any]:
    """The cost columns of a result row (see `analysis.table.COLUMNS`).

    ``stored`` holds the weights that the file ``packed`` gave back; ``dense_stage`` is the dense model's directory.
    Embeddings are the token embedding and learned position tables. Weights whose inputs were rescaled (`smooth`) are
    not compared with the dense ones.
    """
    single: dict[str, float] = {}
    if isinstance(task, ClassificationTask):
        if isinstance(stored, EarlyExitClassifier):
            single["average_depth"] = task.average_depth(stored)
        single["example_latency_ms"] = example_latency(stored.cpu(), task.examples("test"))
    stored.cpu()
    weights = {name: parameter.detach() for name, parameter in stored.named_parameters()}
    nonzero = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    embeddings = [name for name in weights if in_embedding(name) or name.endswith("positions")]
    parameters = sum(weight.numel() for weight in weights.values())
    rescaled = {f"{name}.weight" for name, module in stored.named_modules() if getattr(module, "rescaled", False)}
    comparable = {name: weight for name, weight in weights.items() if name not in rescaled}
    total, errors = weight_errors({n: p.detach().cpu() for n, p in dense.named_parameters()}, comparable)
    return {
        "bytes": packed.stat().st_size,
        "bytes_fp32": (dense_stage / "model.safetensors").stat().st_size,
        "bytes_bf16": (dense_stage / "packed.safetensors").stat().st_size,
        "parameters": parameters,
        "parameters_without_embeddings": parameters - sum(weights[name].numel() for name in embeddings),
        "nonzero": sum(nonzero.values()),
        "nonzero_without_embeddings": sum(nonzero.values()) - sum(nonzero[name] for name in embeddings),
        "flops_per_token": task.flops_per_token(stored),
        "flops_per_token_nonzero": task.flops_per_token(stored, nonzero=True),
        **_speed(stored, task),
        **single,
        "weight_error": total,
        "weight_errors": errors,
    }


def _speed(stored: nn.Module, task: RunTask) -> dict[str, Any]:
    """Of the encoder, on full sequences; of a translator, on the first test sentences."""
    if not isinstance(task, TranslationTask):
        return encoder_speed(stored.get_submodule("encoder"), task.length, task.vocab_size)
    assert isinstance(stored, Translator)
    model, sources = stored, encode(task.tokenizer, task.pairs.texts("test")[0][:_SENTENCES], stored.length)

    def translated(batches: list[list[list[int]]], beam: int) -> int:
        """Target tokens of the best hypotheses, ``</s>`` included."""
        decoding, tokens = task.decoding(beam), 0
        for batch in batches:
            found = decode_lines(lambda source: beam_search(model, source, decoding), batch, DECODED_AT_ONCE,
                                 torch.device("cpu"))  # fmt: skip
            tokens += sum(len(hypotheses[0].tokens) + 1 for hypotheses in found)
        return tokens

    beam, single = task.config.evaluation.beam, [[source] for source in sources[:_SINGLE]]
    return decoding_speed(
        lambda: translated([sources], 1), lambda: translated([sources], beam), lambda: translated(single, beam),
        len(single),
    )  # fmt: skip
