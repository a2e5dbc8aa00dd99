"""The page in a real Chromium: it draws, filters, answers keys, asks nobody, runs nothing from its data."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ygivenx.report import Curve, Finding, LedgerRow, LedgerTable, Page, Table, TokenStrip, made_by

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900"
)
pytestmark = [
    pytest.mark.full,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
    ),
]


class Browser:
    """One Chromium; `open` writes a page, loads it from disk and waits until it is drawn."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open(self, page: Page | str, directory: Path) -> None:
        path = directory / "report.html"
        if isinstance(page, Page):
            page.write(path)
        else:
            path.write_text(page, encoding="utf-8")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(path.as_uri())
        self.until("return performance.getEntriesByName('drawn').length")

    def js(self, script: str):
        return self.driver.execute_script(script)

    def until(self, script: str) -> None:
        WebDriverWait(self.driver, 10, poll_frequency=0.05).until(lambda _: self.js(script))

    def keys(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.js(f"return [...document.querySelectorAll({selector!r})].map((e) => e.textContent)")

    def filter(self, label: str, value: str) -> None:
        """Set the filter of this label, as a person's input would."""
        self.js(
            "const labels = [...document.querySelectorAll('.filters label')];"
            f"const label = labels.find((l) => l.firstChild.data === {label!r});"
            f"label.lastChild.value = {value!r}; label.lastChild.dispatchEvent(new Event('input'));"
        )

    def requests(self) -> list[str]:
        sent = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


def strip(i: int, answer: str = "It is 4.", log_p: float = -0.5) -> TokenStrip:
    tokens = [
        "<|im_start|>",
        "user\n",
        "What",
        " is",
        " 2+2?",
        "<|im_end|>",
        *answer.split(" "),
        "<|im_end|>",
    ]
    y = len(answer.split(" "))
    kinds = ["template"] * 2 + ["user"] * 3 + ["template"] + ["answer"] * y + ["end_of_turn"]
    return TokenStrip(
        title=f"row {i}",
        tokens=tokens,
        weights=[0.0] * 6 + [1.0] * y + [0.5],
        log_p=[None] + [-1.0] * 5 + [log_p] * y + [-0.01],
        kinds=kinds,
        ids=range(len(tokens)),
        notes=("a note",),
        fields={"expected": "4"},
    )


def sample(rows: int = 45) -> Page:
    page = Page("A report", "of a run", "1 error: stop", summary={"nats per token": 0.0841})
    page.about = made_by(model="sample")
    page.findings = [
        Finding("length", "info", "Some rows are long"),
        Finding(
            "stop",
            "error",
            "Never stops",
            3,
            0.25,
            [{"where": "row 1", "text": "…"}],
            "It goes on.",
            "Train it.",
        ),
    ]
    page.curves = [
        Curve("conditional", [0, 10, 20], [1.5, 0.5, 0.25]),
        Curve("marginal", [0, 10, 20], [3.0, float("nan"), 3.5]),
        Curve("peak", [20], [512.0], chart="MiB"),
    ]
    page.tables = [Table("Compared", ["measure", "y only"], [["exact match", "91.4 %"]])]
    user, answer = LedgerRow("user", 3, 0.0, -3.0, 1.5, 0.0), LedgerRow("answer", 3, 3.0, -1.5, 0.5, 1.0)
    page.ledgers = [LedgerTable("Row 1", [user, answer], {"log Pr([x, y])": -4.5})]
    page.rows = [strip(i, log_p=-9.0 if i == 30 else -0.5) for i in range(rows)]
    page.rows[7] = strip(7, "سلام 你好 👩‍👩‍👧")
    return page


def test_it_draws_every_section_without_a_word_on_the_console(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    assert browser.driver.title == "A report"
    headings = ["Findings", "Curves", "Comparisons", "Ledgers", "Rows"]
    assert (
        browser.js("return [...document.querySelectorAll('h2')].map((e) => e.firstChild.data)")[:5]
        == headings
    )
    assert browser.texts(".finding .severity") == ["error", "info"]
    assert browser.texts(".ledger tfoot tr") == ["total63−4.5000.900100.0 %"]
    assert len(browser.texts(".chart path.line")) == 2
    assert len(browser.texts(".row")) == 20
    assert browser.texts(".row:first-child .trained") == ["It", "is", "4.", "<|im_end|>"]
    assert browser.console() == []


def test_the_verdict_stands_first_and_what_was_run_last(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    main = "return [...document.querySelector('main').children].map((e) => e.id || e.classList[0])"
    parts = [name for name in browser.js(main) if name]
    assert (parts[0], parts[-1]) == ("verdict", "about")
    assert browser.texts(".verdict.error p") == ["1 error: stop", "Do first: Train it."]
    assert browser.texts("#about dt") == ["date", "versions", "model"]


def test_a_value_that_was_logged_once_is_a_number_and_no_chart(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    assert browser.texts("figcaption") == ["Nats per token"]
    assert browser.texts(".once") == ["MiB: peak512"]


def test_no_request_leaves_it(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    browser.keys("d", "c", "]", "?")
    assert browser.requests() == [(tmp_path / "report.html").as_uri()]
    assert browser.js("return performance.getEntriesByType('resource').length") == 0


def test_filters(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)

    def shown(label: str, value: str, expected: int) -> None:
        browser.filter(label, value)
        browser.until(f"return document.querySelector('p.count').textContent.startsWith('{expected} of 45')")

    shown("Text", "row 3", 11)  # rows 3 and 30 to 39
    shown("log p at most", "-5", 1)
    assert browser.texts(".row h3") == ["row 30"]
    assert browser.texts(".token:not(.dim):not(.scale *):not(.sample *)")[-3:] == ["It", "is", "4."]
    browser.filter("Text", "")
    browser.filter("Tokens", "untrained")
    browser.until("return document.querySelector('p.count').textContent === 'No row passes these filters.'")
    browser.filter("Tokens", "any")
    browser.filter("log p at most", "")
    browser.filter("Order", "highest loss first")
    browser.until("return document.querySelector('.row h3')?.textContent === 'row 30'")


def test_text_that_spans_tokens_is_found_and_marked(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    browser.filter("Text", "WHAT IS 2")
    browser.until("return document.querySelectorAll('.row:first-child .hit').length === 3")
    assert browser.texts(".row:first-child .hit") == ["What", " is", " 2+2?"]


def test_keyboard_alone(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    focused = "return document.activeElement.textContent"
    browser.keys("/", "x", Keys.BACKSPACE)
    assert browser.js("return document.activeElement.type") == "search"
    while not browser.js("return document.activeElement.matches('.rows .token')"):
        browser.keys(Keys.TAB)
    assert browser.js(focused) == "<|im_start|>"
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.js(focused) == "user\n"
    browser.keys("n")
    assert browser.js(focused) == "It"
    browser.keys(Keys.ARROW_DOWN, Keys.END)
    assert (
        browser.js("return document.activeElement.closest('.row').querySelector('h3').textContent") == "row 1"
    )
    details = dict(zip(browser.texts("#tip dt"), browser.texts("#tip dd"), strict=True))
    assert details["token"] == '"<|im_end|>"'
    assert details["weight"] == "0.5, trained"
    assert details["probability"] == "99.0 %"
    browser.keys("]")
    assert (
        browser.js("return document.activeElement.closest('.row').querySelector('h3').textContent")
        == "row 20"
    )
    browser.keys("?")
    assert browser.js("return document.querySelector('dialog').open")
    browser.keys(Keys.ESCAPE)
    assert not browser.js("return document.querySelector('dialog').open")


def test_curves_are_read_by_arrow_keys_and_as_a_table(browser, tmp_path) -> None:
    browser.open(sample(), tmp_path)
    browser.js("document.querySelector('.chart').focus()")
    browser.keys(Keys.HOME, Keys.ARROW_RIGHT)
    reading = "step 10, conditional 0.5, marginal –"
    assert browser.find(".chart").get_attribute("aria-valuetext") == reading
    browser.js("document.querySelector('figure details').open = true")
    browser.until("return document.querySelector('figure table')")
    assert browser.texts("figure tbody tr") == ["01.53", "100.5–", "200.253.5"]


def test_dark_by_system_and_by_hand(browser, tmp_path) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    browser.open(sample(), tmp_path)
    assert browser.js(background) == "rgb(255, 255, 255)"
    browser.keys("d", "d")
    assert browser.js(background) == "rgb(16, 18, 22)"
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.keys("d")
    assert browser.js(background) == "rgb(16, 18, 22)"
    browser.keys("d")
    assert browser.js(background) == "rgb(255, 255, 255)"
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_narrow_screens_do_not_scroll_sideways(browser, tmp_path) -> None:
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.open(sample(), tmp_path)
    width = browser.js("return document.documentElement.scrollWidth")
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 400


def test_replies_of_a_pair_stand_side_by_side_where_there_is_room(browser, tmp_path) -> None:
    page = sample(rows=8)
    page.columns = 2

    def places() -> list[list[int]]:
        found = "[...document.querySelectorAll('.rows > li')].map((e) => e.getBoundingClientRect())"
        return browser.js(f"return {found}.map((r) => [Math.round(r.left), Math.round(r.top)])")

    browser.open(page, tmp_path)
    chosen, rejected, following, *_ = places()
    assert chosen[1] == rejected[1] < following[1]
    assert chosen[0] == following[0] < rejected[0]
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chosen, rejected, *_ = places()
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert (chosen[0], rejected[1] > chosen[1]) == (rejected[0], True)


def test_what_cannot_be_seen_is_spelled_out(browser, tmp_path) -> None:
    tokens = [" a\t", "\x07", "\u202e", "ن\u200cم", "👩\u200d👧", "", "\ud800"]
    row = TokenStrip("t", tokens, [0] * 7, [None] * 7, ["user"] * 7)
    browser.open(Page("t", rows=[row]), tmp_path)
    assert browser.texts(".rows .token") == [" a\t", "␇", "U+202E", "ن\u200cم", "👩\u200d👧", "", "U+D800"]
    assert browser.texts(".rows .control") == ["␇", "U+202E", "U+D800"]
    assert (
        browser.js("return document.querySelectorAll('.rows .space, .rows .tab, .rows .empty').length") == 3
    )


def test_search_where_lower_case_is_longer(browser, tmp_path) -> None:
    tokens = ["İİİ", " X", "yz"]
    row = TokenStrip("t", tokens, [0] * 3, [None] * 3, ["user"] * 3)
    browser.open(Page("t", rows=[row]), tmp_path)
    browser.filter("Text", "xyZ")
    browser.until("return document.querySelector('.hit')")
    assert browser.texts(".hit") == [" X", "yz"]


def test_an_impossible_token_is_the_worst(browser, tmp_path) -> None:
    row = TokenStrip("t", ["a", "b", "c"], [0, 1, 1], [None, float("-inf"), -3.0], ["answer"] * 3)
    browser.open(Page("t", rows=[strip(0), row]), tmp_path)
    browser.filter("Order", "highest loss first")
    browser.until("return document.querySelector('.row h3').textContent === 't'")
    assert browser.texts(".row .stats")[0] == "3 tokens · 2 trained · ∞ nats per token · lowest log p −∞"
    assert "bin-6" in browser.find(".row .token:nth-child(2)").get_attribute("class")
    assert browser.texts(".row:first-child .token:not([class*=bin])") == ["a"]


def test_weights_of_a_gradient(browser, tmp_path) -> None:
    """Far below 1, below 0, not finite: trained is what has a weight, and colours are shares of the largest."""
    row = TokenStrip("t", ["a", "b", "c", "d"], [0, 2e-7, -1e-7, float("nan")], [None] * 4, ["answer"] * 4)
    browser.open(Page("t", rows=[row]), tmp_path)
    assert browser.texts(".row .stats") == ["4 tokens · 2 trained"]
    assert browser.texts(".rows .trained") == ["b", "c"]
    drawn = (
        "[...document.querySelectorAll('.rows .trained')].map((e) => e.style.getPropertyValue('--weight'))"
    )
    assert browser.js(f"return {drawn}") == ["", "0.5"]
    browser.keys("/", Keys.TAB)
    while not browser.js("return document.activeElement.matches('.rows .token')"):
        browser.keys(Keys.TAB)
    told = []
    for _ in range(4):
        told.append(dict(zip(browser.texts("#tip dt"), browser.texts("#tip dd"), strict=True))["weight"])
        browser.keys(Keys.ARROW_RIGHT)
    assert told == ["0, not trained", "2.0e-7, trained", "−1.0e-7, trained", "not finite"]


def test_long_sequences_are_drawn_on_demand(browser, tmp_path) -> None:
    n = 4000
    row = TokenStrip("long", ["a"] * n, [0.0] * (n - 1) + [1.0], [None] + [-1.0] * (n - 1), ["answer"] * n)
    browser.open(Page("t", rows=[row]), tmp_path)
    assert len(browser.texts(".rows .token")) == 1500
    browser.js("document.querySelector('.rows .token').focus()")
    browser.keys("w")
    assert browser.js("return document.activeElement.dataset.i") == str(n - 1)


def test_ten_thousand_rows_paint_within_three_seconds(browser, tmp_path) -> None:
    answer = " ".join(["word"] * 110)
    browser.open(Page("large", rows=[strip(i, answer) for i in range(10_000)]), tmp_path)
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    drawn = "performance.getEntriesByName('drawn')[0].startTime"
    assert browser.js(f"return Math.max({paint}, {drawn})") < 3000
    assert len(browser.texts(".row")) == 20
    browser.filter("Text", "row 9999")
    browser.until("return document.querySelectorAll('.row').length === 1")


ACTIVE = (
    "<script>window.__pwned=1</script>",
    "<img src=x onerror=window.__pwned=1>",
    "<svg onload=window.__pwned=1>",
    "<iframe srcdoc='<script>parent.__pwned=1</script>'></iframe>",
    "<a href='javascript:window.__pwned=1'>x</a>",
    "<body onload=window.__pwned=1>",
    "<details open ontoggle=window.__pwned=1>",
    "<input autofocus onfocus=window.__pwned=1>",
    "<meta http-equiv=refresh content='0;url=https://example.invalid'>",
    "<link rel=stylesheet href=https://example.invalid/x.css>",
    "<style>*{display:none}</style>",
    "<base href=https://example.invalid>",
    "<form action=https://example.invalid><button id=data>x</button></form>",
    "javascript:window.__pwned=1",
    "${window.__pwned=1}",
    "{{constructor.constructor('window.__pwned=1')()}}",
    "__proto__",
    "constructor",
    "url(https://example.invalid/x)",
    "\u202e\u2066<b>evil</b>",
)
BREAKOUTS = (
    "", "</script>", "</style></script>", "</title>", "-->", "<!--<script>", "]]>", '">', "'>", "`", "\\",
    "\\u003c", "\u2028", "\u2029", "\x00", "\ud800", "&lt;", "&#60;", "$data", "*/", "//", "\r\n", "\ufeff",
    "</SCRIPT\t>", "\udfff<",
)  # fmt: skip
HOSTILE = [breakout + active for breakout in BREAKOUTS for active in ACTIVE]


def hostile_page() -> Page:
    """500 hostile strings, each in every kind of field."""
    page = Page(
        HOSTILE[0],
        "".join(HOSTILE),
        "".join(HOSTILE),
        summary=dict.fromkeys(HOSTILE, "") | {"all": "".join(HOSTILE)},
    )
    for s in HOSTILE:
        named = {s: s}
        page.findings.append(Finding(s, s, s, 1, 1.0, [s, named], s, s))
        page.rows.append(TokenStrip(s, [s, s], [0, 1], [None, -1], [s, s], (), [s], named))
    page.tables = [Table(s, [s, s], [[s, s]], [s]) for s in HOSTILE]
    page.ledgers = [LedgerTable(s, [LedgerRow(s, 1, 1.0, -1.0, 1.0, 1.0)], {s: s}, [s]) for s in HOSTILE]
    page.curves = [Curve(s, [0, 1], [1, 2], chart=s, x_label=s) for s in HOSTILE[::10]]
    return page


def elements(browser: Browser) -> set[str]:
    return set(browser.js("return [...document.querySelectorAll('*')].map((e) => e.localName)"))


def test_500_hostile_strings_in_every_field_stay_text(browser, tmp_path) -> None:
    """With the policy switched off, so that nothing but the script's own care protects the page."""
    assert len(set(HOSTILE)) == 500
    browser.open(sample(), tmp_path)
    browser.js("document.querySelector('figure details').open = true")
    known = elements(browser)
    browser.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
    try:
        browser.open(hostile_page(), tmp_path)
        browser.js("for (const d of document.querySelectorAll('details')) d.open = true")
        for _ in range(24):
            assert elements(browser) <= known
            browser.keys("]")
        assert browser.texts(".row h3")[-1].endswith("evil</b>")
        assert browser.js("return window.__pwned === undefined && document.scripts.length === 2")
        handlers = "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
        names = set(browser.js(f"return {handlers}"))
        assert not {name for name in names if name.startswith("on")} | ({"src", "srcdoc", "action"} & names)
        assert browser.requests() == [(tmp_path / "report.html").as_uri()]
        assert browser.console() == []
    finally:
        browser.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server that notes what it is asked for: its address and the paths."""
    paths: list[str] = []

    class Notes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Notes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()


def test_the_policy_stops_what_would_get_through(browser, tmp_path, asked) -> None:
    """Holes cut on purpose: closed by the policy, open without it (so that this test can see them)."""
    address, paths = asked
    hole = f"<script>window.__pwned=1</script><img src={address}/x onerror=window.__pwned=1></main>"
    html = sample().html()
    browser.open(html.replace("</main>", hole), tmp_path)
    assert browser.js("return window.__pwned === undefined")
    assert any("Content Security Policy" in message for message in browser.console())
    assert paths == []
    trial = (
        "try { document.body.innerHTML = '<b>x</b>'; return 'done'; } catch (error) { return error.name; }"
    )
    assert browser.js(trial) == "TypeError"
    browser.open(html.replace("Content-Security-Policy", "x-none").replace("</main>", hole), tmp_path)
    assert browser.js("return window.__pwned") == 1
    WebDriverWait(browser.driver, 5).until(lambda _: paths == ["/x"])
