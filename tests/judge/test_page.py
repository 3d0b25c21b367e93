"""The page of an audit: whole, self-contained, and no text of a model's becomes part of it."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from test_audit import Scripted, always_first, gold_pairs, planted_pairs, run, truthful  # noqa: F401

from align.errors import AlignError
from align.judge.audit import facts
from align.judge.known import known
from align.judge.page import page, write

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Checker(HTMLParser):
    """Collects tags and attributes, and holds every end tag against its start."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def plots(html):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_the_page_tells_the_verdict_and_every_group(run):  # noqa: F811
    told = facts(run(Scripted(truthful), gold_pairs(), planted_pairs()))
    text = " ".join(checked(page(told)).text)
    for words in ("accepted", *told["reasons"], "people.jsonl", "padded copy", "cut in half", "expected calibration error", "160"):
        assert words in text


def test_a_refusal_and_its_remarks_are_on_the_page(run):  # noqa: F811
    told = facts(run(Scripted(always_first), gold_pairs(), planted_pairs()))
    text = " ".join(checked(page(told)).text)
    assert "refused" in text
    assert told["remarks"]
    assert all(remark in text for remark in told["remarks"])


def test_the_plots_show_the_shares_where_they_are(run):  # noqa: F811
    """Right on every pair: the dots of the accuracy plot are at 100 percent, the end of its axis, the whiskers end there."""
    told = facts(run(Scripted(lambda q: 2.0 if truthful(q) == "first" else -2.0), gold_pairs()))
    accuracy, position, reliability = plots(page(told))
    assert [float(dot.get("cx")) for dot in accuracy.iter("circle")] == [12 + 336]
    assert [float(dot.get("cx")) for dot in position.iter("circle")] == [12 + 168]
    (interval,) = (line for line in accuracy.iter("line") if line.get("class") == "span")
    assert float(interval.get("x1")) == pytest.approx(12 + 336 * told["people"]["people.jsonl"]["correct"]["interval"][0], abs=0.01)
    (dot,) = reliability.iter("circle")
    assert float(dot.get("cx")) == pytest.approx(40 + 616 * (1 / (1 + 2.718281828**-2) - 0.5), abs=0.01)
    assert float(dot.get("cy")) == pytest.approx(258 - 250)


def test_texts_of_models_and_files_stay_texts(run):  # noqa: F811
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e{{ 7 * 7 }}"
    message = [{"role": "user", "content": attack}]
    pairs = [
        known(message, [{"role": "assistant", "content": f"good {attack} {i}"}], [{"role": "assistant", "content": "poor"}], attack, 0)
        for i in range(9)
    ]
    told = facts(run(Scripted(lambda question: "second" if truthful(question) == "first" else "first", name=attack), pairs))
    told["examples"][0]["orders"][0]["raw"] = attack
    html = page(told)
    checker = checked(html)
    assert "script" not in checker.tags
    assert "img" not in checker.tags
    assert not [name for name, _ in checker.attributes if name.startswith("on")]
    assert "alert(1)" in " ".join(checker.text)
    assert "{{ 7 * 7 }}" in " ".join(checker.text)
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_nothing_on_the_page_comes_from_elsewhere(run):  # noqa: F811
    html = page(facts(run(Scripted(truthful), gold_pairs(), planted_pairs())))
    assert not re.findall(r"""(?:src|href|action)\s*=|url\(|@import|https?://""", html)
    assert "default-src 'none'" in html


def test_the_page_of_nothing_judged_is_a_page_all_the_same(run):  # noqa: F811
    checker = checked(page(facts(run(Scripted(truthful), []))))
    assert "nothing is known of the judge" in " ".join(checker.text)
    assert "svg" not in checker.tags


def test_a_panel_s_members_are_in_the_table(run):  # noqa: F811
    told = facts(run([Scripted(truthful, "knows"), Scripted(always_first, "first")], gold_pairs()))
    text = " ".join(checked(page(told)).text)
    assert "knows (m)" in text
    assert "panel member" in text


def test_both_files_are_written_and_the_json_is_what_the_audit_found(run, tmp_path):  # noqa: F811
    told = facts(run(Scripted(truthful), gold_pairs()))
    found = write(told, tmp_path / "deep" / "out")
    assert found.read_text() == page(told)
    assert json.loads((tmp_path / "deep" / "out" / "audit.json").read_text()) == told


def test_a_folder_that_cannot_be_written(run, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignError, match=r"file/out: the audit cannot be written there \(Not a directory\). Give another folder"):
        write(facts(run(Scripted(truthful), gold_pairs(4))), tmp_path / "file" / "out")
