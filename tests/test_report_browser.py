"""report.html in headless Chromium: no complaints, no requests, and what can be pressed works."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from test_report import EVIL, digits, evil_models, layers, pipeline, timing

from prunedm.evaluation.report import write_report
from prunedm.evaluation.results import Evaluation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path"),
]
CHOSEN = "document.querySelector('[data-model][aria-pressed=true]').textContent"
SHOWN = "[...document.querySelectorAll('.stack img')].map(i => i.className).indexOf('shown')"
# text that is drawn, in one string
VISIBLE = "document.body.innerText"


def whole() -> list[Evaluation]:
    """Every section of the page."""
    models = pipeline()
    for k, e in enumerate(models):
        e.layers = layers(12, why_dense="grouped convolution", pattern="")
        e.figures.timings = [timing(1, 9.1 + k), timing(64, 80.0, compiled=True)]
    models[3].label = "3-a-very-long-label-without-any-place-to-break-it-on-a-phone"
    models[-1].failed = {"kid": "KID needs 1000 samples; " + "x" * 120}
    return models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    models = whole()
    write_report(models, digits(models), made / "whole.html", title="Digits, 2:4")
    evil = evil_models()
    samples = {label: np.zeros((4, 8, 8, 1), np.uint8) for label in ("dense", EVIL)}
    write_report(evil, samples, made / "evil.html", title=EVIL)
    return made


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started: Browser, folder: Path) -> Iterator[Browser]:
    """An English browser of 1280 pixels with the whole page open and nothing stored."""
    started.complaints.clear()
    started.requests.clear()
    started.media(prefers_color_scheme="light")
    started.open((folder / "whole.html").as_uri())
    if started.run("localStorage.length"):
        started.run("localStorage.clear()")
        started.open((folder / "whole.html").as_uri())
    yield started
    assert started.complaints == []
    assert [r for r in started.requests if not r.startswith(("file:", "data:"))] == []


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({selector!r}).click()")


def middle(browser: Browser, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """A place in an element that is scrolled into view, as parts of its size."""
    box = browser.run(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView();"
        "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
    )
    return box[0] + x * box[2], box[1] + y * box[3]


def test_languages_switch_and_are_kept(browser: Browser, folder: Path) -> None:
    assert "How they were made" in browser.run(VISIBLE)
    assert "处理流程" not in browser.run(VISIBLE)
    click(browser, "button[data-language=zh]")
    assert "处理流程" in browser.run(VISIBLE)
    assert "How they were made" not in browser.run(VISIBLE)
    assert browser.run("document.documentElement.lang") == "zh-CN"
    assert browser.run("document.querySelector('.sheet img').alt") == "dense 的 36 张样本"
    browser.open((folder / "whole.html").as_uri())
    assert "处理流程" in browser.run(VISIBLE)
    click(browser, "button[data-language=en]")
    assert browser.run("document.querySelector('.sheet img').alt") == "36 samples of dense"


@pytest.mark.parametrize(("language", "words"), [("zh-CN", "处理流程"), ("de-DE", "How they")])
def test_first_language_is_the_browsers(browser: Browser, language: str, words: str) -> None:
    agent = browser.run("navigator.userAgent")
    browser.call("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
    browser.open(browser.run("location.href"))
    assert words in browser.run(VISIBLE)
    browser.call("Network.setUserAgentOverride", userAgent=agent, acceptLanguage="en-US")


def test_without_storage_languages_still_switch(browser: Browser) -> None:
    deny = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=deny)
    browser.open(browser.run("location.href"))
    click(browser, "button[data-language=zh]")
    assert "处理流程" in browser.run(VISIBLE)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", **script)


def test_without_script_the_page_is_english_and_whole(browser: Browser) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(browser.run("location.href"))
    seen = browser.run(VISIBLE)
    pressable = browser.run(
        "[...document.querySelectorAll('button')].filter(b => b.checkVisibility()).length"
    )
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "How they were made" in seen
    assert "处理流程" not in seen
    assert pressable == 0


def test_buttons_keys_and_holding_change_the_model(browser: Browser) -> None:
    assert browser.run(CHOSEN) == "5-finetune"
    click(browser, "[data-model='0']")
    assert (browser.run(CHOSEN), browser.run(SHOWN)) == ("dense", 0)
    browser.run("document.querySelector('.stack').focus()")
    browser.press("ArrowRight")
    assert (browser.run(CHOSEN), browser.run(SHOWN)) == ("1-prune", 1)
    for _ in range(2):
        browser.press("ArrowLeft")
    assert (browser.run(CHOSEN), browser.run(SHOWN)) == ("5-finetune", 5)
    place = middle(browser, ".stack")
    browser.mouse("mousePressed", *place)
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.run(SHOWN) == 0
    browser.mouse("mouseReleased", *place)
    assert browser.run(SHOWN) == 5
    assert not browser.run("document.querySelector('dialog').open")


def test_difference_is_four_times_the_absolute_one(browser: Browser, tmp_path: Path) -> None:
    click(browser, "[data-difference]")
    assert (
        browser.run("document.querySelector('.caption').textContent") == "|5-finetune − dense| × 4"
    )
    models = whole()
    images = digits(models)
    x, y = middle(browser, ".stack", 0, 0)
    browser.screenshot(tmp_path / "page.png")
    page_HWC = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    width = browser.run("document.querySelector('.stack').clientWidth")
    zoom = width // browser.run("document.querySelector('.stack img').naturalWidth")
    one, two = (images[label][0, ..., 0].astype(int) for label in ("dense", "5-finetune"))
    left, top = round(x) + zoom // 2, round(y) + zoom // 2
    drawn = page_HWC[top : top + 16 * zoom : zoom, left : left + 16 * zoom : zoom, 0]
    np.testing.assert_allclose(drawn, np.minimum(4 * abs(one - two), 255), atol=4)


def canvas(browser: Browser, k: int) -> np.ndarray:
    uri = browser.run(f"document.querySelectorAll('canvas')[{k}].toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        return np.asarray(image.convert("L"))


def test_click_enlarges_the_image_that_was_clicked(browser: Browser) -> None:
    images = digits(whole())
    place = middle(browser, ".stack", 1.5 / 6, 2.5 / 6)  # row 2, column 1
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, *place)
    assert browser.run("document.querySelector('dialog').open")
    assert browser.run("document.querySelector('.position').textContent") == "14 / 36"
    np.testing.assert_array_equal(canvas(browser, 0), images["dense"][13, ..., 0])
    np.testing.assert_array_equal(canvas(browser, 1), images["5-finetune"][13, ..., 0])
    browser.press("ArrowRight")
    np.testing.assert_array_equal(canvas(browser, 0), images["dense"][14, ..., 0])
    width = browser.run("document.querySelector('canvas').clientWidth")
    assert width % 16 == 0
    click(browser, "[data-close]")
    assert not browser.run("document.querySelector('dialog').open")
    assert browser.run(CHOSEN) == "5-finetune"  # the arrows went to the enlarged image only


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_never_scrolls_sideways(browser: Browser, width: int, language: str) -> None:
    browser.open(browser.run("location.href"), width=width, height=800)
    click(browser, f"button[data-language={language}]")
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('.stack').focus()")
    browser.press("Enter")
    edges = "(b => [b.left, b.right])(document.querySelector('dialog').getBoundingClientRect())"
    box = browser.run(edges)
    assert 0 <= box[0] < box[1] <= width


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_scheme(browser: Browser, scheme: str, dark: bool) -> None:
    browser.media(prefers_color_scheme=scheme)
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (int(colour.split("(")[1].split(",")[0]) < 100) == dark


def test_data_run_no_script(browser: Browser, folder: Path) -> None:
    browser.open((folder / "evil.html").as_uri())
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelectorAll('b').length") < 10
    assert "<script>alert(1)</script>" in browser.run(VISIBLE)


def test_policy_bars_what_would_get_in(browser: Browser) -> None:
    attempt: dict[str, Any] = browser.run(
        "new Promise(done => { window.ran = 0;"
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); const i = new Image(); i.onerror = () => done({ran: window.ran});"
        "i.src = 'https://example.invalid/x.png'; })"
    )
    assert attempt == {"ran": 0}
    assert any("Content Security Policy" in line for line in browser.complaints)
    browser.complaints.clear()  # ours
    browser.requests.clear()
