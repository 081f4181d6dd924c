"""The page as a file: whole, bounded, and nothing that a run holds gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.errors import OptionError, StoreNotFoundError
from incckpt.reporting import heatmap
from incckpt.reporting.history import History
from incckpt.reporting.page import render
from tests.effort import tries
from tests.reporting.runs import large_history, train

HOSTILE = [
    '</script><script>document.title="owned"</script>',
    "<!--<script>",
    "{{data}}",
    "&lt;\u2028",
    "\"'><img src=x>",
]


class _Elements(HTMLParser):
    """Collects elements and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def parsed(page: str) -> _Elements:
    elements = _Elements()
    elements.feed(page)
    elements.close()
    return elements


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_scripts_and_styles_are_those_that_the_policy_allows() -> None:
    page = render(History("memory://x", "run"))
    policy = next(value or "" for _, value in parsed(page).attributes if value and "default-src" in value)
    for inline in (r"<style>(.*?)</style>", r"<script>(.*?)</script>"):
        (text,) = re.findall(inline, page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_names_no_other_file() -> None:
    page = render(large_history(20, 5))
    assert set(re.findall(r"https?://[^\s\"'<]*", page)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert "@import" not in page
    assert "url(" not in page


@settings(max_examples=tries(40), deadline=None)
@given(st.lists(st.text(min_size=1) | st.sampled_from(HOSTILE), min_size=3, max_size=3))
def test_no_name_becomes_markup(names: list[str]) -> None:
    plain = parsed(render(large_history(3, 2))).tags
    history = large_history(3, 2)
    history.run, history.url, metric = names
    history.problems = []
    history.heat_map.rows = [*names]
    for column in history.columns:
        column.checkpoint.metrics.clear()  # type: ignore[attr-defined]
        column.checkpoint.metrics[metric] = 1.0  # type: ignore[index]
    page = render(history)
    assert parsed(page).tags == plain
    data = data_of(page)
    assert data["heat"]["rows"] == [
        name if len(name) <= 512 else data["heat"]["rows"][i] for i, name in enumerate(names)
    ]
    assert data["metrics"][0] == metric


def test_the_page_is_bounded() -> None:
    history = large_history(50, 40)
    history.heat_map.rows = ["x" * 5000] * 8192
    history.heat_map.cells = history.heat_map.cells.repeat(164, 0)[:8192]
    history.heat_map.frozen = ["f" * 5000] * 8192
    history.problems = ["p" * 5000] * 1000
    assert len(render(history)) < 8_000_000
    assert heatmap.MOST_COLUMNS * (heatmap._MOST_CELLS // heatmap.MOST_COLUMNS) * 4 / 3 < 6_000_000


@pytest.mark.slow
def test_a_thousand_tensors_by_a_thousand_steps_take_two_megabytes() -> None:
    assert len(render(large_history(1000, 1000))) < 2_000_000


def test_metrics_that_are_not_finite(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path / "store") as manager:
        for step, value in enumerate([1.0, float("nan"), float("inf"), float("-inf")]):
            manager.save(step, {"w": torch.ones(2)}, metrics={"loss": value})
    incckpt.write_report(tmp_path / "store", tmp_path / "report.html")
    data = data_of((tmp_path / "report.html").read_text())
    assert data["columns"]["metrics"] == [[1.0, "nan", "inf", "-inf"]]


def test_write_report_replaces_the_file_whole(tmp_path: Path) -> None:
    train(tmp_path / "store", range(1, 3))
    page = tmp_path / "report.html"
    page.write_text("before")
    told: list[tuple[int, int]] = []
    nbytes = incckpt.write_report(tmp_path / "store", page, progress=lambda done, total: told.append((done, total)))
    assert page.stat().st_size == nbytes
    assert told == [(1, 2), (2, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"store", "report.html"}


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    train(tmp_path / "store", range(1, 2))
    with pytest.raises(OptionError, match="leave out '@1'"):
        incckpt.write_report(f"{tmp_path}/store#@1", tmp_path / "report.html")
    with pytest.raises(OptionError, match="is a folder"):
        incckpt.write_report(tmp_path / "store", tmp_path)
    with pytest.raises(StoreNotFoundError):
        incckpt.write_report(tmp_path / "nothing", tmp_path / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        incckpt.write_report(tmp_path / "store", tmp_path / "file" / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    train(tmp_path / "store", range(1, 2))
    incckpt.write_report(tmp_path / "store", tmp_path / "missing" / "report.html")
    assert [path.name for path in (tmp_path / "missing").iterdir()] == ["report.html"]
