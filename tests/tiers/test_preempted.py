"""Two tiers in a process whose end is announced: the bucket gets the newest checkpoint, or is waited for no longer."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt import CheckpointManager, LocalTier
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import DeadlineError
from incckpt.testing.faults import Call, Fault, FaultyBackend

NEVER = 3600.0


def save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, {"w": torch.full((9,), float(step))}).result()


class Held:
    """A bucket whose objects are put when `open` is set; `act` is called before, once."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.act: Callable[[], object] = lambda: None
        self.server = MemoryBackend(uuid.uuid4().hex)
        self.backend = FaultyBackend(self.server, [Fault("put", "objects/*", times=None, do=Call(self._hold))])

    def _hold(self, _: object) -> None:
        act, self.act = self.act, lambda: None
        act()
        self.open.wait()

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in incckpt.list_checkpoints(self.server)]


def once_somebody_waits(manager: CheckpointManager, act: Callable[[], object]) -> Callable[[], None]:
    """Return what does something as soon as a thread waits for copies."""

    def wait_and_act() -> None:
        copies: Any = manager._position.copies  # type: ignore[union-attr]
        while not copies._queue._changes._waiting:
            time.sleep(0)  # let the thread that is to wait go on
        act()

    return wait_and_act


def gone(seconds: float) -> incckpt.Notice:
    return incckpt.Notice("test", time.time() + seconds, "the machine goes")


@pytest.mark.parametrize("how", ["close", "wait", "restore", "delete"])
def test_a_bucket_that_hangs_is_not_waited_for_when_the_end_is_announced_meanwhile(tmp_path: Path, how: str) -> None:
    held = Held()
    preemption = incckpt.Preemption(signals=(), margin=0)
    manager = CheckpointManager(held.backend, local=tmp_path, preemption=preemption)
    held.act = once_somebody_waits(manager, lambda: preemption.announce(gone(0.1)))
    try:
        save(manager, 1)
        if how == "wait":
            manager.wait("bucket")
        elif how != "close":
            with pytest.raises(DeadlineError, match="still being written"):
                manager.restore({"w": torch.zeros(9)}) if how == "restore" else manager.delete(1)
        manager.close()
        assert manager.preempted, "the copy was not waited for"
        assert manager.history[-1].tiers["bucket"].state == "failed"
        assert held.steps() == []
    finally:
        held.open.set()
    assert incckpt.load(tmp_path)["w"].equal(torch.ones(9))


def test_the_newest_is_copied_in_the_time_that_is_left(tmp_path: Path) -> None:
    held = Held()
    preemption = incckpt.Preemption(signals=(), margin=0)
    with CheckpointManager(held.backend, local=LocalTier(tmp_path, max_pending=3), preemption=preemption) as manager:

        def announce() -> None:
            preemption.announce(gone(NEVER))
            held.open.set()

        held.act = once_somebody_waits(manager, announce)
        save(manager, 1, 2, 3)
    assert [report.tiers["bucket"].state for report in manager.history] == ["durable", "skipped", "durable"]
    assert held.steps() == [1, 3]


def test_flush_waits_for_the_newest_copy(tmp_path: Path) -> None:
    held = Held()
    with CheckpointManager(held.backend, local=LocalTier(tmp_path, max_pending=3)) as manager:
        save(manager, 1, 2, 3)
        manager.flush(time.monotonic() + 0.01)
        assert held.steps() == []
        held.open.set()
        made = manager.flush(time.monotonic() + NEVER)
        assert made is not None
        assert made.step == 3
        assert held.steps() == [1, 3]
        save(manager, 4)  # nothing was given up for good
    assert held.steps() == [1, 3, 4]
