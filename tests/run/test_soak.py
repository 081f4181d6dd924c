"""The soak in its short form: many processes on one store, killed at random (see ``tests/soak.py``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SECONDS = 5


def soak(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.soak", "--seconds", str(SECONDS), "--kills", "4", "--seed", "1", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.timeout(600)
def test_nothing_is_lost_on_a_local_disk() -> None:
    figures = soak("--pause", "0.4")
    assert figures["kills"] >= 4
    assert figures["announced"] > 0
    assert figures["restored"] > 0
