"""A point of a run, from the packed file that it was evaluated from. No corpus is needed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import unpack
from train_then_compress.config import ClassificationTask, Config, ParallelConfig, TransformerConfig
from train_then_compress.models.roberta import Classifier, MaskedLM
from train_then_compress.models.transformer import Translator
from train_then_compress.records import DENSE_STAGES, RunDirectory, read_json, read_rows


class ExportError(ValueError):
    """What was asked for is not there or cannot be done; the message says why."""


@dataclass(frozen=True)
class Point:
    """A dense or compressed model. ``name`` is ``<run>:<recipe>``; ``labels`` are a classifier's, in their order."""

    name: str
    config: Config
    compressed: Compressed
    tokenizer: Path
    vocab_size: int
    labels: list[str]

    @property
    def model(self) -> nn.Module:
        """A `MaskedLM`, `Classifier` or `Translator` (its layers may have been changed), ready to infer.

        It computes in fp32 with the weights of the packed file, which are those that were evaluated: what is not
        quantized was rounded to bf16 there (of imported models: nothing).
        """
        return self.compressed.model.eval()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model takes."""
        if isinstance(self.model, Translator):
            return self.model.length
        length: int = self.model.get_submodule("encoder").length  # type: ignore[assignment]
        return length

    def refuse_changes(self, library: str, instead: str) -> None:
        """Raise `ExportError` where compression changed more than weights; fewer layers are as good as all."""
        with torch.device("meta"):
            plain: nn.Module = new_model(self.config, self.vocab_size, self.labels)
        for name, layers in plain.named_modules():
            if isinstance(layers, nn.ModuleList):
                del layers[len(list(self.model.get_submodule(name).children())) :]
        found, expected = _form(self.model), _form(plain)
        if found != expected:
            different = next(name for name in expected | found if found.get(name) != expected.get(name))
            raise ExportError(f"{self.name}: compression changed {different}, and {library} has plain layers of one "
                              f"shape only; {instead}")  # fmt: skip

    @property
    def facts(self) -> dict[str, str]:
        """What a file's metadata says: point, task, model and changes of its architecture (JSON), labels (JSON)."""
        return {
            "point": self.name, "task": self.config.task.name, "longest": str(self.longest),
            "model": json.dumps(dataclasses.asdict(self.config.model)),
            "structure": json.dumps(self.compressed.structure),
            "labels": json.dumps(self.labels), "tokenizer": "tokenizer.json",
        }  # fmt: skip


def find_point(text: str) -> Point:
    """The point that ``RUN_DIRECTORY`` (the dense model) or ``RUN_DIRECTORY:RECIPE`` names; raises `ExportError`."""
    directory, recipe = split_name(text)
    run = RunDirectory(directory)
    if not (run.path / "config.yaml").is_file():
        raise ExportError(f"{directory}: no run there; expected RUN_DIRECTORY or RUN_DIRECTORY:RECIPE, "
                          "e.g. runs/demo/mlm-d2-w64-seconds45-s0-1a2b3c4d:quant4")  # fmt: skip
    records = [path for name in DENSE_STAGES for path in sorted(run.path.glob(f"stages/{name}-*/record.json"))]
    if not records:
        raise ExportError(f"{directory}: its model is not trained yet")
    dense = records[-1].parent
    stages = {"none": dense.name} | {row["recipe"]: row["stage"] for row in read_rows(run.path / "points.jsonl")}
    if recipe not in stages:
        raise ExportError(f"{directory}: no point {recipe!r}; its points are {', '.join(sorted(stages))}")
    config, corpus = Config.load(run.path / "config.yaml"), read_json(records[-1])["corpus"]
    labels, vocab_size = [str(label) for label in corpus.get("labels", [])], int(corpus["vocab_size"])
    packed = run.path / "stages" / stages[recipe] / "packed.safetensors"
    compressed = unpack(packed, new_model(config, vocab_size, labels))
    name = f"{directory.absolute().name}:{recipe}"
    return Point(name, config, compressed, dense / "tokenizer.json", vocab_size, labels)


def find_translator(text: str) -> tuple[Point, Translator]:
    """As `find_point`, and its model; `ExportError` for one that does not translate."""
    point = find_point(text)
    if not isinstance(point.model, Translator):
        raise ExportError(f"{text}: a model of task={point.config.task.name}; only those of task=translation translate")
    return point, point.model


def split_name(text: str) -> tuple[Path, str]:
    """Run directory and recipe."""
    directory, colon, recipe = text.rpartition(":")
    return (Path(directory), recipe) if colon and not Path(text).is_dir() else (Path(text), "none")


def _form(model: nn.Module) -> dict[str, Any]:
    """The type of every module and the shape of every parameter, by name."""
    types: dict[str, Any] = {name: type(module) for name, module in model.named_modules() if name}
    return types | {name: parameter.shape for name, parameter in model.named_parameters()}


def new_model(config: Config, vocab_size: int, labels: list[str]) -> MaskedLM | Classifier | Translator:
    """A dense model of a run's shape."""
    if isinstance(config.model, TransformerConfig):
        return Translator(config.model, vocab_size, config.model.length)
    assert not isinstance(config.data, ParallelConfig)
    length = config.longest or config.data.sequence_length
    if isinstance(config.task, ClassificationTask):
        shape = dataclasses.replace(config.model, dropout=config.task.dropout)
        return Classifier(shape, vocab_size, length, len(labels))
    return MaskedLM(config.model, vocab_size, length)
