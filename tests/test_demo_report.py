"""The demo's report: its contents and what it escapes. And reports taken apart, for the other tests of the demo."""

import math
import re
from html.parser import HTMLParser

import pytest

from lstm_triton import check
from lstm_triton.demo import train

report = pytest.importorskip("lstm_triton.demo.report", reason="needs the libraries of the extra [demo]")


class Page(HTMLParser):
    """Tags that are open at the end, all tags seen, and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_report(*failures):
    rows = (check.Row("float32", q, 1.0, 1.0, 3e-7, 4e-8, failures) for q in check.QUANTITIES)
    return check.Report("here", 1, tuple(rows))


def _page(tmp_path, **changes):
    contents = {
        "curve": [train.Point(0, 0, 0.0, math.nan, 7.0), train.Point(5, 500, 2.0, 5.0, 3.5)],
        "unigram": 4.6,
        "said": {
            "Model": ["LSTM(1, 2) on <device>: cudnn: a reason."],
            "Sample": ["\ndef <script>alert('&amp;')</script>"],
            "Accuracy": [check.table(check_report())],
            "Time": ["none"],
        },
        "rows": [],
    }
    path = tmp_path / "new" / "report.html"
    report.write(path, **(contents | changes))
    return path.read_text(encoding="utf-8")


def test_the_report_holds_the_picture_and_escapes_text(tmp_path):
    html = _page(tmp_path)
    page = Page(html)
    assert page.open == []
    assert page.tags.count("svg") == 1 and page.tags.count("pre") == 2 and page.tags.count("section") == 4
    assert "script" not in page.tags and "<script>alert('&amp;')</script>" in page.text
    assert "LSTM(1, 2) on <device>: cudnn: a reason." in page.text
    assert "3.0e-07" in page.text and "frequencies alone: 4.60" in page.text
    assert not re.search(r"[>\s,]nan[<\s,]", html) and not re.search(r"""(src|href)=(?!"#|"data:,)""", html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html


def test_the_report_says_what_did_not_run(tmp_path):
    page = Page(_page(tmp_path, curve=[], said={"Model": [], "Time": ["no <timing>"]}))
    assert page.open == [] and "svg" not in page.tags and "no <timing>" in page.text
