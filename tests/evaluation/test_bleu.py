"""Scores against sacreBLEU's own command line, and what they must be by themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train_then_compress.evaluation.bleu import paired, score

WORDS = ["the", "a", "machine", "model", "reads", "writes", "every", "long", "short", "text", "line", "of", "then"]


def sentences(count: int, changed: float, seed: int) -> tuple[list[str], list[str]]:
    """Hypotheses that differ from their references in a share of the words, and the references."""
    rng = np.random.default_rng(0)
    references = [[*rng.choice(WORDS, rng.integers(5, 15)), "."] for _ in range(count)]
    rng = np.random.default_rng(seed)
    hypotheses = [[str(rng.choice(WORDS)) if rng.random() < changed else word for word in line] for line in references]
    return [" ".join(line).capitalize() for line in hypotheses], [" ".join(line).capitalize() for line in references]


def command_line(folder: Path, references: list[str], systems: list[list[str]], *options: str) -> str:
    """What sacreBLEU's command prints."""
    names = ["references", *(f"system{number}" for number in range(len(systems)))]
    for name, lines in zip(names, [references, *systems], strict=True):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    command = [sys.executable, "-m", "sacrebleu", names[0], "-i", *names[1:], "-m", "bleu", "chrf", "-w", "6",
               *options]  # fmt: skip
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_scores_interval_and_signatures_are_those_of_sacrebleus_command(tmp_path: Path) -> None:
    hypotheses, references = sentences(60, 0.2, 1)
    found = score(hypotheses, references, interval=True)
    bleu, chrf = json.loads(command_line(tmp_path, references, [hypotheses], "--confidence", "-f", "json"))
    assert found["bleu"] == pytest.approx(bleu["score"], abs=1e-5)
    assert found["chrf"] == pytest.approx(chrf["score"], abs=1e-5)
    middle, half = bleu["confidence_mean"], bleu["confidence_var"]
    assert [found["bleu_low"], found["bleu_high"]] == pytest.approx([middle - half, middle + half], abs=1e-4)
    assert found["bleu_low"] < found["bleu"] < found["bleu_high"]
    assert found["bleu_signature"] == bleu["signature"] and "bs:1000|seed:12345" in bleu["signature"]
    assert found["chrf_signature"] == score(hypotheses, references)["chrf_signature"]


def test_no_interval_unless_asked_for() -> None:
    hypotheses, references = sentences(10, 0, 1)
    found = score(hypotheses, references)
    assert set(found) == {"bleu", "chrf", "bleu_signature", "chrf_signature"}
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)
    assert "bs:" not in found["bleu_signature"] and "tok:13a" in found["bleu_signature"]


def test_the_paired_bootstrap_is_that_of_sacrebleus_command(tmp_path: Path) -> None:
    first, references = sentences(60, 0.25, 1)
    second, _ = sentences(60, 0.2, 2)
    found = paired(first, second, references)
    table = command_line(tmp_path, references, [first, second], "--paired-bs", "-f", "text")
    scores = [(float(score), float(half)) for score, half in re.findall(r"(\d+\.\d+) \(\d+\.\d+ ± (\d+\.\d+)\)", table)]
    p = [float(value) for value in re.findall(r"\(p = (\d\.\d+)\)", table)]
    for number, name in enumerate(("bleu", "chrf")):
        said = [found[name][key] for key in ("first", "first_interval", "second", "second_interval")]
        assert said == pytest.approx([*scores[number], *scores[number + 2]], abs=1e-4)
        assert found[name]["p"] == pytest.approx(p[number], abs=1e-4)


def test_a_clear_difference_is_told_from_none() -> None:
    good, references = sentences(60, 0.05, 1)
    bad, _ = sentences(60, 0.4, 2)
    assert paired(good, bad, references)["bleu"]["p"] < 0.01
    assert paired(good, good, references)["bleu"]["p"] == 1


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], []), (["a"], ["a", "b"]), ([], [])])
def test_sides_of_unequal_length_or_none_are_refused(hypotheses: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="must be as many"):
        score(hypotheses, references)
    with pytest.raises(ValueError, match="must be as many"):
        paired(hypotheses, hypotheses, references)
