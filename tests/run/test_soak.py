"""The soak in its short form: many processes on one store, killed at random (see ``tests/soak.py``)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import programs

pytestmark = pytest.mark.slow

SECONDS = 4


def soak(*arguments: str) -> dict[str, Any]:
    done = programs.run("-m", "tests.soak", "--seconds", SECONDS, "--kills", 6, "--seed", 1, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.timeout(600)
def test_nothing_is_lost_on_a_local_disk() -> None:
    figures = soak("--pause", "0.4")
    assert figures["kills"] >= 6
    assert figures["announced"] > 0
    assert figures["restored"] > 0
