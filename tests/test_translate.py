"""`ttc translate` and `ttc compare` from the outside, and what becomes of lines that cannot be taken as they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from train_then_compress.compare import compare
from train_then_compress.config import Config
from train_then_compress.engines import measure_engines
from train_then_compress.evaluation.decoding import Decoding
from train_then_compress.evaluation.sampling import Sampling
from train_then_compress.evaluation.translation import translate
from train_then_compress.export.point import ExportError, find_translator
from train_then_compress.records import RunDirectory
from train_then_compress.translate import Request, line_translator

Ttc = Callable[..., subprocess.CompletedProcess[str]]
LINES = ["Ada paints the ripe pear in the orchard.", "Does the harbour have two salty ropes?", "She counts five books."]


@pytest.fixture(scope="module")
def expected(translator_run: Path) -> list[str]:
    """What the library says to the lines, decoded as the run was tested: beam 2."""
    point, model = find_translator(str(translator_run))
    decoding = Decoding(beam=2, max_ratio=1.5, max_extra=10)
    return translate(model, Tokenizer.from_file(str(point.tokenizer)), LINES, decoding, 4096)


def piped(*arguments: str, given: bytes) -> subprocess.CompletedProcess[bytes]:
    program = str(Path(sys.executable).with_name("ttc"))
    return subprocess.run([program, "translate", *arguments], input=given, capture_output=True, timeout=120)


def test_a_line_for_each_line_and_words_for_those_that_are_special(translator_run: Path, expected: list[str]) -> None:
    given = [LINES[0].encode(), b"", b"\xffShe counts five books.\r", b"word " * 3000, LINES[1].encode()]
    done = piped(str(translator_run), given=b"\n".join(given))
    said = done.stdout.decode().split("\n")
    assert done.returncode == 0, done.stderr
    assert len(said) == 6 and said[-1] == "" and said[1] == ""
    assert [said[0], said[4], said[2]] == expected
    assert done.stderr.decode().splitlines() == [
        "line 3 has bytes that are not UTF-8, which were left out",
        "line 4 has more than 1023 tokens: only the beginning was translated",
        "line 2 has no text, and got no translation",
    ]


def test_options_reach_the_decoder(translator_run: Path, expected: list[str]) -> None:
    point, model = find_translator(f"{translator_run}:quant4")
    tokenizer = Tokenizer.from_file(str(point.tokenizer))
    greedy = translate(model, tokenizer, LINES, Decoding(beam=1), 4096)
    given = [line.encode() for line in LINES]
    assert list(line_translator(Request(f"{translator_run}:quant4", beam=1))(given)) == greedy
    assert list(line_translator(Request(f"{translator_run}:quant4", beam=1))(given, at_once=1)) == greedy

    rows = [row.split("\t") for row in line_translator(Request(str(translator_run), beam=4, nbest=3))(given)]
    assert [row[0] for row in rows] == [str(number) for number in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    scores = [float(row[1]) for row in rows]
    assert all(scores[n : n + 3] == sorted(scores[n : n + 3], reverse=True) for n in (0, 3, 6))

    request = Request(str(translator_run), nbest=2, sampling=Sampling(), seed=3)
    drawn, again = (list(line_translator(request)(given)) for _ in range(2))
    assert drawn == again and len(drawn) == 6
    penalized = Request(str(translator_run), beam=4, nbest=1, length_penalty=0.0)
    assert [float(row.split("\t")[1]) for row in line_translator(penalized)(given)] != scores[::3]


def test_a_draft_changes_nothing_but_the_passes(translator_run: Path) -> None:
    run, given = str(translator_run), [line.encode() for line in LINES]
    drafted = line_translator(Request(run, draft=f"{run}:quant4", draft_length=3))
    assert list(drafted(given)) == list(line_translator(Request(run, beam=1))(given))
    (note,) = drafted.notes
    assert "drafted tokens stood, in" in note and "passes of the large model" in note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nbest": 3}, "--nbest 3: at most as many as the beam has, 2"),
        ({"draft": "{run}", "beam": 2}, "--draft decodes greedily: without --beam, --nbest and --sample"),
        ({"draft": "{run}", "sampling": Sampling()}, "--draft decodes greedily"),
        ({"beam": 2, "sampling": Sampling()}, "--sample draws without a beam"),
        ({"draft": "{other}"}, "a model of task=mlm; only those of task=translation translate"),
        ({"point": "{other}"}, "a model of task=mlm; only those of task=translation translate"),
        ({"point": "nowhere"}, "nowhere: no run there"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    changes: dict[str, object], words: str, translator_run: Path, masked_lm_run: Path
) -> None:
    places = {"run": translator_run, "other": masked_lm_run}
    given = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(ExportError, match=words):
        line_translator(Request(**{"point": str(translator_run)} | given))  # type: ignore[arg-type]


def test_options_of_sampling_need_it(translator_run: Path, masked_lm_run: Path) -> None:
    done = piped(str(translator_run), "--top-k", "3", given=b"a line\n")
    assert done.returncode == 2 and b"are for --sample" in done.stderr and not done.stdout
    done = piped(str(masked_lm_run), given=b"a line\n")
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"task=mlm" in done.stderr


def test_compare_gives_the_scores_of_the_rows_and_a_p(translator_run: Path, ttc: Ttc, tmp_path: Path) -> None:
    rows = {row["recipe"]: row for row in RunDirectory(translator_run).points().values()}
    done = ttc("compare", str(translator_run), f"{translator_run}:quant4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    for line, recipe in zip(table[2:4], ("none", "quant4"), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == f"{translator_run.name}:{recipe}"
        assert cells[1].split(" ± ")[0] == f"{rows[recipe]['test_bleu']:.2f}"
        assert cells[2].split(" ± ")[0] == f"{rows[recipe]['test_chrf']:.2f}"
    assert "(p = " in table[4] and "20 sentences of parallel_files" in done.stdout
    assert "nrefs:1|bs:1000|seed:12345" in done.stdout


def test_points_that_were_tested_on_other_sentences_are_not_compared(translator_run: Path, tmp_path: Path) -> None:
    config = Config.load(translator_run / "config.yaml")
    other = RunDirectory(tmp_path / translator_run.name)
    (other.path / "stages").parent.mkdir(parents=True)
    (other.path / "stages").symlink_to(translator_run / "stages")
    other.write_config(config.changed(evaluation=config.evaluation.__class__(test_sequences=7)))
    with pytest.raises(ExportError, match="were not tested on the same sentences"):
        compare(str(translator_run), str(other.path))


def test_engines_for_encoders_refuse_a_translator(translator_run: Path) -> None:
    with pytest.raises(ExportError, match="a translator; ttc engines measures encoders"):
        measure_engines([find_translator(str(translator_run))[0]], ["eager"], 16, 1, 1)
