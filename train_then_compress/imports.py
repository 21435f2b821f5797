"""`ttc import`: a published model as the directory of a finished pretraining run, to finetune, compress and export."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save

from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import pack
from train_then_compress.config import Config
from train_then_compress.models.fairseq.checkpoint import read_roberta
from train_then_compress.models.fairseq.weights import Incompatible
from train_then_compress.records import RunDirectory, StageKey, atomic_write, digest, write_json
from train_then_compress.training.clock import Clock

__all__ = ["Incompatible", "import_roberta"]


def import_roberta(source: Path, out: Path) -> Path:
    """Write a RoBERTa of fairseq's (see `read_roberta`) as a run in the directory ``out``, for ``init_from``.

    Its text is not known; its record says how many updates it was trained for. Raises `Incompatible`, and
    `ConfigError` for a shape that is not possible here.
    """
    if out.exists():
        raise Incompatible(f"{out} is there already; delete it, or name another place by --out")
    published = read_roberta(source)
    model, tokenizer = published.model, published.tokenizer
    vocab_size, length = tokenizer.get_vocab_size(), model.encoder.length
    config = Config.build({
        "study": "imported", "model": dataclasses.asdict(model.config),
        "data": {"name": "text_files", "train": f"(what {source.name} was trained on)", "vocab_size": vocab_size,
                 "sequence_length": length},
        "budget": {"kind": "steps", "value": max(2, published.updates)},
    })  # fmt: skip
    weights = save(model.state_dict())
    key = StageKey("pretrain", digest([hashlib.sha256(weights).hexdigest(), tokenizer.to_str()]))
    run = RunDirectory(out)
    run.write_config(config)
    stage = run.stage(key)
    atomic_write(stage / "model.safetensors", weights)
    atomic_write(stage / "packed.safetensors", pack(Compressed(model), torch.float32, {"stage": key.directory}))
    atomic_write(stage / "tokenizer.json", tokenizer.to_str())
    write_json(stage / "record.json", {
        "stage": key.name, "id": key.id, "clock": Clock(steps=published.updates).facts(), "validation": {},
        "corpus": {"vocab_size": vocab_size, "licence": "as stated where the model was published"},
    })  # fmt: skip
    return out
