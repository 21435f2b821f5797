"""`ttc translate`: lines of text through a point, by beam search, at random, or drafted by a smaller model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from tokenizers import Tokenizer

from train_then_compress.evaluation.decoding import Decoding, Hypothesis, beam_search
from train_then_compress.evaluation.sampling import Sampling, sample
from train_then_compress.evaluation.speculative import Speculative
from train_then_compress.evaluation.translation import Decoder, decode_lines, detokenize, encode
from train_then_compress.export.point import ExportError, Point, find_translator
from train_then_compress.models.transformer import Translator

#: Lines that are sorted by length and translated together.
LINES_AT_ONCE = 1000


@dataclass(frozen=True)
class Request:
    """What the command line asks for. None: as the run's test was decoded; ``nbest`` 0: translations alone."""

    point: str
    beam: int | None = None
    length_penalty: float | None = None
    nbest: int = 0
    sampling: Sampling | None = None
    seed: int = 0
    draft: str | None = None
    draft_length: int = 4
    batch_tokens: int = 4096


@dataclass
class LineTranslator:
    """Translates lines; ``notes`` says, for the user, what became of those that could not be taken as they are."""

    tokenizer: Tokenizer
    longest: int
    decoder: Decoder
    request: Request
    lines: int = 0
    undecodable: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)

    def __call__(self, lines: Iterable[bytes], at_once: int = LINES_AT_ONCE) -> Iterator[str]:
        """A line for each line; with ``nbest``, for each hypothesis the number of its line, its score and itself,
        between tabs."""
        source = iter(lines)
        while block := list(islice(source, at_once)):
            texts = [self._text(line, self.lines + number) for number, line in enumerate(block, 1)]
            found = decode_lines(self.decoder, self._encode(texts), self.request.batch_tokens, torch.device("cpu"))
            for number, hypotheses in enumerate(found, self.lines + 1):
                yield from self._said(number, hypotheses)
            self.lines += len(block)

    def _text(self, line: bytes, number: int) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.undecodable.append(number)
            return line.decode(errors="ignore")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids; one more than the model takes shows what is too long."""
        encoded = encode(self.tokenizer, texts, self.longest + 1)
        for number, tokens in enumerate(encoded, self.lines + 1):
            if not tokens:
                self.blank.append(number)
            elif len(tokens) == self.longest:
                self.cut.append(number)
        return [tokens[: self.longest - 1] for tokens in encoded]

    def _said(self, number: int, hypotheses: list[Hypothesis]) -> Iterator[str]:
        texts = [detokenize(self.tokenizer, hypothesis.tokens) for hypothesis in hypotheses]
        if not self.request.nbest:
            yield texts[0] if texts else ""
        for text, hypothesis in zip(texts[: self.request.nbest], hypotheses, strict=False):
            yield f"{number}\t{hypothesis.score:.4f}\t{text}"

    @property
    def notes(self) -> list[str]:
        """A sentence for each thing that there is to say."""
        said = [
            (self.undecodable, "bytes that are not UTF-8, which were left out"),
            (self.cut, f"more than {self.longest - 1} tokens: only the beginning was translated"),
            (self.blank, "no text, and got no translation"),
        ]
        found = [f"{_lines(numbers)} {words}" for numbers, words in said if numbers]
        if isinstance(self.decoder, Speculative):
            found.append(f"{self.decoder.acceptance:.0%} of {self.decoder.drafted} drafted tokens stood, in "
                         f"{self.decoder.passes} passes of the large model")  # fmt: skip
        return found


def line_translator(request: Request) -> LineTranslator:
    """Find the point and the draft; raises `ExportError` for what cannot be found or done."""
    _check(request)
    point, model = find_translator(request.point)
    evaluation = point.config.evaluation
    width = 1 if request.draft else max(1, request.nbest) if request.sampling else evaluation.beam
    decoding = Decoding(
        request.beam or width,
        evaluation.length_penalty if request.length_penalty is None else request.length_penalty,
        evaluation.max_ratio, evaluation.max_extra,
    )  # fmt: skip
    if request.nbest > decoding.beam:
        raise ExportError(f"--nbest {request.nbest}: at most as many as the beam has, {decoding.beam}")
    tokenizer = Tokenizer.from_file(str(point.tokenizer))
    return LineTranslator(tokenizer, model.length, _decoder(request, point, model, decoding), request)


def _check(request: Request) -> None:
    if request.draft and (request.sampling or request.nbest or (request.beam or 1) > 1):
        raise ExportError("--draft decodes greedily: without --beam, --nbest and --sample")
    if request.sampling and request.beam:
        raise ExportError("--sample draws without a beam: --nbest says how many translations")


def _decoder(request: Request, point: Point, model: Translator, decoding: Decoding) -> Decoder:
    if request.sampling:
        generator = torch.Generator().manual_seed(request.seed)
        return partial(sample, model, decoding=decoding, sampling=request.sampling, generator=generator)
    if request.draft is None:
        return partial(beam_search, model, decoding=decoding)
    draft_point, draft = find_translator(request.draft)
    if draft_point.tokenizer.read_bytes() != point.tokenizer.read_bytes():
        raise ExportError(f"--draft {request.draft}: it has another tokenizer than {request.point}; the two must have "
                          "been trained on the same data")  # fmt: skip
    try:
        return Speculative(model, draft, request.draft_length, decoding)
    except ValueError as error:
        raise ExportError(f"--draft {request.draft}: {error}") from None


def _lines(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"line {numbers[0]} has"
    return f"{len(numbers)} lines (the first is line {numbers[0]}) have"
