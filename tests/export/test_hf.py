"""A directory for transformers: its classes load it, give our logits, and its tokenizer our ids."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from train_then_compress.data.prepare import BOS, EOS, MASK, PAD
from train_then_compress.export import export
from train_then_compress.export.hf import write
from train_then_compress.export.point import ExportError, Point, find_point

AUTO = {"mlm": "AutoModelForMaskedLM", "classification": "AutoModelForSequenceClassification"}


def loaded(transformers: ModuleType, task: str, directory: Path) -> nn.Module:
    """The model, nothing of it made up and nothing of the file left over."""
    auto = getattr(transformers, AUTO[task])
    model, said = auto.from_pretrained(directory, output_loading_info=True, local_files_only=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    result: nn.Module = model.eval()
    return result


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits
    return logits


@pytest.mark.parametrize("task", ["mlm", "classification"])
@pytest.mark.parametrize("norm, kind", [("pre", "RobertaPreLayerNorm"), ("post", "Roberta")])
@pytest.mark.parametrize("positions, tied", [("learned", True), ("sinusoidal", True), ("learned", False)])
def test_logits_are_ours(
    transformers: ModuleType, point_of: Callable[..., Point], tmp_path: Path, assert_agrees: Callable[..., None],
    task: str, norm: str, kind: str, positions: str, tied: bool, batches: list[Tensor],
) -> None:  # fmt: skip
    point = point_of(task, norm=norm, positions=positions, tied=tied)
    write(point, tmp_path)
    model = loaded(transformers, task, tmp_path)
    assert type(model).__name__ == kind + AUTO[task].removeprefix("AutoModel")
    for tokens in batches:
        assert_agrees(point, tokens, logits_of(model, tokens))


def test_a_run_from_text_to_logits(
    transformers: ModuleType, masked_lm_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A quantized point; the mask is filled with what our own model thinks most likely."""
    directory = export(f"{masked_lm_run}:quant4", "hf", tmp_path / "out")
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert not caplog.records
    model = loaded(transformers, "mlm", directory)
    point = find_point(f"{masked_lm_run}:quant4")
    inputs = tokenizer(["Ada paints the <mask>.", "Two people mend the net near the <mask>."], padding=True,
                       return_tensors="pt")  # fmt: skip
    tokens = inputs["input_ids"]
    where = (tokens == MASK).flatten().nonzero().squeeze(1)
    with torch.inference_mode():
        ours, theirs = point.model(tokens, where), model(**inputs).logits.flatten(0, 1)[where]
    assert len(where) == 2 and torch.allclose(ours, theirs, atol=1e-4)


def test_token_ids_are_ours(transformers: ModuleType, masked_lm_run: Path, text_file: Path, tmp_path: Path) -> None:
    directory = export(str(masked_lm_run), "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    (stored,) = masked_lm_run.glob("stages/pretrain-*/tokenizer.json")
    ours = Tokenizer.from_file(str(stored))
    texts = [*text_file.read_text().splitlines()[:50], " spaces  before", "Ünïcode — ½", "", "tab\tand\nline"]
    for text in texts:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == [BOS, *ids, EOS]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    pair = theirs("Ada paints.", "Boris mends.")["input_ids"]
    assert pair == [BOS, *ours.encode("Ada paints.").ids, EOS, EOS, *ours.encode("Boris mends.").ids, EOS]
    special = theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.mask_token_id
    assert special == (0, 1, 2, 3, 4) and theirs.model_max_length == 32 and len(theirs) == ours.get_vocab_size()


def test_a_classifiers_labels_are_transformers(transformers: ModuleType, classifier_run: Path, tmp_path: Path) -> None:
    model = loaded(transformers, "classification", export(str(classifier_run), "hf", tmp_path / "out"))
    point = find_point(str(classifier_run))
    assert model.config.id2label == dict(enumerate(point.labels)) and model.config.num_labels == len(point.labels) == 6
    assert model.config.label2id["harbour"] == point.labels.index("harbour")
    tokens = torch.arange(10, 42).view(2, 16)
    with torch.inference_mode():
        assert torch.allclose(logits_of(model, tokens), point.model(tokens), atol=1e-4)


def test_fewer_layers_are_as_good_as_all(
    transformers: ModuleType, point_of: Callable[..., Point], tmp_path: Path, assert_agrees: Callable[..., None]
) -> None:
    point = point_of("mlm", depth=3)
    point.compressed.change({"method": "structured", "layers": [0, 2], "heads": [2, 2], "ffn": [128, 128]})
    write(point, tmp_path)
    tokens = torch.arange(10, 42).view(2, 16)
    assert_agrees(point, tokens, logits_of(loaded(transformers, "mlm", tmp_path), tokens))


@pytest.mark.parametrize(
    "task, change, name",
    [
        ("classification", {"method": "structured", "layers": [0, 1], "heads": [2, 2], "ffn": [128, 40]},
         r"encoder\.layers\.1\.feed_forward\.inner\.weight"),
        ("mlm", {"method": "structured", "layers": [0, 1], "heads": [2, 1], "ffn": [128, 128]},
         r"encoder\.layers\.1\.attention\.query_key_value\.weight"),
        ("mlm", {"method": "svd", "embeddings": False, "ranks": [0, 4, 0, 0] + 4 * [0]},
         r"encoder\.layers\.0\.attention\.output"),
        ("mlm", {"method": "svd", "embeddings": True, "ranks": [0] * 8 + [4]}, r"encoder\.embedding"),
        ("mlm", {"method": "smooth", "static": True, "smoothed": True},
         r"encoder\.layers\.0\.attention\.query_key_value"),
        ("classification", {"method": "exit", "every": 1, "threshold": 0.9}, "exits"),
    ],
)  # fmt: skip
def test_what_roberta_cannot_be_is_refused_in_words(
    task: str, change: dict[str, Any], name: str, point_of: Callable[..., Point], tmp_path: Path
) -> None:
    point = point_of(task)
    point.compressed.change(change)
    with pytest.raises(ExportError, match=rf"run:none: compression changed {name},.*; --to onnx and --to safetensors"):
        write(point, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rotary_positions_are_refused_in_words(point_of: Callable[..., Point], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"run:none: .* no rotary positions; --to onnx and --to safetensors take it"):
        write(point_of("mlm", positions="rotary"), tmp_path)
