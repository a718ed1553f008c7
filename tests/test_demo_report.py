"""The demo's report: its contents and what it escapes. And reports taken apart, for the other tests of the demo."""

import math
import re
from html.parser import HTMLParser

import pytest

from lstm_triton import check
from lstm_triton.bench.rows import Timing
from lstm_triton.demo import timing, train

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
    rows = tuple(check.Row(d, q, 1e-7, 2e-8, 3e-7, 4e-8, ()) for d in ("float32", "bfloat16") for q in check.QUANTITIES)
    one = Timing(4.0, 5.0, 6.0, 5.0, 5.0, 4.0, 6.0, 0.95, 9, 1, "a clock")
    contents = {
        "said": ["a GPU", "Text: some", "LSTM(1, 2) on <device>: cudnn: a reason.", "3.50 bits per character"],
        "curve": [train.Point(0, 0, 0.0, math.nan, 7.0), train.Point(5, 500, 2.0, 5.0, 3.5)],
        "unigram_bits": 4.6,
        "sample": ("\ndef ", "<script>alert('&amp;')</script>"),
        "accuracy": check.Report("a <device>", 2, rows),
        "timings": timing.Report("CPU", "a <b>note</b>", {(m, n): one for m in timing.NAMES for n in timing.PROVIDERS}),
    }
    path = tmp_path / "new" / "report.html"
    report.write(path, **(contents | changes))
    return path.read_text(encoding="utf-8")


def test_the_report_holds_pictures_and_escapes_text(tmp_path):
    html = _page(tmp_path)
    page = Page(html)
    assert page.open == []
    assert page.tags.count("svg") == 3 and "table" in page.tags
    assert "script" not in page.tags and page.tags.count("b") == 2 and "a <b>note</b>" in page.text
    assert "<script>alert('&amp;')</script>" in page.text and "a <device>" in page.text
    assert "a GPU" in page.text and "LSTM(1, 2) on <device>: cudnn: a reason." in page.text
    assert "1.0e-07" in page.text and "3.50 bits per character" in page.text and "frequencies alone: 4.60" in page.text
    assert not re.search(r"[>\s,]nan[<\s,]", html) and not re.search(r"""(src|href)=(?!"#|"data:,)""", html)
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html


def test_the_report_says_what_did_not_run(tmp_path):
    page = Page(_page(tmp_path, accuracy="no <check>", timings="no timing", curve=[]))
    assert page.open == [] and "svg" not in page.tags
    assert "no <check>" in page.text and "no timing" in page.text


def test_a_failed_check_shows_in_the_report(tmp_path):
    page = Page(_page(tmp_path, accuracy=check_report("B=1 too large")))
    assert "Failed" in page.text and "float32 dW_ih: B=1 too large" in page.text
