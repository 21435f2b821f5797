"""``conf/data`` of translation: which sentences in two languages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train_then_compress.config.base import config_dataclass, reject

#: Languages into which Debian's package descriptions and LibreOffice's help are translated in quantity.
Language = Literal["da", "de", "fr", "it"]


@config_dataclass
class ParallelConfig:
    """What every parallel corpus has: the codes of the two languages, as its files or columns have them."""

    name: str = ""
    source: str = Field("en", min_length=1)
    target: str = Field("it", min_length=1)

    @model_validator(mode="after")
    def _languages_differ(self) -> ParallelConfig:
        if self.source == self.target:
            raise reject("data.target", self.target, "the same as data.source; two languages are needed")
        return self


@config_dataclass
class ParallelText(ParallelConfig):
    """Sentences as text.

    ``vocab_size`` of the joint byte-level BPE, special tokens included. Pairs are trained on where both sides have
    ``min_words`` to ``max_words`` words and neither is ``max_ratio`` times as long as the other or longer.
    """

    vocab_size: int = Field(8192, ge=300, le=1_000_000)
    min_words: int = Field(3, ge=1)
    max_words: int = Field(60, ge=1, le=1000)
    max_ratio: float = Field(2.0, gt=1)

    @model_validator(mode="after")
    def _words_are_a_range(self) -> ParallelText:
        if self.min_words > self.max_words:
            raise reject("data.min_words", self.min_words, f"at most data.max_words={self.max_words}")
        return self


@config_dataclass
class DebianPairs(ParallelText):
    """Package descriptions and LibreOffice's help in English and another language, through apt."""

    name: Literal["debian_pairs"] = "debian_pairs"
    source: Literal["en"] = "en"
    target: Language = "it"


@config_dataclass
class HubParallel(ParallelText):
    """A Hugging Face dataset with a column ``translation``; ``path`` may be a local folder of the same form.

    ``revision``: a branch, tag or commit of the dataset (without it, its main branch).
    """

    name: Literal["hub_parallel"] = "hub_parallel"
    target: str = Field("fr", min_length=1)
    path: str = "wmt/wmt14"
    subset: str | None = "fr-en"
    revision: str | None = None
    splits: list[str] = Field(default_factory=lambda: ["train", "validation", "test"])
    licence: str = "as stated by the dataset's page"


@config_dataclass
class ParallelFiles(ParallelText):
    """The user's own sentences: for each split two aligned text files ``PREFIX.<source>`` and ``PREFIX.<target>``, or
    one ``FILE.tsv`` of two columns. Without ``valid`` (``test``), 2 % of ``train`` are held out by hash."""

    name: Literal["parallel_files"] = "parallel_files"
    train: str | None = None
    valid: str | None = None
    test: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> ParallelFiles:
        if not self.train:
            raise reject("data.train", self.train, "a prefix of two aligned files, or a TSV file, is needed")
        return self


@config_dataclass
class FairseqBin(ParallelConfig):
    """A directory that ``fairseq-preprocess --joined-dictionary`` made; its pairs and tokens are taken as they are.

    ``bpe`` says how tokens become words where text is scored: ``subword_nmt`` (``@@`` continues a word),
    ``sentencepiece`` (``▁`` begins one), ``byte_level`` (what ``ttc data export`` writes), ``none`` (tokens are words).
    """

    name: Literal["fairseq_bin"] = "fairseq_bin"
    path: str | None = None
    bpe: Literal["subword_nmt", "sentencepiece", "byte_level", "none"] = "subword_nmt"

    @model_validator(mode="after")
    def _has_a_path(self) -> FairseqBin:
        if not self.path:
            raise reject("data.path", self.path, "the directory that fairseq-preprocess made is needed")
        return self

    @property
    def vocab_size(self) -> int:
        """None is asked for: the dictionary decides."""
        return 0


ParallelCorpora = DebianPairs | HubParallel | ParallelFiles | FairseqBin
