"""``conf/data`` of translation: which sentences in two languages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train_then_compress.config.base import config_dataclass, reject

#: Languages into which Debian's package descriptions and LibreOffice's help are translated in quantity.
Language = Literal["da", "de", "fr", "it"]


@config_dataclass
class ParallelConfig:
    """What every parallel corpus has.

    ``vocab_size`` of the joint byte-level BPE, special tokens included. Pairs are kept where both sides have
    ``min_words`` to ``max_words`` words and neither is ``max_ratio`` times as long as the other or longer.
    """

    name: str = ""
    source: str = "en"
    target: str = "it"
    vocab_size: int = Field(8192, ge=300, le=1_000_000)
    min_words: int = Field(3, ge=1)
    max_words: int = Field(60, ge=1, le=1000)
    max_ratio: float = Field(2.0, gt=1)

    @model_validator(mode="after")
    def _words_are_a_range(self) -> ParallelConfig:
        if self.min_words > self.max_words:
            raise reject("data.min_words", self.min_words, f"at most data.max_words={self.max_words}")
        return self


@config_dataclass
class DebianPairs(ParallelConfig):
    """Package descriptions and LibreOffice's help in English and another language, through apt."""

    name: Literal["debian_pairs"] = "debian_pairs"
    source: Literal["en"] = "en"
    target: Language = "it"


@config_dataclass
class HubParallel(ParallelConfig):
    """A Hugging Face dataset with a column ``translation``; ``path`` may be a local folder of the same form."""

    name: Literal["hub_parallel"] = "hub_parallel"
    path: str = "wmt/wmt14"
    subset: str | None = "fr-en"
    splits: list[str] = Field(default_factory=lambda: ["train", "validation", "test"])
    licence: str = "as stated by the dataset's page"


@config_dataclass
class ParallelFiles(ParallelConfig):
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


ParallelCorpora = DebianPairs | HubParallel | ParallelFiles
