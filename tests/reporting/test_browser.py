"""The page in a browser: it draws, complains of nothing, and can be used with keys alone."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.reporting.history import History
from incckpt.reporting.page import render
from tests.reporting.browser import CHROMIUM, Browser
from tests.reporting.runs import large_history, train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

EVIL = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real run with an abandoned branch."""
    folder = tmp_path_factory.mktemp("run")
    train(folder / "store", range(1, 13))
    train(folder / "store", range(5, 9), restore=4)
    incckpt.write_report(folder / "store", folder / "report.html")
    return folder / "report.html"


def page_of(history: History, folder: Path) -> Path:
    page = folder / "page.html"
    page.write_text(render(history), encoding="utf-8")
    return page


def colours(png: bytes) -> set[bytes]:
    """Return the first bytes of the rows of a picture: what a blank page has few of."""
    width, height = struct.unpack(">II", png[16:24])
    data, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += 12 + size
    raw = zlib.decompress(data)
    step = len(raw) // height
    assert step >= 3 * width
    return {raw[row * step + 1 : (row + 1) * step] for row in range(height)}


def heat_colours(browser: Browser) -> list[str]:
    """Return what the heat map's canvas shows, as the colours that occur."""
    found = browser.evaluate("""(() => {
        const shown = document.querySelector(".heat canvas"), seen = new Set();
        const canvas = Object.assign(document.createElement("canvas"), { width: shown.width, height: shown.height });
        canvas.getContext("2d", { willReadFrequently: true }).drawImage(shown, 0, 0);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        for (let at = 0; at < data.length; at += 4) seen.add(data.slice(at, at + 3).join());
        return [...seen];
    })()""")
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_real_run_is_drawn_without_a_complaint(browser: Browser, report: Path, dark: bool) -> None:
    browser.show(report, dark=dark)
    assert len(colours(browser.picture())) > 100
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)")
    assert headings == ["Metrics", "Bytes stored", "Waiting for saves", "What changed", "Lineage", "Sizes"]
    assert browser.evaluate("document.querySelectorAll('svg[role=img]').length") == 2 + 2 + 1 + 1
    assert "step 5" not in browser.evaluate("document.querySelector('dl').textContent")
    assert browser.evaluate("document.querySelector('main').innerText").count("model.2.weight") == 1, "it is frozen"
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 384) == dark
    assert browser.complaints == []


@pytest.mark.parametrize("width", [1920, 1280, 700, 390])
def test_nothing_sticks_out_sideways(browser: Browser, report: Path, width: int) -> None:
    browser.show(report, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_thousand_tensors_by_a_thousand_steps(browser: Browser, tmp_path: Path) -> None:
    browser.show(page_of(large_history(1000, 1000), tmp_path))
    assert len(heat_colours(browser)) > 50
    browser.evaluate(
        "[...document.querySelectorAll('.tools button')].find((b) => b.textContent === 'Open all').click()"
    )
    assert browser.evaluate("document.querySelector('.heat').scrollHeight") > 1000 * 19
    assert browser.evaluate("document.querySelector('.heat canvas').height") < 1000, "only what shows is drawn"
    browser.evaluate("document.querySelector('.heat').scrollTop = 9000")
    for _ in range(4):
        browser.evaluate("document.querySelector('[aria-label=\"Wider columns\"]').click()")
    assert browser.evaluate("document.querySelector('.heat').scrollWidth") > 20 * 1000
    assert browser.evaluate("document.querySelector('.heat canvas').width") <= 1280
    assert len(heat_colours(browser)) > 10
    assert browser.complaints == []


def test_the_heat_map_is_used_with_keys(browser: Browser, report: Path) -> None:
    browser.show(report)
    said = "document.querySelector('[aria-live]').textContent"
    browser.evaluate("document.querySelector('.heat canvas').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    first = browser.evaluate(said)
    assert first.startswith("model (5 tensors), step 2, relative change ")
    browser.press("ArrowDown")
    assert browser.evaluate(said).startswith("model.0")
    browser.press("ArrowUp")
    browser.press("Enter")
    assert browser.evaluate(said) == "model closed"
    browser.press("ArrowDown")
    assert browser.evaluate(said).startswith("optimizer")
    browser.evaluate("document.querySelector('figure svg').focus()")
    browser.press("End")
    assert "step 8" in browser.evaluate(said)
    assert not browser.evaluate("document.querySelector('.tip').hidden")
    browser.press("Escape")
    assert browser.evaluate("document.querySelector('.tip').hidden")
    assert browser.complaints == []


def test_search_and_pointer(browser: Browser, report: Path) -> None:
    browser.show(report)
    browser.evaluate("""(() => {
        const box = document.querySelector("input[type=search]");
        box.value = "2.WEIGHT";
        box.dispatchEvent(new Event("input"));
        document.querySelector(".heat").scrollIntoView({ block: "center" });
    })()""")
    assert browser.evaluate("document.querySelector('output').textContent") == "1 tensor found"
    box = browser.evaluate("JSON.parse(JSON.stringify(document.querySelector('.heat canvas').getBoundingClientRect()))")
    browser.move(box["x"] + box["width"] / 2, box["y"] + 24 + 8)
    tip = browser.evaluate("document.querySelector('.tip').innerText")
    assert "model.2.weight" in tip
    assert "did not change" in tip


def test_the_theme_is_chosen_by_hand(browser: Browser, report: Path) -> None:
    browser.show(report)
    light = set(heat_colours(browser))
    browser.evaluate("document.querySelector('[data-choice=dark]').click()")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    assert browser.evaluate("document.querySelector('[data-choice=dark]').getAttribute('aria-pressed')") == "true"
    assert set(heat_colours(browser)) != light, "the canvas follows"


def test_texts_have_contrast(browser: Browser, report: Path) -> None:
    for dark in (False, True):
        browser.show(report, dark=dark)
        ratios = browser.evaluate("""(() => {
            const parse = (text) => text.match(/[\\d.]+/g).map(Number);
            const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
            function behind(element) {
                for (; element; element = element.parentElement) {
                    const found = parse(getComputedStyle(element).backgroundColor);
                    if (found.length < 4 || found[3] > 0) return found;
                }
                return [255, 255, 255];
            }
            const found = {};
            for (const element of document.querySelectorAll("body *")) {
                const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
                if (!text || element.disabled || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
                const style = getComputedStyle(element), ink = element instanceof SVGElement ? style.fill : style.color;
                const [a, b] = [light(parse(ink)), light(behind(element))].sort((x, y) => y - x);
                found[`${element.tagName} ${element.textContent.slice(0, 30)}`] = (a + 0.05) / (b + 0.05);
            }
            return found;
        })()""")
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path / "store") as manager:
        for step in range(1, 4):
            state = {
                EVIL: torch.ones(40) * step,
                "a" * 3000: torch.ones(40),
                "__proto__.x": torch.ones(9) * step,
                "": torch.ones(9),
            }
            manager.save(step, state, metrics={EVIL: step, "__proto__": math.nan, "x" * 400: 1e300 * step})
    incckpt.write_report(tmp_path / "store", tmp_path / "report.html")
    browser.show(tmp_path / "report.html")
    assert browser.evaluate("document.title") == "default – incckpt report"
    assert browser.evaluate("document.querySelectorAll('img, iframe, object').length") == 0
    assert EVIL in browser.evaluate("document.querySelector('main').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == []


def test_little_to_show(browser: Browser, tmp_path: Path) -> None:
    incckpt.save({"w": torch.zeros(3)}, tmp_path / "store", run="one")
    incckpt.save({"epoch": 1}, tmp_path / "store", run="values")
    with incckpt.CheckpointManager(tmp_path / "store", run="nothing") as manager:
        manager.save(1, {"w": torch.ones(3)})
        manager.delete(1)
    for run, expected in (
        ("nothing", ["This run has no checkpoint yet"]),
        ("one", ["No metrics were saved", "Not recorded", "There is one checkpoint"]),
        ("values", ["The state has no tensor of more than one element"]),
    ):
        incckpt.write_report(tmp_path / "store", tmp_path / "report.html", run=run)
        browser.show(tmp_path / "report.html")
        text = browser.evaluate("document.querySelector('main').innerText")
        for words in expected:
            assert words in text
        assert browser.complaints == []


def test_what_could_not_be_read_is_said(browser: Browser, tmp_path: Path) -> None:
    history = large_history(10, 4)
    history.problems = ["the manifest of step 50 is damaged"]
    browser.show(page_of(history, tmp_path))
    assert "step 50 is damaged" in browser.evaluate("document.querySelector('[role=note]').innerText")


def test_the_table_says_the_same_in_words(browser: Browser, report: Path) -> None:
    browser.show(report)
    browser.evaluate("document.querySelector('details').open = true")
    browser.evaluate("new Promise((done) => setTimeout(() => done(true)))")
    assert browser.evaluate("document.querySelectorAll('details tbody tr').length") == 8
    assert browser.complaints == []
