"""`ttc compare`: are two points' translations of the test set of different quality?"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from train_then_compress.config import ParallelConfig
from train_then_compress.data.pairs import prepare_pairs
from train_then_compress.evaluation.bleu import paired
from train_then_compress.evaluation.decoding import Decoding
from train_then_compress.evaluation.translation import translate
from train_then_compress.export.point import ExportError, Point, find_translator
from train_then_compress.models.transformer import Translator
from train_then_compress.tasks.translation import DECODED_AT_ONCE


def compare(first: str, second: str) -> str:
    """Translate the test set with both, each as its run's test was decoded; a Markdown table of sacreBLEU's paired
    bootstrap. Raises `ExportError` where there is no translator or no common test set.
    """
    found = [find_translator(text) for text in (first, second)]
    tests = [_test(point) for point, _ in found]
    if tests[0] != tests[1]:
        raise ExportError(f"{found[0][0].name} and {found[1][0].name} were not tested on the same sentences")
    sources, references = tests[0]
    one, other = (_translations(point, model, sources) for point, model in found)
    scores = paired(one, other, references)
    rows = [["point", "BLEU", "chrF"]]
    for (point, _), which in zip(found, ("first", "second"), strict=True):
        rows.append([point.name, *(f"{s[which]:.2f} ± {s[f'{which}_interval']:.2f}" for s in scores.values())])
    rows.append(["difference", *(f"{s['second'] - s['first']:+.2f} (p = {s['p']:.3f})" for s in scores.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([
        lines[0], "|---|---|---|", *lines[1:], "",
        f"{len(sources)} sentences of {found[0][0].config.data.name}; ± half of a 95 % bootstrap interval; p: how "
        "often, by a paired bootstrap, so large a difference comes about where there is none",
        *(s["signature"] for s in scores.values()),
    ])  # fmt: skip


def _test(point: Point) -> tuple[list[str], list[str]]:
    """Sources and references of the test split, as many as the run was tested on."""
    config = point.config
    assert isinstance(config.data, ParallelConfig)
    sources, references = prepare_pairs(config.data, Path(config.paths.cache)).texts("test")
    count = config.evaluation.test_sequences or len(sources)
    return sources[:count], references[:count]


def _translations(point: Point, model: Translator, sources: list[str]) -> list[str]:
    evaluation = point.config.evaluation
    decoding = Decoding(evaluation.beam, evaluation.length_penalty, evaluation.max_ratio, evaluation.max_extra)
    return translate(model, Tokenizer.from_file(str(point.tokenizer)), sources, decoding, DECODED_AT_ONCE)
