"""Kill -9 of a process that saves and prunes, at instants spread over every system call that its store makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import incckpt
from incckpt.manager import CheckpointManager
from tests.children.save_loop import KEEP_LAST, STEPS, equals, state_at
from tests.stores import orphans

pytestmark = pytest.mark.slow

INSTANTS = int(os.environ.get("INCCKPT_KILLS", "10"))  # make thorough: 200


class Saver:
    """The process that forks the ones to be killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.children.save_loop"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the saving process is gone"
        return line.rstrip("\n")

    def run(self, folder: Path, nth: int) -> tuple[str, list[int], int]:
        """Return how the run ended, the steps it announced, and the system calls it made (0 if it was killed)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder} {nth}\n")
        self._process.stdin.flush()
        announced: list[int] = []
        calls = 0
        while True:
            word, value = self._line().split()
            if word == "ended":
                return value, announced, calls
            if word == "announced":
                announced.append(int(value))
            else:
                calls = int(value)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    saver = Saver()
    yield saver
    saver.close()


def check(folder: Path, announced: list[int]) -> None:
    """Check that what was announced, and not pruned, restores, whatever else is there."""
    with CheckpointManager(folder, read_only=True) as reader:
        listed = [checkpoint.step for checkpoint in reader.checkpoints()]
    # Only the process that was killed knew whether a commit without an announcement had happened.
    for step in announced[-KEEP_LAST:] if announced else []:
        newer = [other for other in listed if other > step]
        assert step in listed or len(newer) >= KEEP_LAST, f"step {step} was announced, {listed} are listed"
    for step in listed:
        assert equals(incckpt.load(folder, step=step), step)


@pytest.mark.timeout(1500)
def test_kill_at_many_instants(saver: Saver, tmp_path: Path) -> None:
    how, announced, calls = saver.run(tmp_path / "whole", 0)
    assert (how, announced) == ("finished", list(range(1, STEPS + 1)))
    check(tmp_path / "whole", announced)
    assert calls > INSTANTS / 2

    killed = 0
    for instant in range(INSTANTS):
        folder = tmp_path / str(instant)
        first = instant % 2 == 0  # else in a second process, which restores what the first one saved
        if not first:
            saver.run(folder, 0)
        nth = 1 + (instant * (calls - 1)) // (INSTANTS - 1)
        how, announced, _ = saver.run(folder, nth)
        killed += how == "killed"
        assert how in ("killed", "finished")
        check(folder, announced)
        # No leftover breaks the next run, and it cleans up.
        how, announced, _ = saver.run(folder, 0)
        assert how == "finished"
        check(folder, announced)
        assert len(announced) == STEPS
        assert orphans(folder) == set()
    assert killed >= INSTANTS * 0.9


def test_the_states_differ() -> None:
    assert not equals(state_at(1), 2)
    assert equals(state_at(2), 2)
