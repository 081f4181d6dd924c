"""`completion`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Command


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_that_its_shell_takes(command: Command, shell: str, tmp_path: Path) -> None:
    done = command("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_INCCKPT_COMPLETE={shell}_complete" in done.out
    if shutil.which(shell):
        (tmp_path / "script").write_text(done.out)
        checked = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
