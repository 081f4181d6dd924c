"""Ctrl-C at chosen instants of a call to a manager: leaving the block ends, and what was committed restores.

Usage: python -m tests.children.interrupted save|restore|load|close|wait|delete FIRST STRIDE

An instant is a call or return of a Python function in the main thread. Every STRIDE-th from the FIRST is tried, each
with a store of its own, until the call is over before it is interrupted. Prints how many were.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import incckpt

SECONDS = 120.0  # for one instant, on a busy machine


def state() -> dict[str, Any]:
    """Return a state of a tensor and a module."""
    return {"w": torch.zeros(1000), "model": torch.nn.Linear(2, 2), "epoch": 1}


def call(name: str, manager: incckpt.CheckpointManager) -> None:
    """Make the call, and the save that `wait` and `close` wait for."""
    if name == "restore":
        manager.restore(state())
    elif name == "load":
        manager.load()
    elif name == "delete":
        manager.delete(2)
    else:
        manager.save(2, state())
        if name != "save":
            getattr(manager, name)()


def interrupt_at(instant: int) -> None:
    """Send SIGINT at the instant, counted from now."""
    left = instant

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "return"):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)


def interrupted(name: str, folder: Path, instant: int) -> bool:
    """Interrupt a call, and check what is there then; return whether it was interrupted before it was over."""
    incckpt.save(state(), folder, step=1)
    before = True
    manager = incckpt.CheckpointManager(folder, threads=1)
    try:
        with manager:
            interrupt_at(instant)
            call(name, manager)
            sys.setprofile(None)
            before = False
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    manager.close()  # it may have been interrupted, too
    with incckpt.CheckpointManager(folder) as successor:
        assert successor.restore(state()) in (1, 2), instant
        successor.save(3, state()).result()
    assert incckpt.load(folder)["epoch"] == 1
    assert incckpt.verify(folder), instant
    return before


def main() -> None:
    """Do it."""
    name, instant, stride = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    count = 0
    with tempfile.TemporaryDirectory() as root:
        while True:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            if not interrupted(name, Path(root) / str(instant), instant):
                break
            instant += stride
            count += 1
    faulthandler.cancel_dump_traceback_later()
    print(count)


if __name__ == "__main__":
    main()
