"""Prose paragraphs out of HTML pages and plain text: what is left for a language model of a manual."""

from __future__ import annotations

import re
from html.parser import HTMLParser

#: Fewer words than this are headings, entries of tables and navigation.
SHORTEST = 10

#: Elements whose text is no prose: code, navigation, what is not shown.
_LEFT_OUT = frozenset({
    "button", "footer", "header", "math", "nav", "noscript", "pre", "script", "select", "style", "svg", "template",
    "textarea", "title",
})  # fmt: skip
_INLINE = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i",
    "img", "ins", "kbd", "label", "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup",
    "time", "tt", "u", "var", "wbr",
})  # fmt: skip
#: Soft hyphens, zero-width and byte-order characters, and the sign by which Sphinx marks headings.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff¶"))
_WORD = re.compile(r"[(\"'“‘]*[A-Za-z]+(?:['’/-][A-Za-z]+)*[)\"'”’.,;:!?]*")
#: Those that other languages write alike with another meaning ("a", "do", "no", "as") are left out.
_FUNCTION_WORDS = frozenset({
    "and", "are", "at", "be", "been", "but", "by", "can", "does", "for", "from", "has", "have", "if", "in", "into",
    "is", "it", "its", "may", "must", "not", "of", "on", "one", "or", "other", "should", "so", "than", "that",
    "the", "their", "then", "there", "these", "they", "this", "to", "used", "using", "was", "we", "when", "where",
    "which", "will", "with", "you", "your",
})  # fmt: skip


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English prose of `SHORTEST` words or more.

    At least six in ten of its words are plain words and one in eight is an English function word: signatures,
    listings, tables of numbers and other languages fall short of one or the other.
    """
    words = paragraph.split()
    if len(words) < SHORTEST:
        return False
    plain = sum(_WORD.fullmatch(word) is not None for word in words)
    function = sum(word.lower().rstrip(".,;:!?") in _FUNCTION_WORDS for word in words)
    return plain >= 0.6 * len(words) and function >= len(words) / 8


def html_paragraphs(page: str) -> list[str]:
    """The prose paragraphs of an HTML page in reading order; none if the page names another language."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    parser.end_paragraph()
    return [] if parser.foreign else [paragraph for paragraph in parser.paragraphs if is_prose(paragraph)]


def text_paragraphs(text: str) -> list[str]:
    """The prose paragraphs of plain text: blocks between blank lines, indented ones (listings) left out."""
    blocks = re.split(r"\n[ \t\f]*\n", text.replace("\r\n", "\n"))
    flush = [block for block in blocks if not block.lstrip("\n").startswith((" ", "\t"))]
    return [paragraph for paragraph in map(_tidy, flush) if is_prose(paragraph)]


def _tidy(text: str) -> str:
    return " ".join(text.translate(_INVISIBLE).split())


class _Paragraphs(HTMLParser):
    """Cuts the text at every tag that is not inline. Missing end tags (``<p>``, ``<li>``) do no harm."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.foreign = False
        self._text: list[str] = []
        self._left_out = ""  # the element whose text is being left out, and how many of its name are open
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._left_out:
            self._depth += tag == self._left_out
            return
        if tag == "br":
            self._text.append(" ")
            return
        if tag not in _INLINE:
            self.end_paragraph()
        if tag == "html":
            self.foreign = not ((dict(attrs).get("lang") or "en").lower().startswith("en"))
        if tag in _LEFT_OUT or ("role", "navigation") in attrs:
            self._left_out, self._depth = tag, 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._left_out:
            return
        if tag == "br":
            self._text.append(" ")
        elif tag not in _INLINE:
            self.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if self._left_out:
            self._depth -= tag == self._left_out
            if not self._depth:
                self._left_out = ""
        elif tag not in _INLINE:
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self._text.append(data)

    def end_paragraph(self) -> None:
        """Close the paragraph under way."""
        if self._text:
            paragraph = _tidy("".join(self._text))
            if paragraph:
                self.paragraphs.append(paragraph)
            self._text = []
