"""Progress bars: on every verb that may take long, where somebody watches; silent elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command

LONG = {
    "stats {store}": "reading manifests",
    "du {store}": "reading manifests",
    "blobs {store}": "reading manifests",
    "diff {store}#@1 @3": "comparing",
    "verify {store}": "verifying run other, step 10",
    "verify {store}#@2": "verifying step 2",
    "verify {store}#default --level list": "verifying step 1 .* 3 of 3",
    "copy {store} {folder}/copy": "copying",
    "export {store} {folder}/out.pt": "exporting out.pt",
    "import {folder}/in.pt {folder}/imported": "importing in.pt",
    "prune {store} --keep-last 1": "reading manifests",
    "gc {store}": "reading manifests .* 4 of 4",
    "report {store} -o {folder}/report.html": "reading manifests .* 3 of 3",
    "recover {store}": "checking .* 3 of 3",
    "rm {store}#@2 --yes": "deleting",
}  # fmt: skip


class Terminal(io.StringIO):
    """A standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("watched", [["yes"], ["no"], ["yes", "--quiet"], ["yes", "--json"]], ids=" ".join)
def test_a_bar_where_somebody_watches(
    command: Command, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[str]
) -> None:
    assert command("export", store, tmp_path / "in.pt").code == 0
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    for line, bar in LONG.items():
        error = Terminal() if watched[0] == "yes" else io.StringIO()
        monkeypatch.setattr(sys, "stderr", error)
        arguments = [word.format(store=store, folder=tmp_path) for word in line.split()]
        assert command(*arguments, *watched[1:]).code == 0, line
        if watched == ["yes"]:
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", error.getvalue())  # all that was ever to be seen
            assert re.search(bar, shown), f"{line!r} shows {shown!r}"
            assert error.getvalue().endswith("\x1b[2K"), f"the bar of {line!r} stays on the screen"
        else:
            assert error.getvalue() == "", line
