"""HTML and text to prose paragraphs."""

from html import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.data.prose import SHORTEST, html_paragraphs, is_prose, text_paragraphs

SENTENCE = "The server reads this file when it starts and keeps the values in memory."
OTHER = "Each of the workers has its own copy, which is thrown away at the end."

word = st.sampled_from(
    ["the", "of", "is", "and", "file", "reads", "value", "(optional)", "user's", "well-known", "end."]
)
paragraph = st.lists(word, min_size=1, max_size=30).map(" ".join)


def test_paragraphs_come_in_reading_order_without_tags_and_entities() -> None:
    page = (
        f"<!DOCTYPE html><html lang='en-GB'><head><title>{SENTENCE}</title><script>if (a < b) {{}}</script></head>"
        f"<body><h1>Short heading</h1><p>The <code>server</code> reads\n  <em>this</em> file when it&nbsp;starts "
        f"and keeps the values in mem&shy;ory.<p>{OTHER}</body>"
    )
    assert html_paragraphs(page) == [SENTENCE, OTHER]


@pytest.mark.parametrize("tag", ["pre", "nav", "script", "style", "footer", "header", "div role='navigation'"])
def test_what_is_no_prose_is_left_out_with_all_it_holds(tag: str) -> None:
    name = tag.split()[0]
    page = f"<p>{SENTENCE}</p><{tag}>{OTHER}<span>{OTHER}</span></{name}><p>{OTHER}</p>"
    assert html_paragraphs(page) == [SENTENCE, OTHER]
    if name == "div":
        nested = f"<{tag}><div>{OTHER}</div>{OTHER}</div>{SENTENCE}"
        assert html_paragraphs(nested) == [SENTENCE]


def test_an_empty_xhtml_script_hides_nothing() -> None:
    assert html_paragraphs(f'<script src="x.js"/><pre/><p>{SENTENCE}</p>') == [SENTENCE]


def test_breaks_list_entries_and_cells_separate_words_and_paragraphs() -> None:
    page = (
        f"<ul><li>{SENTENCE}<li>{OTHER}</ul><table><td>{SENTENCE}<td>one</table>The server reads<br/>" + SENTENCE[17:]
    )
    assert html_paragraphs(page) == [SENTENCE, OTHER, SENTENCE, SENTENCE]


def test_pages_in_other_languages_are_left_out() -> None:
    assert html_paragraphs(f'<html lang="fr"><p>{SENTENCE}</p></html>') == []
    portuguese = "A distribuição é a principal autora do servidor e também no pacote a que isto se refere."
    german = "Der Server liest diese Datei beim Start und behält die Werte danach im Speicher für alle."
    assert not is_prose(portuguese) and not is_prose(german)


@pytest.mark.parametrize(
    "text",
    [
        "int tty_ldisc_receive_buf(struct tty_ldisc *ld, const unsigned char *p, const char *f, int count, int n)",
        "Modules | Directives | FAQ | Glossary | Sitemap | Report a bug | Home | Up",
        "0.1 0.2 0.3 0.4 0.5 0.6 0.7 the of and is 0.8 0.9 1.0",
        "The end of the file is reached by this",  # nine words
    ],
)
def test_listings_tables_and_short_lines_are_no_prose(text: str) -> None:
    assert not is_prose(text)


def test_plain_text_is_cut_at_blank_lines_and_listings_are_left_out() -> None:
    wrapped = SENTENCE.replace(" when ", "\r\nwhen ")
    text = f"Heading\n=======\n\n{wrapped}\r\n \r\n    {OTHER}\n\n\n{OTHER}\n"
    assert text_paragraphs(text) == [SENTENCE, OTHER]


@given(st.lists(paragraph))
def test_what_is_prose_survives_markup_whole_and_in_order(paragraphs: list[str]) -> None:
    kept = [text for text in paragraphs if is_prose(text)]
    assert html_paragraphs("".join(f"<p>{escape(text)}</p>" for text in paragraphs)) == kept
    assert html_paragraphs("<div>".join(f"<p>{escape(text)}" for text in paragraphs)) == kept
    assert text_paragraphs("\n\n".join(paragraphs)) == kept


@given(st.text() | st.text(alphabet="<>/pre!-&;# a\"'="))
def test_any_input_gives_tidy_paragraphs(page: str) -> None:
    for text in html_paragraphs(page) + text_paragraphs(page):
        assert text == " ".join(text.split()) and len(text.split()) >= SHORTEST
