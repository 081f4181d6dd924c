"""The example, preempted while it trains: it ends in time, resumes elsewhere, and its losses are as if undisturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.programs import Program

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "preemptible.py"
STEPS = 60


def train(url: Path, preempt_at: int | None = None) -> tuple[int, dict[int, str]]:
    """Run the example; return its status, and the losses by step."""
    reading, writing = os.pipe()
    losses: dict[int, str] = {}
    with (
        os.fdopen(reading) as lines,
        os.fdopen(writing, "w") as output,
        Program(EXAMPLE, url, "--steps", STEPS, "--every", 25, output=output) as process,
    ):
        output.close()
        for line in lines:
            _, step, _, loss = line.split()
            losses[int(step)] = loss
            if int(step) == preempt_at:
                process.send_signal(signal.SIGTERM)
        return process.wait(), losses


def test_preempted_and_resumed(tmp_path: Path) -> None:
    status, expected = train(tmp_path / "undisturbed")
    assert status == os.EX_OK
    assert list(expected) == list(range(1, STEPS + 1))
    status, first = train(tmp_path / "store", preempt_at=10)
    assert status == os.EX_TEMPFAIL
    status, second = train(tmp_path / "store")
    assert status == os.EX_OK
    assert min(second) == max(first) + 1, "nothing is lost, and nothing is trained twice"
    assert first | second == expected
