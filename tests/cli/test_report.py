"""`report`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command


def test_report_writes_a_page(command: Command, store: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = command("report", f"{store}#other", "-o", page)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{page}: ")
    assert "<h1>other</h1>" in page.read_text()
    found = command("report", store, "-o", page, "--json").json
    assert found == {"path": str(page), "bytes": page.stat().st_size}


def test_report_is_named_report_html(
    command: Command, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("report", store).out.startswith("report.html: ")
    assert (tmp_path / "report.html").is_file()


def test_report_of_what_is_not_there(command: Command, store: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = command("report", f"{store}#typo", "-o", page)
    assert done.code == 3
    assert "runs default, other" in done.err
    assert command("report", tmp_path / "nothing", "-o", page).code == 3
    assert command("report", f"{store}#@1", "-o", page).code == 2
    assert not page.exists()
