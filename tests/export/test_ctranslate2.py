"""A directory for CTranslate2: its translations are ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ctranslate2
import pytest
import torch
from tokenizers import Tokenizer

from train_then_compress.data.prepare import MASK
from train_then_compress.evaluation.bleu import score
from train_then_compress.evaluation.decoding import Decoding, Hypothesis, beam_search
from train_then_compress.evaluation.translation import decode_lines, detokenize, encode
from train_then_compress.export import ctranslate2 as float32
from train_then_compress.export import ctranslate2_int8 as int8
from train_then_compress.export import export
from train_then_compress.export.point import ExportError, Point, find_point
from train_then_compress.export.tokenizer import vocabulary
from train_then_compress.models.factored import FactoredEmbedding
from train_then_compress.models.transformer import Translator

LONGEST = 24


@pytest.fixture
def sources(point_of: Callable[..., Point]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(MASK + 1, 300, (n,), generator=generator).tolist() for n in (3, 9, 14, 1, 6, 11, 20, 4)]


def ours(
    point: Point, sources: list[list[int]], beam: int, longest: int = LONGEST, penalty: float = 1.0
) -> list[Hypothesis]:
    model = point.model
    assert isinstance(model, Translator)
    decoding = Decoding(beam=beam, length_penalty=penalty, max_ratio=0, max_extra=longest)
    found = decode_lines(lambda batch: beam_search(model, batch, decoding), sources, 4096, torch.device("cpu"))
    return [hypotheses[0] for hypotheses in found]


def theirs(
    directory: Path, point: Point, sources: list[list[int]], beam: int, longest: int = LONGEST, penalty: float = 1.0
) -> list[list[int]]:
    words = vocabulary(point.tokenizer)
    translator = ctranslate2.Translator(str(directory), device="cpu", intra_threads=1)
    found = translator.translate_batch(
        [[words[token] for token in source] for source in sources],
        beam_size=beam,
        max_decoding_length=longest,
        length_penalty=penalty,
        num_hypotheses=beam,  # asked for one, it stops where the first in its beam ends
    )
    return [[words.index(word) for word in result.hypotheses[0]] for result in found]


@pytest.mark.parametrize("norm, tied", [("pre", True), ("post", True), ("pre", False)])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("beam", [1, 4])
def test_translations_are_ours(
    norm: str,
    tied: bool,
    positions: str,
    beam: int,
    point_of: Callable[..., Point],
    sources: list[list[int]],
    tmp_path: Path,
) -> None:
    point = point_of("translation", norm=norm, positions=positions, tied=tied)
    float32.write(point, tmp_path)
    expected = [hypothesis.tokens for hypothesis in ours(point, sources, beam, penalty=0)]
    # What is cut off has lost its </s> there and, in a beam, the score of it.
    ended = [len(tokens) < LONGEST for tokens in expected]
    assert beam == 1 or sum(ended) > 2
    for own, other, has_ended in zip(expected, theirs(tmp_path, point, sources, beam, penalty=0), ended, strict=True):
        assert own == other or (beam > 1 and not has_ended)


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_the_model_stays_as_it_is(point_of: Callable[..., Point], quantization: str, tmp_path: Path) -> None:
    """CTranslate2's quantizer writes into the arrays that it is given."""
    point = point_of("translation")
    before = {name: value.clone() for name, value in point.model.state_dict().items()}
    float32.write(point, tmp_path, quantization)
    assert all(torch.equal(value, before[name]) for name, value in point.model.state_dict().items())


@pytest.mark.parametrize("form", ["ctranslate2", "ctranslate2_int8"])
def test_a_run_has_our_bleu(translator_run: Path, parallel_files: Path, form: str, tmp_path: Path) -> None:
    name = f"{translator_run}:quant4"
    directory = export(name, form, tmp_path / "out")
    point, tokenizer = find_point(name), Tokenizer.from_file(str(directory / "tokenizer.json"))
    sources, references = (
        [line for split in ("train", "valid", "test") for line in (parallel_files / f"{split}.{side}").open()]
        for side in ("en", "xx")
    )
    encoded = encode(tokenizer, sources, point.longest)
    found = ours(point, encoded, 5, longest=64), theirs(directory, point, encoded, 5, longest=64)
    lines = [[detokenize(tokenizer, tokens) for tokens in each] for each in ([h.tokens for h in found[0]], found[1])]
    bleu = [score(each, references)["bleu"] for each in lines]
    assert bleu[0] > 10
    if form == "ctranslate2":
        assert sum(own == other for own, other in zip(*lines, strict=True)) > 0.99 * len(sources)
        assert bleu[1] == pytest.approx(bleu[0], abs=0.3)
    # What 8 bits cost depends on the processor, and is much for a model of 150 steps, torn between words.
    assert bleu[1] > 0.8 * bleu[0]


@pytest.mark.parametrize(
    "task, factored, message",
    [("mlm", False, "CTranslate2 takes translators; --to onnx"), ("translation", True, "CTranslate2 has plain layers")],
)
def test_what_ctranslate2_cannot_be_is_refused_in_words(
    task: str, factored: bool, message: str, point_of: Callable[..., Point], tmp_path: Path
) -> None:
    point = point_of(task)
    if factored:
        point.model.embedding = FactoredEmbedding(point.vocab_size, 32, 4)
    with pytest.raises(ExportError, match=f"run:none: .*{message}"):
        float32.write(point, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files(point_of: Callable[..., Point], tmp_path: Path) -> None:
    point = point_of("translation")
    for kind, write in (("float32", float32.write), ("int8", int8.write)):
        (tmp_path / kind).mkdir()
        write(point, tmp_path / kind)
        assert {path.name for path in (tmp_path / kind).iterdir()} == {
            "model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json",
        }  # fmt: skip
    assert json.loads((tmp_path / "int8" / "shared_vocabulary.json").read_text()) == vocabulary(point.tokenizer)
    matrices = point.config.model.matrix_weights(point.vocab_size)
    sizes = [(tmp_path / kind / "model.bin").stat().st_size for kind in ("float32", "int8")]
    assert sizes[0] > 4 * matrices and matrices < sizes[1] < 0.4 * sizes[0]
