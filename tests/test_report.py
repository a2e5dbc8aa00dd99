"""The page without a browser: what may run, what the data block holds, what the parts refuse."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ygivenx.report import Curve, Finding, LedgerRow, LedgerTable, Page, Table, TokenStrip, run_page
from ygivenx.sequence import Segment, Sequence

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>-->",
    "\u2028\u2029",
    "\x00\x1b[31m",
    "\ud800 lone \udfff",
    "$csp ${script} $$",
    "&lt;b&gt; &#x3c;",
    "'\"`\\",
)


class Document(HTMLParser):
    """Elements with their attributes, and the text of style, script, title and the data block."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self.inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag):
        if tag in ("script", "style", "title"):
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data

    @property
    def data(self):
        return json.loads(self.texts["data"])


def full_page(text: str = "text") -> Page:
    """A page with `text` in every field there is."""
    named = {text: text}
    return Page(
        title=text,
        subtitle=text,
        summary=named,
        findings=[Finding(text, text, text, 1, 0.5, [text, named], text, text)],
        curves=[Curve(text, [0, 1], [1.0, 2.0], chart=text, x_label=text)],
        tables=[Table(text, [text, text], [[text, 1]], [text])],
        ledgers=[LedgerTable(text, [LedgerRow(text, 1, 1.0, -1.0, 1.0, 1.0)], named, [text])],
        rows=[TokenStrip(text, [text, text], [0, 1], [None, -1.0], [text, text], [0, 1], [text], named)],
    )


def strip(log_p, weights=None, **options) -> TokenStrip:
    n = len(log_p)
    return TokenStrip("t", ["a"] * n, weights or [1.0] * n, log_p, ["answer"] * n, **options)


def test_only_what_we_ship_may_run() -> None:
    document = Document(full_page().html())
    (policy,) = [
        a["content"] for t, a in document.elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(document.texts[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in policy


def test_nothing_outside_is_named() -> None:
    document = Document(full_page().html())
    for tag, attributes in document.elements:
        assert tag not in ("img", "iframe", "link", "object", "embed", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import|https?:", document.texts["style"])
    assert set(re.findall(r"https?://[^\"' ]+", document.texts["script"])) == {"http://www.w3.org/2000/svg"}


def test_script_knows_no_way_to_make_markup_or_code_or_requests() -> None:
    script = Document(full_page().html()).texts["script"]
    markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|srcdoc|DOMParser|createContextualFragment"
    assert not re.search(
        markup + r"|\beval\b|Function\(|fetch\(|XMLHttp|import\(|sendBeacon|WebSocket", script
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back_as_it_was_and_stays_data(text: str) -> None:
    plain, hostile = Document(full_page().html()), Document(full_page(text).html())
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.texts["script"] == plain.texts["script"]
    data = hostile.data
    assert data["title"] == data["vocabulary"][0][0] == data["findings"][0]["examples"][1][text] == text


@given(st.text(alphabet=st.characters(codec=None, categories=None)))
def test_any_text_survives(text: str) -> None:
    page = full_page(text).html()
    assert Document(page).data["strips"][0]["fields"] == [[text, text]]
    block = page[page.index('id="data">') + 10 :]
    block = block[: block.index("</script>")]
    assert block.isascii()
    assert not set("<>&") & set(block)
    page.encode("utf-8")


def test_written_file_is_the_html_and_deterministic(tmp_path) -> None:
    path = full_page("\ud800é\r\n").write(tmp_path / "deep" / "report.html")
    assert path.read_bytes() == full_page("\ud800é\r\n").html().encode()


def test_numbers_without_a_value() -> None:
    data = Document(
        Page(
            "t",
            summary={
                "a": math.nan,
                "b": -math.inf,
                "c": np.float32(0.5),
                "d": np.int64(3),
                "e": np.bool_(True),
            },
            curves=[Curve("c", np.arange(3), np.array([1.0, np.nan, np.inf]))],
            rows=[strip([None, math.nan, -math.inf, -0.123456])],
        ).html()
    ).data
    assert data["summary"] == [["a", None], ["b", "−∞"], ["c", 0.5], ["d", 3], ["e", True]]
    assert data["charts"][0]["curves"][0]["y"] == [1.0, None, "∞"]
    assert data["strips"][0]["log_p"] == [None, None, "−∞", -0.1235]


def test_token_strips_share_a_vocabulary_and_keep_their_order() -> None:
    one = TokenStrip(
        "1", ["a", "b", "a"], [0, 1, 0.5], [None, -1, -2], ["user", "answer", "answer"], [7, 8, 7]
    )
    two = TokenStrip("2", ["a", "a"], [0, 0], [None, -1], ["user", "bos"], [9, 7])
    data = Document(Page("t", rows=[one, two]).html()).data
    assert data["vocabulary"] == [["a", 7], ["b", 8], ["a", 9]]
    assert [s["tokens"] for s in data["strips"]] == [[0, 1, 0], [2, 0]]
    assert data["strips"][0]["weights"] == [[0.0, 1], [1.0, 1], [0.5, 1]]
    assert data["strips"][0]["kinds"] == [[0, 1], [1, 2]]
    assert data["kinds"] == ["user", "answer", "bos"]


def test_weights_of_a_step_keep_their_digits() -> None:
    """A step of a million tokens weighs each by 1e-6 and less."""
    data = Document(Page("t", rows=[strip([None] * 4, weights=[0, 2.34567e-7, -0.25, math.nan])]).html()).data
    assert data["strips"][0]["weights"] == [[0.0, 1], [2.346e-07, 1], [-0.25, 1], [None, 1]]


def test_a_strip_from_a_sequence() -> None:
    segments = (Segment(0, 2, "user"), Segment(2, 3, "answer", output=True))
    tokens = ("User:", "2+2?", "4")
    sequence = Sequence(np.array([5, 6, 7]), np.array([0, 0, 1.0]), segments, tokens, ("a note",))
    made = TokenStrip.of(sequence, np.array([np.nan, -2.0, -0.5]), title="seed")
    assert made.kinds == ["user", "user", "answer"]
    assert list(made.tokens) == list(tokens)
    assert made.notes == ("a note",)
    assert TokenStrip.of(sequence, title="unscored").log_p == [None] * 3


def test_a_ledger_from_accounts() -> None:
    from ygivenx.scores.ledger import Ledger, LedgerRow

    user = LedgerRow("user", 2, 0.0, -3.0, 1.5, 0.0)
    rows = (user, LedgerRow("answer", 1, 1.0, -0.5, 0.5, 1.0))
    ledger = Ledger(rows, rows[0], -3.5, -3.0, -0.5, -0.5, 1e-5, (), (), ("a note",))
    data = Document(Page("t", ledgers=[LedgerTable.of(ledger, "seed")]).html()).data["ledgers"][0]
    answer = {
        "kind": "answer",
        "tokens": 1,
        "weight": 1.0,
        "log_p": -0.5,
        "nats_per_token": 0.5,
        "share": 1.0,
    }
    assert data["rows"][1] == answer
    assert dict(data["facts"])["log Pr([x, y])"] == -3.5
    assert data["notes"] == ["it adds up, within 1.0e-05 nats", "a note"]


def test_findings_of_any_make_come_worst_first() -> None:
    findings = [
        {"rule": "c", "severity": "info", "message": "m"},
        SimpleNamespace(rule="b", severity="warning", message="m", count=np.int64(2), share=np.float32(0.5)),
        Finding("a", "error", "m", examples=({"where": "row 1", "text": "t"},)),
        {"rule": "d", "severity": "unheard of", "message": "m"},
    ]
    data = Document(Page("t", findings=findings).html()).data["findings"]
    assert [f["rule"] for f in data] == ["a", "b", "c", "d"]
    assert data[1]["count"] == 2
    assert data[1]["share"] == 0.5
    assert data[2]["count"] is None


def test_curves_of_one_chart_share_axes_in_order() -> None:
    curves = [
        Curve("a", [0], [1], chart="one"),
        Curve("b", [0], [1], chart="two"),
        Curve("c", [0], [1], chart="one"),
    ]
    charts = Document(Page("t", curves=curves).html()).data["charts"]
    assert [(c["title"], [k["name"] for k in c["curves"]]) for c in charts] == [
        ("one", ["a", "c"]),
        ("two", ["b"]),
    ]


def test_a_trainers_log_becomes_curves() -> None:
    """As transformers writes it: entries of several kinds, and a last one with totals."""
    history = [
        {"loss": 2.0, "grad_norm": 1.5, "learning_rate": 1e-5, "step": 5},
        {"eval_loss": 1.9, "eval_marginal_nats": 3.0, "step": 5},
        {"loss": float("nan"), "step": 10},
        {"train_runtime": 3.0, "train_loss": 1.8, "step": 10},
    ]
    charts = {c["title"]: c["curves"] for c in Document(run_page(history).html()).data["charts"]}
    assert charts["Norm of the gradient"] == [{"name": "norm of the gradient", "x": [5.0], "y": [1.5]}]
    nats = charts["Nats per token, lower is more probable"]
    assert [(c["name"], c["x"], c["y"]) for c in nats] == [
        ("loss that is trained", [5.0, 10.0], [2.0, None]),
        ("marginal, log Pr(x), held out", [5.0], [3.0]),
    ]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: strip([None, -1.0], weights=[0.0]), r"'t'.*'weights': 1.*'log_p': 2"),
        (lambda: strip([None], ids=[1, 2]), r"'ids': 2"),
        (lambda: Curve("c", [1, 2], [1.0]), r"curve 'c'.*'x': 2, 'y': 1"),
        (lambda: Table("t", ["a", "b"], [[1, 2], [1]]), r"table 't': row 1 has 1 cells, expected 2"),
    ],
)
def test_lengths_that_differ_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
