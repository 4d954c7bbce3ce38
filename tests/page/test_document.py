import os
from html.parser import HTMLParser

import pytest

from analogfx.page.document import Document

VOID = {"meta"}


class Checked(HTMLParser):
    """Every tag is closed in order; what is text, and what is fetched."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_whole_and_fetches_nothing():
    page = Document("A title")
    page.heading("Part")
    page.text("Words.")
    page.numbers([("chips", "5")])
    page.table(("a", "b"), [("1", "2"), ("3", "4")], texts=(1,))
    checked = Checked(page.html())
    assert not checked.fetched and "script" not in page.html()
    words = "".join(checked.text)
    assert all(word in words for word in ("A title", "Part", "Words.", "chips", "5", "4"))


def test_what_a_model_names_is_text():
    page = Document("<b>")
    page.text("a & b <script>alert(1)</script>")
    page.numbers([("<i>", "&")])
    page.table(("<u>",), [("layers.0.<x>",)])
    checked = Checked(page.html())
    assert "<script>" not in page.html() and "layers.0.<x>" in "".join(checked.text)


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    Document("first").write(path)
    before = path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Document("second").write(path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_row_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        Document("t").table(("a", "b"), [("1",)])
