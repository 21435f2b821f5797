"""Directories for fairseq: its own programs load them, and compute and translate what we do."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train_then_compress.data.prepare import BOS, EOS, MASK, PAD
from train_then_compress.evaluation.decoding import Decoding, beam_search
from train_then_compress.evaluation.translation import decode_lines
from train_then_compress.export import export
from train_then_compress.export.fairseq import write
from train_then_compress.export.point import ExportError, Point, find_point
from train_then_compress.export.tokenizer import vocabulary
from train_then_compress.models.transformer import Translator

pytest.importorskip("fairseq")


def program(name: str, *arguments: object) -> str:
    """Run one of fairseq's, without any help to load what torch would not; what it says."""
    command = [sys.executable, "-m", f"fairseq_cli.{name}", *map(str, arguments), "--cpu", "--dataset-impl", "raw"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hub(directory: Path) -> Any:
    from fairseq.models.roberta import RobertaModel

    return RobertaModel.from_pretrained(str(directory), bpe="hf_byte_bpe", bpe_add_prefix_space=True).eval()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions, tied", [("learned", True), ("sinusoidal", True), ("learned", False)])
def test_a_masked_lms_logits_are_ours(
    norm: str, positions: str, tied: bool, point_of: Callable[..., Point], tmp_path: Path, batches: list[torch.Tensor],
    assert_agrees: Callable[..., None],
) -> None:  # fmt: skip
    point = point_of("mlm", norm=norm, positions=positions, tied=tied)
    write(point, tmp_path)
    model = hub(tmp_path).model
    for tokens in batches:
        with torch.inference_mode():
            assert_agrees(point, tokens, model(tokens)[0])


def test_a_run_from_text_to_what_fills_the_mask(masked_lm_run: Path, tmp_path: Path) -> None:
    """A quantized point: fairseq tokenizes as we do, and thinks the same words likely."""
    roberta = hub(export(f"{masked_lm_run}:quant4", "fairseq", tmp_path / "out"))
    point = find_point(f"{masked_lm_run}:quant4")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(point.tokenizer))
    text = "Ada paints the salty boat in the harbour."
    tokens = roberta.encode(text)
    assert tokens.tolist() == [BOS, *tokenizer.encode(text).ids, EOS]
    assert roberta.decode(tokens).strip() == text
    assert roberta.task.mask_idx == MASK and roberta.task.source_dictionary.pad() == PAD
    tokens[3] = MASK
    with torch.inference_mode():
        ours = point.model(tokens[None], torch.tensor([3]), padded=False)
        torch.testing.assert_close(roberta.model(tokens[None])[0][0, 3], ours[0], rtol=1e-5, atol=1e-5)


def test_fairseq_validates_a_masked_lm(masked_lm_run: Path, text_file: Path, tmp_path: Path) -> None:
    directory = export(str(masked_lm_run), "fairseq", tmp_path / "out")
    bpe = hub(directory).bpe
    lines = [line for line in text_file.read_text().splitlines() if line][:40]
    encoded = [bpe.encode(line).split()[:24] for line in lines]  # the model takes 32 tokens
    (directory / "valid").write_text("".join(f"{' '.join(tokens)}\n" for tokens in encoded))
    said = program("validate", directory, "--path", directory / "model.pt", "--task", "masked_lm", "--criterion",
                   "masked_lm", "--batch-size", 8, "--log-format", "simple")  # fmt: skip
    (loss,) = re.findall(r"valid on 'valid' subset .*\| loss ([\d.]+)", said)
    assert float(loss) < math.log2(400), "in bits: better than guessing"


@pytest.mark.parametrize(
    "norm, positions, tied", [("pre", "learned", True), ("post", "sinusoidal", True), ("pre", "sinusoidal", False)]
)
def test_fairseq_generates_our_hypotheses(
    norm: str, positions: str, tied: bool, point_of: Callable[..., Point], tmp_path: Path
) -> None:
    point = point_of("translation", norm=norm, positions=positions, tied=tied)
    write(point, tmp_path)
    generator = torch.Generator().manual_seed(3)
    sources = [torch.randint(MASK + 1, 300, (n,), generator=generator).tolist() for n in (3, 9, 14, 1, 6, 11, 20, 4)]
    words = vocabulary(point.tokenizer)
    for language in ("en", "it"):
        # The program leaves out its last batch, which the longest source is alone in.
        lines = [" ".join(words[token] for token in source) + "\n" for source in [*sources, [MASK + 1] * 24]]
        (tmp_path / f"test.en-it.{language}").write_text("".join(lines))
    program("generate", tmp_path, "--path", tmp_path / "model.pt", "--beam", 4, "--max-len-a", 0, "--max-len-b", 24,
            "--batch-size", 8, "--results-path", tmp_path)  # fmt: skip
    said = (tmp_path / "generate-test.txt").read_text()
    theirs = {int(number): words.split() for number, words in re.findall(r"^H-(\d+)\t\S+\t(.*)$", said, re.M)}
    model = point.model
    assert isinstance(model, Translator)
    decoding = Decoding(beam=4, max_ratio=0, max_extra=24)
    found = decode_lines(lambda batch: beam_search(model, batch, decoding), sources, 4096, torch.device("cpu"))
    ours = [[words[token] for token in hypotheses[0].tokens] for hypotheses in found]
    assert sum(len(words) < 24 for words in ours) > 4 and [theirs[number] for number in range(len(sources))] == ours


def test_fairseq_validates_a_translator(point_of: Callable[..., Point], tmp_path: Path) -> None:
    """Its loss, in bits a token of the target, is ours."""
    point = point_of("translation", positions="sinusoidal")
    write(point, tmp_path)
    pairs = torch.randint(MASK + 1, 300, (16, 2, 9), generator=torch.Generator().manual_seed(4))
    words = vocabulary(point.tokenizer)
    for side, language in enumerate(("en", "it")):
        lines = [" ".join(words[token] for token in tokens) for tokens in pairs[:, side].tolist()]
        (tmp_path / f"valid.en-it.{language}").write_text("\n".join(lines) + "\n")
    said = program("validate", tmp_path, "--path", tmp_path / "model.pt", "--task", "translation", "--batch-size", 8,
                   "--log-format", "simple")  # fmt: skip
    (loss,) = re.findall(r"valid on 'valid' subset .*\| loss ([\d.]+)", said)
    source, target = (torch.cat([side, torch.full((16, 1), EOS)], dim=1) for side in pairs.unbind(1))
    with torch.inference_mode():
        logits = point.model(source, target.roll(1, dims=1), torch.arange(target.numel()))
    expected = torch.nn.functional.cross_entropy(logits, target.flatten()) / math.log(2)
    assert float(loss) == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.parametrize(
    "task, model, change, message",
    [
        ("mlm", {"positions": "rotary"}, None, "no rotary positions"),
        ("translation", {"positions": "rotary"}, None, "no rotary positions"),
        ("classification", {}, None, "a classifier; .* --to hf takes it"),
        ("mlm", {}, {"method": "structured", "layers": [0, 1], "heads": [2, 2], "ffn": [128, 40]}, "plain layers"),
        ("mlm", {}, {"method": "svd", "embeddings": True, "ranks": [0] * 8 + [4]}, r"encoder\.embedding"),
    ],
)
def test_what_fairseq_cannot_be_is_refused_in_words(
    task: str, model: dict[str, Any], change: dict[str, Any] | None, message: str, point_of: Callable[..., Point],
    tmp_path: Path,
) -> None:  # fmt: skip
    point = point_of(task, **model)
    if change:
        point.compressed.change(change)
    with pytest.raises(ExportError, match=f"run:none: .*{message}"):
        write(point, tmp_path)
    assert not list(tmp_path.iterdir())
