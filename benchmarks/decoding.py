"""Translation: our beam search beside fairseq's, transformers' and CTranslate2's, the same weights; drafted decoding.

All decode the same batches of the same sentences and take turns, so that a machine that slows down slows all.
Sentences are those of a run's test set, or random ones for a model of random weights.

    python benchmarks/decoding.py --point runs/mt_demo/RUN --draft runs/mt_demo/SMALLER --json decoding.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import record as common
from common.record import Record
from parties.decoders import FAIRSEQ, OURS, Decoder, Found, decoders, fairseq_generator, ours, sample
from tokenizers import Tokenizer
from torch import Tensor

from train_then_compress.config import ConfigError, ParallelConfig, TransformerConfig
from train_then_compress.data.pairs import prepare_pairs
from train_then_compress.data.prepare import EOS, MASK, PAD
from train_then_compress.evaluation.bleu import score
from train_then_compress.evaluation.decoding import Decoding, beam_search
from train_then_compress.evaluation.speculative import Speculative
from train_then_compress.evaluation.translation import detokenize, encode
from train_then_compress.export.point import ExportError, Point, find_translator
from train_then_compress.models.cache import Cache, Memory
from train_then_compress.models.transformer import Translator

CONVENTIONS = {
    "seconds": "from tokens of the sources to tokens and scores of all hypotheses; tokenization, sorting and padding "
    "left out",
    "tokens": "of the best hypothesis of each sentence, </s> included",
    "batches": "neighbours in length; the same ones for all",
    "limits": "a translation ends after --longest tokens (fairseq's max_len_b), length penalty 1; <s> and <pad> are "
    "never said",
    "fairseq": "TransformerModel, made ready as fairseq-generate does it (make_generation_fast_), under inference mode",
    "transformers": "M2M100ForConditionalGeneration.generate, early_stopping=True, under inference mode",
    "CTranslate2": "the point's export, --threads intra_threads; num_hypotheses as wide as the beam, else it stops at "
    "the first that ends",
    "agreement": "with ours, of the best hypothesis of each sentence; with fairseq of all, in the order of scores",
    "bleu": "sacreBLEU of the best hypotheses of these sentences",
    "length": "seconds per token of a translation when </s> is ruled out until so many tokens are said; the "
    "exponent is fitted: seconds per token ~ tokens ** exponent; 0 is flat",
    "ratio": "of sentences per second, ours / it, within a round",
    "acceptance": "accepted / drafted tokens, those after a drafted </s> left out",
    "spread": "quartiles (25 %, 75 %) over rounds",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__)
    parser.add_argument("--point", help="a trained translator: RUN_DIRECTORY or RUN_DIRECTORY:RECIPE")
    parser.add_argument("--draft", help="a smaller one of the same data, for speculative decoding")
    for name, value, unit in (("depth", 3, "layers of each side, without --point"), ("width", 256, "units, likewise"),
                              ("head-size", 64, "likewise"), ("vocab-size", 8192, "tokens, likewise"),
                              ("rounds", 5, "turns of each"), ("sentences", 64, "decoded in batches"),
                              ("singly", 16, "of them decoded one by one"), ("batch-size", 32, "sentences"),
                              ("longest", 100, "tokens of a translation")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{unit}; default {value}")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[2, 4, 8])
    quick = {"depth": 1, "width": 32, "head_size": 16, "vocab_size": 300, "rounds": 1, "sentences": 4, "singly": 2,
             "batch_size": 2, "longest": 8, "lengths": [4, 8], "draft_lengths": [2]}  # fmt: skip
    arguments = common.parse(parser, argv, quick, needs=("fairseq", "transformers"))
    if min(arguments.rounds, arguments.sentences, arguments.singly, arguments.batch_size) < 1:
        parser.error("--rounds, --sentences, --singly and --batch-size must be at least 1")
    return arguments


@dataclass(frozen=True)
class Work:
    """What decodes what: ``sources`` without </s>, their ``references`` where the sentences are real, and a name."""

    model: Translator
    point: Point | None
    sources: list[list[int]]
    references: list[str]
    name: str


def work_of(arguments: argparse.Namespace) -> Work:
    """A point on its test sentences, or random weights on random tokens."""
    if arguments.point is None:
        torch.manual_seed(0)
        shape = TransformerConfig(depth=arguments.depth, width=arguments.width, head_size=arguments.head_size)
        model = Translator(shape, arguments.vocab_size, max(1 + max(arguments.lengths), arguments.longest, 64) + 1)
        numbers = np.random.default_rng(0)
        sources = [numbers.integers(MASK + 1, arguments.vocab_size, length).tolist()
                   for length in numbers.integers(5, 50, arguments.sentences)]  # fmt: skip
        return Work(model.eval(), None, sources, [], "random tokens, random weights")
    point, model = _opened(arguments.point)
    assert isinstance(point.config.data, ParallelConfig)
    texts = prepare_pairs(point.config.data, Path(arguments.cache)).texts("test")
    lines, references = (side[: arguments.sentences] for side in texts)
    sources = encode(Tokenizer.from_file(str(point.tokenizer)), lines, model.length)
    return Work(model, point, sources, references, f"{point.name} on test sentences of {point.config.data.name}")


def _opened(text: str) -> tuple[Point, Translator]:
    try:
        return find_translator(text)
    except ExportError as error:
        raise ConfigError(str(error)) from None


def batches_of(sources: list[list[int]], size: int) -> tuple[list[Tensor], list[int]]:
    """Neighbours in length, padded at the end, and the place of each of their rows among the sources."""
    order = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
    groups = [[sources[number] for number in order[start : start + size]] for start in range(0, len(order), size)]
    return [torch.tensor([[*row, EOS, *[PAD] * (len(group[0]) - len(row))] for row in group])
            for group in groups], order  # fmt: skip


@dataclass
class Party:
    """Something that takes turns at the same work: ``work()`` gives the tokens that it made."""

    name: str
    work: Callable[[], int]
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    def take_turn(self) -> None:
        """Do the work once, by the clock."""
        start = time.perf_counter()
        self.tokens = self.work()
        self.seconds.append(time.perf_counter() - start)

    def facts(self, sentences: int) -> dict[str, Any]:
        """Medians and quartiles over rounds."""
        seconds = np.array(self.seconds)
        return {
            "sentences_per_second": common.quartiles(sentences / seconds),
            "tokens_per_second": common.quartiles(self.tokens / seconds), "seconds": self.seconds,
        }  # fmt: skip


def take_turns(parties: Sequence[Party], rounds: int) -> None:
    """Each once untimed, then the rounds, every second one in the other order."""
    for party in parties:
        party.work()
    for number in range(rounds):
        for party in parties if number % 2 == 0 else reversed(parties):
            party.take_turn()


def beside_peers(work: Work, size: int, beam: int, arguments: argparse.Namespace) -> Record:
    """Speed of all, and whether they find what ours finds."""
    sources = work.sources[: arguments.singly] if size == 1 else work.sources
    batches, order = batches_of(sources, size)
    longest = min(arguments.longest, work.model.length - 1)
    made, left_out = decoders(work.model, work.point, Decoding(beam, max_ratio=0, max_extra=longest), arguments.threads)
    parties = [Party(name, partial(_decode_all, decode, batches)) for name, decode in made.items()]
    take_turns(parties, arguments.rounds)
    found = {name: [hypotheses for batch in batches for hypotheses in decode(batch)] for name, decode in made.items()}
    facts = {party.name: party.facts(len(sources)) for party in parties}
    for party in parties:
        ratios = [b / a for a, b in zip(parties[0].seconds, party.seconds, strict=True)]
        known = found[OURS], found[party.name]
        if party.name not in (OURS, FAIRSEQ):
            known = tuple([hypotheses[:1] for hypotheses in one] for one in known)  # type: ignore[assignment]
        facts[party.name] |= {"ratio": {"by_round": ratios, **common.quartiles(ratios)}, "agreement": agreement(*known)}
        if work.references:
            facts[party.name]["bleu"] = _bleu(work, order, found[party.name])
    return {"beam": beam, "batch_size": size, "sentences": len(sources), "parties": facts, "left_out": left_out}


def _bleu(work: Work, order: list[int], found: Found) -> float:
    assert work.point is not None
    tokenizer = Tokenizer.from_file(str(work.point.tokenizer))
    lines = [detokenize(tokenizer, hypotheses[0][0]) for hypotheses in found]
    return float(score(lines, [work.references[number] for number in order])["bleu"])


def _decode_all(decode: Decoder, batches: list[Tensor]) -> int:
    return sum(len(hypotheses[0][0]) + 1 for batch in batches for hypotheses in decode(batch))


def agreement(one: Found, other: Found) -> dict[str, float | int]:
    """Sentences with the same hypotheses in the same order, and the largest difference of their scores, if known."""
    same = [(a, b) for a, b in zip(one, other, strict=True) if [t for t, _ in a] == [t for t, _ in b]]
    scores = [(x, y) for a, b in same for (_, x), (_, y) in zip(a, b, strict=True)]
    differences = [abs(x - y) for x, y in scores if x is not None and y is not None]
    largest = {"largest_score_difference": max(differences)} if differences else {}
    return {"sentences": len(same), "of": len(one), **largest}


class Endless:
    """A translator that never says ``</s>``."""

    def __init__(self, model: Translator):
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, tokens: Tensor, memory: Memory, cache: Cache) -> Tensor:
        """As the model's, ``</s>`` ruled out."""
        logits = self.model.step(tokens, memory, cache)
        logits[..., EOS] = -torch.inf
        return logits


def by_length(
    model: Translator, source: Tensor, arguments: argparse.Namespace, beam: int, beside_fairseq: bool
) -> Record:
    """Ours and fairseq's seconds per token when translations have so many tokens, and the fitted exponents."""
    lengths = [length for length in arguments.lengths if length < model.length]
    seconds: dict[str, list[float]] = {}
    for length in lengths:
        decoding = Decoding(beam=beam, max_ratio=0, max_extra=length)
        parties = [Party(OURS, partial(_endless, model, source, decoding))]
        if beside_fairseq:
            generator = fairseq_generator(model, beam_size=beam, max_len_b=length, min_len=length)
            parties.append(Party(FAIRSEQ, partial(_generate, generator, source)))
        take_turns(parties, arguments.rounds)
        for party in parties:
            seconds.setdefault(party.name, []).append(float(np.median(party.seconds)) / (length + 1))
    return {
        "beam": beam, "batch_size": len(source), "lengths": lengths,
        "parties": {name: {"seconds_per_token": values, "exponent": common.exponent(lengths, values)}
                    for name, values in seconds.items()},
    }  # fmt: skip


def _endless(model: Translator, source: Tensor, decoding: Decoding) -> int:
    beam_search(Endless(model), source, decoding)  # type: ignore[arg-type]
    return 0


def _generate(generator: Any, source: Tensor) -> int:
    with torch.inference_mode():
        generator.generate([], sample(source))
    return 0


def speculative(model: Translator, batches: list[Tensor], arguments: argparse.Namespace) -> Record:
    """Greedy decoding, plain and drafted by the smaller model."""
    _, draft = _opened(arguments.draft)
    decoding = Decoding(beam=1, max_ratio=0, max_extra=min(arguments.longest, model.length - 1))
    drafted = {length: Speculative(model, draft, length, decoding) for length in arguments.draft_lengths}
    plain = Party("greedy", partial(_decode_all, ours(model, decoding), batches))
    parties = [plain, *(Party(f"draft of {length}", partial(_decode_all, _pairs(decoder), batches))
                        for length, decoder in drafted.items())]  # fmt: skip
    take_turns(parties, arguments.rounds)
    sentences = sum(map(len, batches))
    facts = {party.name: party.facts(sentences) for party in parties}
    expected = [found for batch in batches for found in ours(model, decoding)(batch)]
    for party, (length, decoder) in zip(parties[1:], drafted.items(), strict=True):
        found = [hypotheses for batch in batches for hypotheses in _pairs(decoder)(batch)]
        ratios = [a / b for a, b in zip(plain.seconds, party.seconds, strict=True)]
        facts[party.name] |= {
            "draft_length": length, "acceptance": decoder.acceptance, "agreement": agreement(found, expected),
            "ratio": {"by_round": ratios, **common.quartiles(ratios)},
        }  # fmt: skip
    return {"batch_size": len(batches[0]), "sentences": sentences, "parties": facts}


def _pairs(decoder: Speculative) -> Decoder:
    return lambda source: [[(h.tokens, h.score) for h in found] for found in decoder(source)]


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """Beams and batch sizes, then lengths, then drafts."""
    work = work_of(arguments)
    model = work.model
    single, many = (batches_of(work.sources[:count], size)[0]
                    for count, size in ((arguments.singly, 1), (None, arguments.batch_size)))  # fmt: skip
    peers = [beside_peers(work, size, beam, arguments)
             for beam in arguments.beams for size in (1, arguments.batch_size)]  # fmt: skip
    with_fairseq = FAIRSEQ in peers[0]["parties"]
    measured: Record = {
        "sources": work.name, "model": {"depth": model.config.depth, "width": model.config.width,
                                        "length": model.length, "vocab_size": model.embedding.weight.shape[0],
                                        "parameters": sum(p.numel() for p in model.parameters())},
        "beside_peers": peers,
        "by_length": [by_length(model, batch[:8], arguments, max(arguments.beams), with_fairseq)
                      for batch in (single[0], many[0])],
    }  # fmt: skip
    if arguments.draft:
        measured["speculative"] = [speculative(model, batches, arguments) for batches in (single, many)]
    return measured


def table(record: Record) -> str:
    """Speeds, growth with length, and drafts."""
    rows = []
    for measured in record["beside_peers"]:
        for name, facts in measured["parties"].items():
            same = facts["agreement"]
            rows.append([
                str(measured["beam"]), str(measured["batch_size"]), name,
                *(common.spread(facts[f"{unit}_per_second"], ",.1f") for unit in ("sentences", "tokens")),
                common.spread(facts["ratio"], ".2f") if name != OURS else "",
                f"{same['sentences']} of {same['of']}" if name != OURS else "",
                f"{facts['bleu']:.2f}" if "bleu" in facts else "",
            ])  # fmt: skip
    speeds = common.markdown(["beam", "batch", "party", "sentences/s, median (quartiles)", "tokens/s", "ours / it",
                              "same hypotheses", "BLEU"], rows)  # fmt: skip
    rows = [[str(measured["batch_size"]), name, *(f"{1e3 * value:.2f}" for value in facts["seconds_per_token"]),
             f"{facts['exponent']:.2f}"]
            for measured in record["by_length"] for name, facts in measured["parties"].items()]  # fmt: skip
    lengths = [f"{length} tokens" for length in record["by_length"][0]["lengths"]]
    growth = common.markdown(["batch", "ms a token of", *lengths, "exponent"], rows)
    model = record["model"]
    about = (f"{model['depth']}x{model['width']} layers, vocabulary {model['vocab_size']:,}, "
             f"{model['parameters']:,} parameters; {record['sources']}; "
             f"{record['settings']['rounds']} rounds")  # fmt: skip
    left_out = "; ".join(f"{name} is left out: {why}" for name, why in record["beside_peers"][0]["left_out"].items())
    parts = [speeds, growth, _drafts(record) if "speculative" in record else "", about, left_out]
    return "\n\n".join(part for part in parts if part)


def _drafts(record: Record) -> str:
    rows = []
    for measured in record["speculative"]:
        for name, facts in measured["parties"].items():
            is_drafted = "ratio" in facts
            rows.append([
                str(measured["batch_size"]), name, common.spread(facts["tokens_per_second"], ",.1f"),
                f"{facts['acceptance']:.0%}" if is_drafted else "",
                common.spread(facts["ratio"], ".2f") if is_drafted else "",
                f"{facts['agreement']['sentences']} of {facts['agreement']['of']}" if is_drafted else "",
            ])  # fmt: skip
    return common.markdown(["batch", "greedy, drafted by the smaller model", "tokens/s", "accepted", "it / plain",
                            "same translations"], rows)  # fmt: skip


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
